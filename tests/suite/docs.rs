//! The README says what the code does.

use std::fs;
use std::path::Path;

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("README.md")
}

/// The lines between `<!-- NAME -->` and `<!-- /NAME -->`.
fn section<'a>(text: &'a str, name: &str) -> &'a str {
    let start = format!("<!-- {name} -->\n");
    let end = format!("<!-- /{name} -->");
    let from = text.find(&start).unwrap_or_else(|| panic!("README.md lacks {start}")) + start.len();
    let length = text[from..].find(&end).unwrap_or_else(|| panic!("README.md lacks {end}"));
    &text[from..from + length]
}

/// A table made by the code; `INTERLACE_UPDATE_DOCS=1 cargo test docs` writes it into the README.
fn check_table(name: &str, head: [&str; 2], rows: impl Iterator<Item = (String, String)>) {
    let mut want = format!("| {} | {} |\n|---|---|\n", head[0], head[1]);
    for (key, value) in rows {
        want.push_str(&format!("| `{key}` | {value} |\n"));
    }
    check_section(name, &want);
}

fn check_section(name: &str, want: &str) {
    let mut text = readme();
    if std::env::var_os("INTERLACE_UPDATE_DOCS").is_some() {
        let old = section(&text, name);
        let start = old.as_ptr() as usize - text.as_ptr() as usize;
        text.replace_range(start..start + old.len(), want);
        fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"), &text).expect("README.md is writable");
    }
    assert_eq!(section(&text, name), want, "run with INTERLACE_UPDATE_DOCS=1");
}

#[test]
fn the_tables_are_those_of_the_code() {
    let verbs = interlace::cli::verbs().into_iter().filter(|(name, _)| name != "help");
    check_table("verbs", ["verb", "what it does"], verbs);
    let strategies = interlace::method::select::STRATEGIES.iter();
    let rows = strategies.map(|strategy| (strategy.name.to_string(), strategy.summary.to_string()));
    check_table("strategies", ["strategy", "what it does"], rows);
    let recipes = interlace::finetune::RECIPES.iter();
    check_table(
        "recipes",
        ["recipe", "what it does"],
        recipes.map(|row| (row.name.to_string(), row.summary.to_string())),
    );
    check_section("operators", &format!("\n{}\n", interlace::torch::support_table()));
}

#[test]
fn the_picture_of_the_layers_names_every_module() {
    let text = readme();
    let picture = section(&text, "layers");
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).expect("lib.rs");
    let modules = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    for module in modules {
        assert!(picture.contains(&format!("{module}/")), "README.md's picture of the layers lacks `{module}/`");
    }
}
