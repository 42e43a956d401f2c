//! The README says what the code does.

use std::fs;
use std::path::Path;

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("README.md")
}

/// The lines between `<!-- NAME -->` and `<!-- /NAME -->`.
fn section(text: &str, name: &str) -> String {
    let start = format!("<!-- {name} -->\n");
    let end = format!("<!-- /{name} -->");
    let from = text.find(&start).unwrap_or_else(|| panic!("README.md lacks {start}")) + start.len();
    let length = text[from..].find(&end).unwrap_or_else(|| panic!("README.md lacks {end}"));
    text[from..from + length].trim().to_string()
}

#[test]
fn the_table_of_verbs_is_that_of_the_command() {
    let mut want = "| verb | what it does |\n|---|---|".to_string();
    for (name, about) in interlace::cli::verbs().into_iter().filter(|(name, _)| name != "help") {
        want.push_str(&format!("\n| `{name}` | {about} |"));
    }
    assert_eq!(section(&readme(), "verbs"), want);
}

#[test]
fn the_table_of_strategies_is_that_of_the_code() {
    let mut want = "| strategy | what it does |\n|---|---|".to_string();
    for strategy in interlace::method::select::STRATEGIES {
        want.push_str(&format!("\n| `{}` | {} |", strategy.name, strategy.summary));
    }
    assert_eq!(section(&readme(), "strategies"), want);
}

#[test]
fn the_picture_of_the_layers_names_every_module() {
    let picture = section(&readme(), "layers");
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).expect("lib.rs");
    let modules = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    for module in modules {
        assert!(picture.contains(&format!("{module}/")), "README.md's picture of the layers lacks `{module}/`");
    }
}
