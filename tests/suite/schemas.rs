//! `schemas/` equals the schemas of the types. `INTERLACE_UPDATE_SCHEMAS=1 cargo test schemas` writes it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

#[test]
fn every_schema_file_equals_the_schema_of_its_type() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas");
    let update = std::env::var_os("INTERLACE_UPDATE_SCHEMAS").is_some();
    let mut names = BTreeSet::new();
    for (name, schema) in interlace::cli::schemas() {
        let path = folder.join(format!("{name}.schema.json"));
        let mut want = serde_json::to_string_pretty(&schema).expect("schema");
        want.push('\n');
        if update {
            fs::write(&path, &want).expect("schemas/ is writable");
        }
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            found == want,
            "{} differs from the schema of its type; run with INTERLACE_UPDATE_SCHEMAS=1",
            path.display()
        );
        names.insert(path);
    }
    let files: BTreeSet<_> =
        fs::read_dir(&folder).expect("schemas/").map(|entry| entry.expect("entry").path()).collect();
    assert_eq!(files, names, "the files of schemas/ and the artifacts differ");
}
