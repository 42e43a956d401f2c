//! The page about a run: a small run is made, and its folder is changed for the cases after it.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::cli::{fixture, interlace, stderr, stdout};

const HOSTILE: &str = "</dd><script>alert(1)</script><img src='http://x.y' onerror=\"z\"> & \u{1}\u{202e}";

fn recipe() -> String {
    let (model, data, bench) =
        (fixture("model"), fixture("data/finetune-small.parquet"), fixture("data/bench-small.tsv"));
    format!(
        r#"
        model = "{model}"
        output = "out"
        calibration = {{ data = "{data}", samples = 3, turns = "separate" }}
        plan = {{ drop_count = 2, strategies = ["interlace"] }}
        bench = {{ settings = {{ prompt_tokens = 16, new_tokens = 2, rounds = 2 }} }}
        [finetune]
        data = "{data}"
        samples = 8
        turns = "separate"
        recipe = "paper"
        settings = {{ optimizer = {{ learning_rate = 1e-3 }}, batch = {{ size = 4, accumulation_steps = 1 }} }}
        [eval]
        benchmarks = ["{bench}"]
        settings = {{ limit = 8 }}
        "#
    )
}

/// Checks that a page is well-formed XML: every element is closed in order, attributes are in quotes and occur once, and `&`
/// begins one of XML's five entities. Returns the names of the elements.
fn elements(page: &str) -> Vec<String> {
    let mut rest = page.strip_prefix("<!DOCTYPE html>\n").expect("a document type");
    let (mut open, mut found): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    let check_text = |text: &str| {
        assert!(!text.contains('>'), "{text}");
        for part in text.split('&').skip(1) {
            let entity = part.split(';').next().expect("a part");
            assert!(["amp", "lt", "gt", "quot", "#39"].contains(&entity), "&{entity}");
        }
        assert!(!text.chars().any(|c| c.is_control() && !"\t\n\r".contains(c)), "{text:?}");
    };
    while let Some((text, tail)) = rest.split_once('<') {
        check_text(text);
        let (tag, tail) = tail.split_once('>').expect("the end of a tag");
        rest = tail;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
            continue;
        }
        let (tag, is_closed) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag.trim_end(), true));
        let (name, mut attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        let mut names = Vec::new();
        while !attributes.trim().is_empty() {
            let (key, value) = attributes.trim_start().split_once("=\"").expect("a value in quotes");
            let (value, tail) = value.split_once('"').expect("the end of a value");
            assert!(key.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)), "{key}");
            assert!(!names.contains(&key), "{key} twice in <{tag}>");
            check_text(value);
            names.push(key);
            attributes = tail;
        }
        found.push(name.to_string());
        if !is_closed {
            open.push(name.to_string());
        }
    }
    check_text(rest);
    assert_eq!(open, Vec::<String>::new());
    found
}

/// Writes the page and returns it with what the command printed.
fn page(folder: &Path) -> (String, Value) {
    let output = interlace(folder, &["report", "out", "-o", "page.html", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let page = fs::read_to_string(folder.join("page.html")).expect("a page");
    let printed: Value = serde_json::from_str(&stdout(&output)).expect("JSON");
    assert_eq!(printed["size_bytes"], page.len());
    let found = elements(&page);
    assert!(!found.iter().any(|name| ["script", "link", "iframe", "object"].contains(&name.as_str())), "{found:?}");
    assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("url("));
    (page, printed)
}

fn left_out(printed: &Value) -> Vec<String> {
    let sections = printed["sections"].as_array().expect("sections");
    sections.iter().filter_map(|section| section["left_out"].as_str().map(str::to_string)).collect()
}

fn change(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).expect("an artifact")).expect("JSON");
    edit(&mut value);
    fs::write(path, value.to_string()).expect("an artifact");
}

#[test]
fn the_page_of_a_run_has_its_figures_and_nothing_from_elsewhere() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    fs::write(here.join("recipe.toml"), recipe()).expect("recipe");
    let output = interlace(here, &["run", "recipe.toml"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));

    let (text, printed) = page(here);
    assert_eq!(left_out(&printed), Vec::<String>::new());
    // Figures of the files, as the page shows them.
    let read = |file: &str| -> Value {
        serde_json::from_slice(&fs::read(here.join("out").join(file)).expect("an artifact")).expect("JSON")
    };
    let (scores, plan, table) = (read("scores.json"), read("plan-interlace.json"), read("table.json"));
    let similarity = scores["sim_3"]["mean"][4].as_f64().expect("a similarity");
    assert!(text.contains(&format!("<td>{similarity:.4}</td>")));
    assert_eq!(text.matches("(chosen)").count(), plan["groups"].as_array().expect("groups").len());
    for row in table["rows"].as_array().expect("rows") {
        assert!(text.contains(row["model"].as_str().expect("a name")));
        assert!(text.contains(&format!("<td>{}</td>", row["size_bytes"])));
    }
    // What a group keeps is what `eval` says of the same answers.
    let kept = &table["rows"][4]["kept_of_dense"];
    let number = |key: &str| 100.0 * kept[key].as_f64().expect("a number");
    let interval = format!("{:.1} [{:.1}, {:.1}]", number("ratio"), number("low"), number("high"));
    assert!(text.matches(&interval).count() >= 2, "{interval}");
    // Charts are for everybody: each has a title, a description and a table.
    let found = elements(&text);
    let count = |name: &str| found.iter().filter(|other| *other == name).count();
    assert_eq!(count("desc"), text.matches("role=\"img\"").count());
    assert!(count("desc") >= 8 && count("details") == count("desc"), "{} {}", count("desc"), count("details"));
    assert_eq!(count("article"), 6);
    assert!(text.matches("src=\"data:image/").count() >= 5);

    // Text of strangers stays text.
    let answers = here.join("out/eval-bench-small-dense.json");
    change(&answers, |report| {
        for answer in report["model"]["answers"].as_array_mut().expect("answers") {
            answer["prediction"] = json!(HOSTILE);
        }
    });
    change(&here.join("out/table.json"), |table| table["settings"]["model"] = json!(HOSTILE));
    let hostile = interlace(here, &["report", "out", "-o", "hostile.html"]);
    assert_eq!(hostile.status.code(), Some(0), "{}", stderr(&hostile));
    let text = fs::read_to_string(here.join("hostile.html")).expect("a page");
    let found = elements(&text);
    assert!(!found.contains(&"script".to_string()) && text.contains("&lt;script&gt;alert(1)"));
    assert_eq!(found.iter().filter(|name| *name == "img").count(), text.matches("src=\"data:image/").count());

    // What is not there is named with what makes it.
    change(&here.join("out/table.json"), |table| {
        table["settings"]["model"] = json!("m");
        table["settings"]["eval"]["benchmarks"] = json!(["gone.tsv"]);
        for row in table["rows"].as_array_mut().expect("rows") {
            row.as_object_mut().expect("a row").remove("speed");
        }
    });
    for file in ["scores.json", "plan-interlace.json", "bench-interlace-finetuned.json"] {
        fs::remove_file(here.join("out").join(file)).expect("an artifact");
    }
    fs::remove_dir_all(here.join("out/work")).expect("the work folder");
    let (_, printed) = page(here);
    let reasons = left_out(&printed);
    for part in
        ["`interlace score`", "strategies", "`[finetune]`", "eval-*.json", "`[bench] enabled = true`", "gone.tsv"]
    {
        assert!(reasons.iter().any(|reason| reason.contains(part)), "{part}: {reasons:?}");
    }
    assert_eq!(reasons.len(), 7, "{reasons:?}");
}

#[test]
fn a_file_that_is_no_page_is_not_replaced() {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("page.html");
    let foreign = "<!DOCTYPE html>\n<html><head><title>About interlace: notes</title></head></html>\n";
    for text in [foreign, "my notes\n"] {
        fs::write(&file, text).expect("file");
        let output = interlace(folder.path(), &["report", "out", "-o", "page.html"]);
        assert_eq!(output.status.code(), Some(2));
        let message = stderr(&output);
        assert!(message.contains("`page.html`: is there already, and is no page that `report` wrote"), "{message}");
        assert_eq!(fs::read_to_string(&file).expect("file"), text);
    }
    // A page of its own, and an empty file, are replaced: what is refused is the folder.
    for text in ["", "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<title>interlace: model</title>\n"] {
        fs::write(&file, text).expect("file");
        let output = interlace(folder.path(), &["report", "out", "-o", "page.html"]);
        assert!(!stderr(&output).contains("is there already"), "{}", stderr(&output));
    }
}

#[test]
fn a_folder_without_a_run_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    fs::create_dir(folder.path().join("out")).expect("folder");
    let output = interlace(folder.path(), &["report", "out", "-o", "page.html"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("holds none of `table.json`, `sweep.json` and `tune.json`"),
        "{}",
        stderr(&output)
    );
    assert!(!folder.path().join("page.html").exists());
}
