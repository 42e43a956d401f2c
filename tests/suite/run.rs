//! A recipe is run from beginning to end and then again: finished steps are reused.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::cli::{fixture, interlace, stderr, stdout};

/// Text that differs from the questions in kind.
const WORDS: &str = "{\"text\": \"the quick brown fox jumps over the lazy dog and then it sleeps for a while\"}\n";

fn recipe(learning_rate: &str) -> String {
    let (model, data, bench) =
        (fixture("model"), fixture("data/finetune-small.parquet"), fixture("data/bench-small.tsv"));
    format!(
        r#"
        model = "{model}"
        output = "out"
        calibration = {{ data = "{data}", samples = 3, turns = "separate" }}
        plan = {{ drop_count = 2, strategies = ["interlace", "angular"] }}
        bench = {{ enabled = false }}
        [export]
        targets = ["triton", "genai", "generate", "openvino"]
        precision = ["int4"]
        blocks = {{ least_error = false }}
        max_ir_version = 10
        [finetune]
        data = "{data}"
        samples = 8
        turns = "separate"
        held_back = 0.25
        settings = {{ optimizer = {{ learning_rate = {learning_rate} }}, batch = {{ size = 4, accumulation_steps = 1 }} }}
        [eval]
        benchmarks = ["{bench}"]
        settings = {{ limit = 6 }}
        [[eval.other]]
        data = "words.jsonl"
        sequence_length = 32
        "#
    )
}

fn read(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).expect("artifact")).expect("JSON")
}

#[test]
fn a_second_run_of_a_recipe_repeats_only_changed_steps() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    fs::write(here.join("words.jsonl"), WORDS).expect("text");
    fs::write(here.join("recipe.toml"), recipe("1e-3")).expect("recipe");
    let output = interlace(here, &["run", "recipe.toml"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    for row in [
        "dense",
        "dense, finetuned",
        "dense, finetuned (2 layers)",
        "interlace, dropped",
        "interlace, finetuned",
        "angular, dropped",
        "angular, finetuned",
        "dense, int4",
        "interlace, finetuned, int4",
    ] {
        assert!(text.contains(row), "{text}");
    }
    let out = here.join("out");
    check_table(&read(&out.join("table.json")), &out);
    let whole = read(&out.join("dense-finetuned/interlace.json"))["history"].clone();
    assert_eq!((whole.as_array().map(Vec::len), whole[0]["layers"].as_array().map(Vec::len)), (Some(1), Some(16)));
    let part = read(&out.join("dense-finetuned-partly/interlace.json"))["history"].clone();
    assert_eq!(part[0]["layers"], read(&out.join("plan-interlace.json"))["finetune"]);
    assert_eq!(read(&out.join("plan-interlace.json"))["drop"].as_array().map(Vec::len), Some(2));
    let history = read(&out.join("healed-interlace/interlace.json"))["history"].clone();
    assert_eq!(history[0]["step"], "prune");
    assert_eq!(history[1]["step"], "finetune");
    let manifest = read(&out.join("manifest.json"));
    assert!(manifest["files"]["healed-interlace/onnx/decoder_model_merged.onnx_data"].is_string());
    assert!(out.join("run.lock").is_file() && manifest["files"]["run.lock"].is_null());
    for (target, file) in [
        ("triton", "generate_stream/1/model.py"),
        ("genai", "genai_config.json"),
        ("generate", "onnx/generate.onnx"),
        ("openvino", "onnx/vision_encoder_q4.onnx"),
    ] {
        assert!(out.join(target).join(file).is_file(), "{target}");
    }
    // The targets have the 4-bit graphs.
    let bytes = |path: &str| fs::metadata(out.join(path)).expect("file").len();
    assert!(3 * bytes("openvino/onnx/vision_encoder_q4.onnx") < bytes("healed-interlace/onnx/vision_encoder.onnx"));
    let state = fs::read(out.join("state.json")).expect("state");

    let again = interlace(here, &["run", "recipe.toml"]);
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    assert_eq!(stdout(&again), text);
    assert!(
        stderr(&again).lines().filter(|line| line.contains(" s")).all(|line| !line.starts_with("healed")),
        "{}",
        stderr(&again)
    );
    assert_eq!(fs::read(out.join("state.json")).expect("state"), state);

    fs::write(here.join("recipe.toml"), recipe("2e-3")).expect("recipe");
    let third = stderr(&interlace(here, &["run", "recipe.toml"]));
    assert!(third.contains("score: kept from before") && third.contains("pruned-angular: kept from before"), "{third}");
    assert!(!third.contains("healed-interlace: kept from before"), "{third}");
    assert!(third.contains("eval-bench-small-dense: kept from before"), "{third}");
}

/// Compares every row with both dense models: ratios and differences are those of the averages.
fn check_table(table: &serde_json::Value, out: &Path) {
    let rows = table["rows"].as_array().expect("rows");
    let names: Vec<&str> = rows.iter().filter_map(|row| row["model"].as_str()).collect();
    assert_eq!(names[..3], ["dense", "dense, finetuned", "dense, finetuned (2 layers)"]);
    assert_eq!(names[7..], ["dense, int4", "interlace, finetuned, int4"]);
    let size = |place: usize| rows[place]["size_bytes"].as_u64().expect("bytes");
    assert!(4 * size(7) < size(0) && size(8) < size(7), "{} {} {}", size(0), size(7), size(8));
    let average = |row: &serde_json::Value| row["average"].as_f64().expect("a score");
    for row in rows {
        for (kept, difference, base) in [
            ("kept_of_dense", "difference_from_dense", &rows[0]),
            ("kept_of_finetuned", "difference_from_finetuned", &rows[1]),
        ] {
            let (own, base) = (average(row), average(base));
            let ratio = row[kept]["ratio"].as_f64().expect("a ratio");
            let less = &row[difference];
            assert!((ratio - own / base).abs() < 1e-12, "{row}");
            assert!((less["difference"].as_f64().expect("a difference") - (own - base)).abs() < 1e-12, "{row}");
            assert!(less["low"].as_f64() <= less["high"].as_f64(), "{row}");
        }
        assert!(row["held_back_loss"].as_f64().expect("a loss") > 0.0);
        let other = &row["other"][0];
        assert_eq!((other["name"].as_str(), other["measure"].as_str()), (Some("words"), Some("perplexity")));
        assert!(other["value"].as_f64().expect("a perplexity") > 1.0);
    }
    assert_eq!(rows[0]["other"][0]["kept"].as_f64(), Some(1.0));
    // Held-back samples are not trained on: the healed models used at most the other rows.
    let work = fs::read_dir(out.join("work")).expect("work").flatten();
    let seen: Vec<serde_json::Value> = work.map(|entry| read(&entry.path().join("finetune.json"))).collect();
    assert_eq!(seen.len(), 4);
    assert!(seen.iter().all(|report| report["sample_ids"] == seen[0]["sample_ids"]));
}

/// The plan with the lowest loss on held-back data after a short healing is the run's own; every pruned model of the run has
/// bridges, fitted on the calibration data.
#[test]
fn auto_takes_the_candidate_that_heals_best_on_held_back_data() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    fs::write(here.join("words.jsonl"), WORDS).expect("text");
    let plan = r#"plan = { drop_count = 2, strategies = ["auto"], auto = { candidates = ["interlace", "angular"], step_tokens = 256 } }
        prune = { compensate = "bridge", rank = 2, fit_tokens = 512 }"#;
    let text = recipe("1e-3").replace(r#"plan = { drop_count = 2, strategies = ["interlace", "angular"] }"#, plan);
    assert!(text.contains("step_tokens = 256"));
    fs::write(here.join("recipe.toml"), text.replace("samples = 3,", "samples = 8,")).expect("recipe");
    let output = interlace(here, &["run", "recipe.toml"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let out = here.join("out");
    let losses = ["interlace", "angular"].map(|name| {
        let loss = &read(&out.join(format!("held-back-auto-{name}.json")))["model"]["mean_loss"];
        (loss.as_f64().expect("a loss"), name)
    });
    let best = if losses[1].0 < losses[0].0 { losses[1].1 } else { losses[0].1 };
    let (said, printed) = (stderr(&output), stdout(&output));
    assert!(said.contains(&format!("auto: chose {best}")), "{said}");
    assert!(printed.contains(&format!("auto ({best}), finetuned")), "{printed}");
    let chosen = read(&out.join(format!("plan-{best}.json")))["drop"].clone();
    let record = read(&out.join("healed-auto/interlace.json"));
    assert_eq!(record["history"][0]["dropped"], chosen);
    let settings = &read(&out.join("pruned-auto/interlace.json"))["settings"];
    assert_eq!((&settings["compensation"]["kind"], &settings["compensation"]["rank"]), (&"bridge".into(), &2.into()));
    // The trial models are gone, and a second run repeats nothing.
    assert!(!out.join("auto-interlace").exists() && !out.join("auto-angular").exists());
    let again = interlace(here, &["run", "recipe.toml"]);
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    assert!(!stderr(&again).lines().any(|line| line.ends_with(" s")), "{}", stderr(&again));
}

fn sweep_file(recipes: &str) -> String {
    let (model, data, bench) =
        (fixture("model"), fixture("data/finetune-small.parquet"), fixture("data/bench-small.tsv"));
    format!(
        r#"
        model = "{model}"
        output = "out"
        drop_ratios = [0.07, 0.13]
        strategies = ["consecutive", "interlace-tn"]
        seeds = [1, 2]
        calibration = {{ data = "{data}", samples = 3, turns = "separate" }}
        [finetune]
        data = "{data}"
        samples = 4
        turns = "separate"
        recipes = [{recipes}]
        settings = {{ optimizer = {{ learning_rate = 1e-3 }}, batch = {{ size = 4, accumulation_steps = 1 }} }}
        [eval]
        benchmarks = ["{bench}"]
        settings = {{ limit = 6 }}
        "#
    )
}

#[test]
fn a_sweep_shares_equal_steps_and_resumes() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    fs::write(here.join("sweep.toml"), sweep_file("\"paper\"")).expect("sweep");
    let output = interlace(here, &["sweep", "sweep.toml", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let progress = stderr(&output);
    let table: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let out = here.join("out");
    assert_eq!(table, read(&out.join("sweep.json")));
    let rows = table["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 4);
    for row in rows {
        let values = row["kept_of_finetuned"]["values"].as_array().expect("values");
        assert_eq!(values.len(), 2);
        let mean = values.iter().filter_map(serde_json::Value::as_f64).sum::<f64>() / 2.0;
        assert!((row["kept_of_finetuned"]["mean"].as_f64().expect("mean") - mean).abs() < 1e-12);
    }
    assert!(progress.contains("cell 8 of 8"), "{progress}");
    // With one of 16 layers dropped, both strategies drop the same layer and finetune the next one, so they share a
    // pruned model and one healed model per seed. With two they differ: a block, or two single layers. Only the answers
    // of the healed models are kept.
    let made = || -> Vec<String> {
        fs::read_dir(&out).expect("out").filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
    };
    let count = |start: &str| made().iter().filter(|name| name.starts_with(start)).count();
    assert_eq!(rows[0]["dropped"], rows[1]["dropped"]);
    assert_ne!(rows[2]["dropped"], rows[3]["dropped"]);
    let counts = || (count("pruned-"), count("healed-"), count("eval-bench-small-healed-"));
    assert_eq!(counts(), (3, 0, 6), "{:?}", made());

    let again = interlace(here, &["sweep", "sweep.toml", "--json"]);
    assert_eq!(again.stdout, output.stdout);
    assert!(!stderr(&again).lines().any(|line| line.ends_with(" s")), "{}", stderr(&again));

    // One more recipe: finished steps are reused.
    fs::write(here.join("sweep.toml"), sweep_file("\"paper\", \"fast\"")).expect("sweep");
    let more = interlace(here, &["sweep", "sweep.toml"]);
    assert_eq!(more.status.code(), Some(0), "{}", stderr(&more));
    assert!(stderr(&more).contains("cell 16 of 16"), "{}", stderr(&more));
    let done = stderr(&more).lines().filter(|line| line.starts_with("healed-") && line.ends_with(" s")).count();
    assert_eq!((done, counts()), (6, (3, 0, 12)), "{}", stderr(&more));
    assert!(stdout(&more).contains("Pareto"), "{}", stdout(&more));
    assert!(fs::read_to_string(out.join("sweep.md")).expect("table").contains("| fast |"));
    let chart = fs::read_to_string(out.join("front.svg")).expect("a chart");
    assert!(chart.starts_with("<svg xmlns=") && chart.contains(", fast</text>"), "{chart}");
    let page = interlace(here, &["report", out.to_str().expect("a path"), "-o", "page.html"]);
    assert_eq!(page.status.code(), Some(0), "{}", stderr(&page));
    let text = fs::read_to_string(here.join("page.html")).expect("a page");
    for row in read(&out.join("sweep.json"))["rows"].as_array().expect("rows") {
        assert!(text.contains(&format!("<td>{:.2}</td>", row["speedup"].as_f64().expect("a speed-up"))));
    }
    for part in ["Kept percent over speed-up", "a sweep keeps averages over groups", "dense model</dt>"] {
        assert!(text.contains(part), "{part}");
    }

    // Now the models are requested: they are healed again, with the same result.
    let steps = || read(&out.join("state.json"))["steps"].as_object().expect("steps").clone();
    let before = steps();
    fs::write(here.join("sweep.toml"), format!("keep_models = true\n{}", sweep_file("\"paper\""))).expect("sweep");
    let kept = interlace(here, &["sweep", "sweep.toml"]);
    assert_eq!(kept.status.code(), Some(0), "{}", stderr(&kept));
    assert_eq!(counts(), (3, 6, 12), "{:?}", made());
    for (name, step) in steps() {
        assert_eq!(step["digest"], before[&name]["digest"], "{name}");
    }

    // Each healed model in another precision is a row below that of its floats, and the first seed's are written for a target.
    let export = "[export]\nprecision = [\"int4\"]\nblocks = { least_error = false }\ntargets = [\"single-file\"]\n";
    fs::write(here.join("sweep.toml"), format!("keep_models = true\n{}{export}", sweep_file("\"paper\"")))
        .expect("sweep");
    let smaller = interlace(here, &["sweep", "sweep.toml"]);
    assert_eq!(smaller.status.code(), Some(0), "{}", stderr(&smaller));
    let rows = read(&out.join("sweep.json"))["rows"].as_array().expect("rows").clone();
    assert_eq!(rows.len(), 8);
    for pair in rows.chunks(2) {
        let size = |row: &serde_json::Value| row["size_bytes"].as_f64().expect("a size");
        assert!(pair[0]["precision"].is_null() && pair[1]["precision"] == "int4", "{pair:?}");
        assert!(pair[0]["dropped"] == pair[1]["dropped"] && size(&pair[1]) < 0.25 * size(&pair[0]), "{pair:?}");
        assert_eq!(pair[1]["kept_of_dense"]["values"].as_array().map(Vec::len), Some(2));
    }
    assert_eq!(
        (counts(), count("single-file-healed-"), count("precision-healed-")),
        ((3, 6, 18), 3, 6),
        "{:?}",
        made()
    );
    assert!(fs::read_to_string(out.join("sweep.md")).expect("table").contains("| paper, int4 |"));
}

/// The divergence is measured on the calibration samples, here one text.
#[test]
fn max_kl_gives_parts_of_a_recipes_int4_models_more_bits() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    fs::write(here.join("words.jsonl"), WORDS).expect("text");
    let data = fixture("data/finetune-small.parquet");
    let quantised = |limit: &str| {
        let lines = format!("precision = [\"int4\"]\n        {limit}");
        let text = recipe("1e-3")
            .replace(
                &format!("{{ data = \"{data}\", samples = 3, turns = \"separate\" }}"),
                "{ data = \"words.jsonl\", samples = 1 }",
            )
            .replace(
                "drop_count = 2, strategies = [\"interlace\", \"angular\"]",
                "drop_count = 1, strategies = [\"angular\"]",
            )
            .replace("held_back = 0.25", "dense = { enabled = false }")
            .replace("targets = [\"triton\", \"genai\", \"generate\", \"openvino\"]\n", "")
            .replace("max_ir_version = 10\n", "")
            .replace("precision = [\"int4\"]", &lines);
        fs::write(here.join("recipe.toml"), text).expect("recipe");
        let output = interlace(here, &["run", "recipe.toml"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let file = "out/precision-angular-finetuned/onnx/decoder_model_merged_q4.onnx_data";
        fs::metadata(here.join(file)).expect("file").len()
    };
    let four_bits = quantised("");
    assert!(quantised("max_kl = 1e-4") > four_bits);
}

/// The benchmark is read after all models are made, so an unreadable one does not change any model.
#[test]
fn no_choice_depends_on_the_benchmark() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    fs::write(here.join("words.jsonl"), WORDS).expect("text");
    let bench = fs::read(fixture("data/bench-small.tsv")).expect("benchmark");
    let chosen = recipe("1e-3")
        .replace("learning_rate = 1e-3", "learning_rate = [1e-4, 1e-3]")
        .replace("\"angular\"", "\"sleb\"")
        .replace(&fixture("data/bench-small.tsv"), "test.tsv");
    assert!(chosen.contains("[1e-4, 1e-3]") && chosen.contains("sleb") && chosen.contains("\"test.tsv\""));
    fs::write(here.join("recipe.toml"), &chosen).expect("recipe");

    let missing = interlace(here, &["run", "recipe.toml"]);
    assert_eq!(missing.status.code(), Some(2), "{}", stderr(&missing));
    assert!(stderr(&missing).contains("test.tsv") && !here.join("out").exists(), "{}", stderr(&missing));

    fs::write(here.join("test.tsv"), b"\xff\xfe no benchmark").expect("write");
    let broken = interlace(here, &["run", "recipe.toml"]);
    assert_eq!(broken.status.code(), Some(2), "{}", stderr(&broken));
    let steps = || read(&here.join("out/state.json"))["steps"].as_object().expect("steps").clone();
    let made = steps();
    for name in ["dense-finetuned", "dense-finetuned-partly", "healed-interlace", "healed-sleb"] {
        assert!(made.contains_key(name), "{name} does not exist: {}", stderr(&broken));
    }
    assert!(made.keys().all(|name| !name.starts_with("eval-")), "{:?}", made.keys());

    fs::write(here.join("test.tsv"), bench).expect("write");
    let whole = interlace(here, &["run", "recipe.toml"]);
    assert_eq!(whole.status.code(), Some(0), "{}", stderr(&whole));
    let after = steps();
    assert!(made.iter().all(|(name, step)| after[name] == *step), "a step was repeated");
}

/// Bytes that are no benchmark and no text.
const NOTHING: &[u8] = b"\xff\xfe nothing";

/// Makes a pipe at `path`. The thread waits for the first reader, reads the finished steps of the run in `out` at that moment,
/// and gives the reader bytes that are no data. It ends with nothing where the run was over before.
fn at_the_first_opening(path: &Path, out: &Path, over: &Arc<AtomicBool>) -> JoinHandle<Option<Vec<String>>> {
    let made = Command::new("mkfifo").arg(path).status().expect("mkfifo");
    assert!(made.success());
    let (path, out, over) = (path.to_path_buf(), out.to_path_buf(), over.clone());
    std::thread::spawn(move || {
        let mut pipe = fs::OpenOptions::new().write(true).open(&path).expect("a reader");
        if over.load(Ordering::SeqCst) {
            return None;
        }
        let state = read(&out.join("state.json"));
        // Whoever opens it again finds a file.
        fs::remove_file(&path).expect("remove");
        fs::write(&path, NOTHING).expect("write");
        // A reader that is gone is no matter.
        let _ = pipe.write_all(NOTHING);
        Some(state["steps"].as_object().expect("steps").keys().cloned().collect())
    })
}

/// Triplets and pairs of 16 layers end before seven: `interlace` is left out and said to be, and alone it is the run's error.
#[test]
fn auto_leaves_out_a_candidate_that_cannot_drop_that_many_layers() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    fs::write(here.join("words.jsonl"), WORDS).expect("text");
    let run = |candidates: &str| {
        let plan = format!(
            r#"plan = {{ drop_count = 7, strategies = ["auto"], auto = {{ candidates = [{candidates}], step_tokens = 256 }} }}"#
        );
        let text = recipe("1e-3")
            .replace(r#"plan = { drop_count = 2, strategies = ["interlace", "angular"] }"#, &plan)
            .replace(r#"targets = ["triton", "genai", "generate", "openvino"]"#, "")
            .replace(r#"precision = ["int4"]"#, "")
            .replace("blocks = { least_error = false }", "")
            .replace("max_ir_version = 10", "")
            .replace("samples = 8", "samples = 8\n        dense = { enabled = false }");
        fs::write(here.join("recipe.toml"), text).expect("recipe");
        interlace(here, &["run", "recipe.toml"])
    };
    let output = run(r#""interlace", "shortgpt""#);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("auto: interlace: left out: cannot drop 7 of 16 layers"), "{said}");
    assert!(said.contains("auto: chose shortgpt"), "{said}");
    let output = run(r#""interlace""#);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("strategy `interlace`: cannot drop 7 of 16 layers"), "{said}");
}

/// A strategy that measures losses, `auto`, a searched rate and rows held back for the choice among rows: the test files are
/// opened for the first time when all of it is settled.
#[test]
fn test_files_are_opened_when_every_model_is_made() {
    let bench = fixture("data/bench-small.tsv");
    let run = recipe("[1e-4, 1e-3]").replace("\"angular\"", "\"sleb\"");
    let sweep = sweep_file("\"paper\", \"fast\"")
        .replace("samples = 4\n", "samples = 4\n        held_back = 0.25\n")
        .replace("\"consecutive\"", "\"sleb\"")
        .replace("[1, 2]", "[1]")
        .replace("[0.07, 0.13]", "[0.13]")
        .replace("= 1e-3", "= [1e-4, 1e-3]");
    let words = "[[eval.other]]\n        data = \"words.jsonl\"\n";
    let of_run = ["healed-interlace", "healed-sleb", "dense-finetuned", "held-back-sleb-finetuned"];
    let chosen = r#"strategies = ["auto"], auto = { candidates = ["interlace", "sleb"], step_tokens = 256 }"#;
    let auto = run.replace(r#"strategies = ["interlace", "sleb"]"#, chosen);
    assert!(auto.contains(chosen), "{auto}");
    let of_auto = ["held-back-auto-interlace", "held-back-auto-sleb", "healed-auto", "dense-finetuned"];
    // Two strategies, two recipes; the dense model finetuned beside either recipe, all its layers and two of them.
    let sweep = format!("{sweep}{words}");
    let cases = [("run", run, Vec::from(of_run)), ("run", auto, Vec::from(of_auto)), ("sweep", sweep, Vec::new())];
    for (verb, text, wanted) in cases {
        assert!(text.contains("held_back") && text.contains("sleb") && text.contains("[1e-4, 1e-3]"), "{text}");
        let folder = tempfile::tempdir().expect("folder");
        let here = folder.path();
        fs::write(here.join("recipe.toml"), text.replace(&bench, "bench.tsv")).expect("recipe");
        let (over, piped) =
            (Arc::new(AtomicBool::new(false)), ["bench.tsv", "words.jsonl"].map(|name| here.join(name)));
        let threads = piped.each_ref().map(|path| at_the_first_opening(path, &here.join("out"), &over));
        // What it reads of the first one ends the run.
        let output = interlace(here, &[verb, "recipe.toml"]);
        assert_eq!(output.status.code(), Some(2), "{verb}: {}", stderr(&output));
        over.store(true, Ordering::SeqCst);
        // A thread whose pipe nobody opened goes on.
        let _readers = piped.each_ref().map(|path| fs::OpenOptions::new().read(true).write(true).open(path));
        let opened = threads.map(|thread| thread.join().expect("the thread"));
        let [Some(steps), None] = &opened else { panic!("{verb}: {opened:?}, {}", stderr(&output)) };
        let count = |start: &str| steps.iter().filter(|step| step.starts_with(start)).count();
        let missing: Vec<_> = wanted.iter().filter(|name| !steps.iter().any(|step| step == *name)).collect();
        assert!(missing.is_empty(), "{verb}: {missing:?} are made later than the benchmark is opened, {steps:?}");
        if verb == "sweep" {
            assert_eq!((count("healed-"), count("dense-"), count("held-back-")), (4, 4, 9), "{steps:?}");
        }
        assert_eq!(count("eval-"), 0, "{steps:?}");
    }
}
