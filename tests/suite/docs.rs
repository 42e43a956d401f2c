//! The documents agree with the code: tables equal the code's tables, links have targets, commands run.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::layers::{LAYERS, PARTS};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every document for users, relative to the root.
fn documents() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(PathBuf::from).to_vec();
    for folder in ["docs", "docs/results"] {
        let entries = fs::read_dir(root().join(folder)).expect("docs/");
        let names = entries.map(|entry| entry.expect("entry").file_name());
        found.extend(
            names.map(|name| Path::new(folder).join(name)).filter(|path| path.extension() == Some("md".as_ref())),
        );
    }
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The lines between `<!-- NAME -->` and `<!-- /NAME -->`.
fn section<'a>(text: &'a str, name: &str) -> &'a str {
    let start = format!("<!-- {name} -->\n");
    let end = format!("<!-- /{name} -->");
    let from = text.find(&start).unwrap_or_else(|| panic!("lacks {start}")) + start.len();
    let length = text[from..].find(&end).unwrap_or_else(|| panic!("lacks {end}"));
    &text[from..from + length]
}

/// Compares a section with the text made from the code. `INTERLACE_UPDATE_DOCS=1 cargo test docs` writes it.
fn check_section(file: &str, name: &str, want: &str) {
    let path = Path::new(file);
    let mut text = read(path);
    if std::env::var_os("INTERLACE_UPDATE_DOCS").is_some() {
        let old = section(&text, name);
        let start = old.as_ptr() as usize - text.as_ptr() as usize;
        text.replace_range(start..start + old.len(), want);
        fs::write(root().join(path), &text).expect("the document is writable");
    }
    let other = section(&text, name).lines().zip(want.lines()).find(|(found, want)| found != want);
    assert!(section(&text, name) == want, "{file} differs from the code ({other:?}): run with INTERLACE_UPDATE_DOCS=1");
}

fn check_table(file: &str, name: &str, head: [&str; 2], rows: impl Iterator<Item = (String, String)>) {
    let mut want = format!("| {} | {} |\n|---|---|\n", head[0], head[1]);
    for (key, value) in rows {
        let _ = writeln!(want, "| `{key}` | {value} |");
    }
    check_section(file, name, &want);
}

#[test]
fn tables_in_documents_equal_the_tables_in_the_code() {
    let verbs = interlace::cli::verbs().into_iter().filter(|(name, _)| name != "help");
    check_table("README.md", "verbs", ["verb", "what it does"], verbs);
    let strategies = interlace::method::select::STRATEGIES.iter();
    let rows = strategies.map(|strategy| (strategy.name.to_string(), strategy.summary.to_string()));
    check_table("docs/strategies.md", "strategies", ["strategy", "what it does"], rows);
    let compensations = interlace::method::COMPENSATIONS.iter();
    let rows = compensations.map(|row| (row.name.to_string(), row.summary.to_string()));
    check_table("docs/strategies.md", "compensations", ["`--compensate`", "what it does"], rows);
    let recipes = interlace::finetune::RECIPES.iter();
    let rows = recipes.map(|row| (row.name.to_string(), row.summary.to_string()));
    check_table("docs/healing.md", "recipes", ["recipe", "what it does"], rows);
    let mut losses = String::from("| loss | definition | needs |\n|---|---|---|\n");
    for row in interlace::finetune::LOSSES {
        let answers = row.kind.looks_at_answers().then_some("answers");
        let needs: Vec<&str> = answers.into_iter().chain(row.kind.needs_teacher().then_some("`--teacher`")).collect();
        let _ = writeln!(losses, "| `{}` | {} | {} |", row.name, row.summary, needs.join(", "));
    }
    check_section("docs/healing.md", "losses", &losses);
    let mut metrics = String::from("| metric | score | names of benchmarks begin with |\n|---|---|---|\n");
    for row in interlace::eval::METRICS {
        let names: Vec<String> = row.benchmarks.iter().map(|name| format!("`{name}`")).collect();
        let _ = writeln!(metrics, "| `{}` | {} | {} |", row.name, row.about, names.join(", "));
    }
    check_section("docs/benchmarks.md", "metrics", &metrics);
    let targets = interlace::export::TARGETS.iter();
    let rows = targets.map(|row| (row.name.to_string(), format!("{}; tried with {}", row.summary, row.consumer)));
    check_table("docs/deploy.md", "targets", ["`--to`", "what it writes"], rows);
    let mut precisions = String::from("| `--precision` | what it writes | files | `--variant` |\n|---|---|---|---|\n");
    for row in interlace::export::PRECISIONS {
        let (name, suffix) = (row.name, row.suffix);
        let _ = writeln!(precisions, "| `{name}` | {} | `*_{suffix}.onnx` | `{suffix}` |", row.summary);
    }
    check_section("docs/quantise.md", "precisions", &precisions);
    check_section("docs/families.md", "families", &format!("\n{}\n", interlace::data::family_table()));
    let layouts = interlace::bundle::LAYOUTS.iter().chain([&interlace::bundle::SINGLE_FILE]);
    let rows = layouts.map(|layout| (layout.name.to_string(), layout.summary.to_string()));
    check_table("docs/families.md", "layouts", ["layout", "what it is"], rows);
    check_section("docs/operators.md", "operators", &format!("\n{}\n", interlace::torch::support_table()));
    check_section("docs/cli.md", "cli", &interlace::cli::reference());
}

/// Every test and fixture that the table of families names exists.
#[test]
fn tests_and_fixtures_named_in_the_family_table_exist() {
    use interlace::data::{FAMILIES, Proof};

    let pipelines = read(Path::new("tests/suite/families.rs"));
    let all: String = ["tests/suite", "src/bundle"]
        .into_iter()
        .flat_map(|folder| fs::read_dir(root().join(folder)).expect("tests"))
        .map(|entry| fs::read_to_string(entry.expect("entry").path()).unwrap_or_default())
        .collect();
    let processors = read(Path::new("fixtures/processor/families.json"));
    let processors: serde_json::Value = serde_json::from_str(&processors).expect("JSON");
    for family in FAMILIES {
        let shown = match family.proof {
            Proof::Pipeline(tests) => tests.iter().all(|test| {
                pipelines.contains(&format!("    {test} = \"")) || pipelines.contains(&format!("#[test]\nfn {test}()"))
            }),
            Proof::Processor(name) => {
                let all = processors["families"].as_array().expect("families");
                all.iter().any(|family| family["name"] == name)
            }
            Proof::Shared(other) => FAMILIES.iter().any(|family| family.name == other && family.class.is_some()),
            Proof::Test(test) => all.contains(&format!("#[test]\nfn {test}()")),
        };
        assert!(shown, "{}: {:?}", family.name, family.proof);
    }
}

/// One heading for each artifact, with its description and its fields.
fn artifacts() -> String {
    let mut text = String::new();
    for (name, schema) in interlace::cli::schemas() {
        let schema = serde_json::to_value(&schema).expect("schema");
        let words = |value: &serde_json::Value| {
            let text = value["description"].as_str().unwrap_or_default();
            text.split("\n\n").next().unwrap_or_default().replace('\n', " ").replace('|', "\\|")
        };
        let _ = write!(text, "\n## {name}\n\n{} [Schema](../schemas/{name}.schema.json).\n\n", words(&schema));
        let Some(fields) = schema["properties"].as_object() else { continue };
        text.push_str("| field | content |\n|---|---|\n");
        for (field, value) in fields {
            let _ = writeln!(text, "| `{field}` | {} |", words(value));
        }
    }
    text.push('\n');
    text
}

#[test]
fn the_documentation_of_json_files_is_made_from_their_types() {
    check_section("docs/json.md", "json", &artifacts());
}

#[test]
fn the_layer_diagram_equals_the_layers_of_the_import_test() {
    let text = read(Path::new("docs/architecture.md"));
    let mut rows: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for line in section(&text, "layers").lines() {
        let mut words = line.split_whitespace();
        let (number, name) = (words.next().and_then(|word| word.parse().ok()), words.next());
        let (Some(number), Some(name)) = (number, name) else { continue };
        rows.entry(number).or_default().push(name.trim_end_matches('/').trim_end_matches(".rs"));
    }
    let set = |names: &[&'static str]| names.iter().copied().collect::<BTreeSet<_>>();
    for (number, names) in (1..).zip(LAYERS) {
        let drawn: BTreeSet<&str> = rows.remove(&number).unwrap_or_default().into_iter().collect();
        assert_eq!(drawn, set(names), "row {number} of the layer diagram");
    }
    assert!(rows.is_empty(), "the layer diagram has additional rows: {rows:?}");
    let parts = section(&text, "rooms").lines().filter(|line| !line.starts_with("```"));
    let parts: Vec<&str> = parts.filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(parts, PARTS[0].1, "the parts of finetune/");
}

/// Paths that documents name in code spans, relative to the root.
#[test]
fn every_path_in_a_document_exists() {
    const FOLDERS: [&str; 6] = ["src/", "tests/", "scripts/", "docs/", "fixtures/", "schemas/"];
    let mut count = 0;
    for path in documents() {
        let text = read(&path);
        for code in text.split('`').skip(1).step_by(2) {
            let words = code.split_whitespace().filter(|word| FOLDERS.iter().any(|folder| word.starts_with(folder)));
            for word in words.filter(|word| !word.contains('*')) {
                let word = word.trim_end_matches([':', ',', ';']);
                count += 1;
                assert!(root().join(word).exists(), "{}: `{word}` does not exist", path.display());
            }
        }
    }
    assert!(count > 40, "only {count} paths found");
}

#[test]
fn the_readme_has_at_most_150_lines() {
    let lines = read(Path::new("README.md")).lines().count();
    assert!(lines <= 150, "README.md has {lines} lines, at most 150 are wanted");
}

/// The anchors of all headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let anchor = |heading: &str| {
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.collect::<String>().to_lowercase().replace(' ', "-")
    };
    headings.map(anchor).collect()
}

#[test]
fn every_link_in_a_document_has_a_target() {
    let mut count = 0;
    for path in documents() {
        let text = read(&path);
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap_or_default();
            if target.starts_with("http") {
                continue;
            }
            count += 1;
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let full = if file.is_empty() {
                root().join(&path)
            } else {
                root().join(&path).parent().expect("folder").join(file)
            };
            assert!(full.exists(), "{}: the target of the link to {target} does not exist", path.display());
            if !anchor.is_empty() {
                let other = fs::read_to_string(&full).expect("linked document");
                assert!(anchors(&other).contains(anchor), "{}: the heading of {target} does not exist", path.display());
            }
        }
    }
    assert!(count > 20, "only {count} links found");
}

/// The blocks of a document that are marked as runnable, joined to one shell script.
fn runnable(text: &str) -> String {
    let mut script = String::new();
    let mut inside = false;
    for line in text.lines() {
        match line {
            "```sh runnable" => inside = true,
            "```" => inside = false,
            _ if inside => {
                script.push_str(line);
                script.push('\n');
            }
            _ => {}
        }
    }
    script
}

#[test]
fn commands_marked_as_runnable_succeed() {
    let programs = Path::new(env!("CARGO_BIN_EXE_interlace")).parent().expect("folder of the programs");
    let search = format!("{}:{}", programs.display(), std::env::var("PATH").expect("PATH"));
    let mut count = 0;
    for path in documents() {
        let script = runnable(&read(&path));
        if script.is_empty() {
            continue;
        }
        count += 1;
        let folder = tempfile::tempdir().expect("temporary folder");
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", &script])
            .current_dir(root())
            .env("PATH", &search)
            .env("OUT", folder.path())
            .output()
            .expect("bash");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {errors}", path.display());
    }
    assert!(count > 0, "no document has a runnable block");
}
