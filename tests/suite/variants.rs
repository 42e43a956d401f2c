//! `--variant`: verbs run the precision variants that the user names, and reports say which.

use std::fs;
use std::path::Path;

use interlace::ir::Tensor;
use interlace::onnx;
use serde_json::Value;

use super::cli::{interlace, stderr};

/// The shipped model in a folder, with a decoder `q4` whose logits are those of the other one with the sign changed.
pub fn model(folder: &Path) {
    model_with(folder, -1.0);
}

/// The same with logits that are a multiple of the other one's.
fn model_with(folder: &Path, factor: f64) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    for entry in fs::read_dir(&source).expect("folder").chain(fs::read_dir(source.join("onnx")).expect("folder")) {
        let path = entry.expect("entry").path();
        let target = folder.join("model").join(path.strip_prefix(&source).expect("inside"));
        fs::create_dir_all(target.parent().expect("folder")).expect("folder");
        if path.is_file() {
            fs::copy(&path, target).expect("copied");
        }
    }
    let onnx = folder.join("model/onnx");
    let mut model = onnx::load(&onnx.join("decoder_model_merged.onnx")).expect("graph");
    let head = model.graph.body.initializers.iter_mut().find(|(_, tensor)| tensor.dims == [160, 839]).expect("a head");
    let numbers: Vec<f32> =
        head.1.to_f64s().expect("floats").into_iter().map(|number| (factor * number) as f32).collect();
    head.1 = Tensor::from_f32(&[160, 839], &numbers);
    onnx::save(&model, &onnx.join("decoder_model_merged_q4.onnx"), &onnx::Storage::Inline).expect("saved");
}

fn run(folder: &Path, arguments: &[&str]) -> Value {
    let output = interlace(folder, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn each_verb_runs_the_variants_that_are_named_and_says_so() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    model(here);
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data");
    let bench = data.join("bench-small.tsv");
    let (bench, train) = (bench.to_str().expect("path"), data.join("finetune-small.parquet"));
    let train = train.to_str().expect("path");

    let arguments = ["--json", "eval", "model", "--data", bench, "--limit", "8", "--variant", "decoder=q4", "-q"];
    let report = run(here, &[&arguments[..], &["--baseline", "model", "-o", "eval.json"]].concat());
    assert_eq!(report["model"]["model"], "model (decoder=q4)");
    assert_eq!(report["variants"], serde_json::json!({ "model": "decoder=q4" }));
    assert!(report["baseline"]["score"].as_f64() > report["model"]["score"].as_f64(), "{report}");
    let swapped = ["--json", "eval", "model", "--data", bench, "--limit", "8", "--baseline", "model", "-q"];
    let report = run(here, &[&swapped[..], &["--baseline-variant", "decoder=q4", "-o", "eval.json"]].concat());
    assert_eq!(report["variants"], serde_json::json!({ "baseline": "decoder=q4" }));
    assert!(report["baseline"]["score"].as_f64() < report["model"]["score"].as_f64(), "{report}");

    let ask = ["--json", "generate", "model", "--prompt", "what is it", "--max-tokens", "3", "-q"];
    let (full, q4) = (run(here, &ask), run(here, &[&ask[..], &["--variant", "decoder=q4"]].concat()));
    assert_eq!(q4["answers"][0]["model"], "model (decoder=q4)");
    assert_ne!(full["answers"][0]["answer"], q4["answers"][0]["answer"]);
    let named = run(here, &[&ask[..], &["--variant", "fp32"]].concat());
    assert_eq!(full["answers"][0]["answer"], named["answers"][0]["answer"]);

    let times = ["--json", "bench", "model", "--rounds", "1", "--prompt-tokens", "8", "--new-tokens", "2", "-q"];
    let report = run(here, &[&times[..], &["--variant", "decoder=q4", "-o", "bench.json"]].concat());
    assert_eq!(
        (&report["model"]["model"], &report["variants"]["model"]),
        (&"model (decoder=q4)".into(), &"decoder=q4".into())
    );
    let score = ["--json", "score", "model", "--data", train, "--samples", "2", "-o", "scores.json", "-q"];
    let report = run(here, &[&score[..], &["--variant", "decoder=q4"]].concat());
    assert_eq!(report["variants"]["model"], "decoder=q4");
    let report = run(here, &["--json", "verify", "model", "--variant", "decoder=q4", "-q"]);
    assert_eq!(report["variants"]["model"], "decoder=q4");
    assert_eq!(report["model"], "model (decoder=q4)");

    let export = ["--json", "export", "model", "--to", "transformers-js", "-o", "out", "-q"];
    let report = run(here, &[&export[..], &["--variant", "decoder=q4"]].concat());
    assert_eq!(report["models"]["decoder_model_merged.onnx"]["source"], "onnx/decoder_model_merged_q4.onnx");
    assert_eq!(report["models"]["embed_tokens.onnx"]["source"], "onnx/embed_tokens.onnx");
}

#[test]
fn variants_that_are_not_there_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    model(here);
    for (variant, wanted) in [
        ("q4", &["variant `q4` of `onnx/vision_encoder`", "vision_encoder=q4"][..]),
        ("decoder=int8", &["variant `int8`", "decoder_model_merged_q4.onnx"]),
        ("projector=q4", &["has no projector component"]),
        ("decoder=q5", &["`q5` is none of fp32"]),
        ("head=q4", &["`head` is none of vision_encoder"]),
    ] {
        let output = interlace(here, &["verify", "model", "--variant", variant]);
        assert_eq!(output.status.code(), Some(2), "{variant}");
        for part in wanted {
            assert!(stderr(&output).contains(part), "{variant}: {}", stderr(&output));
        }
    }
}

fn files(folder: &Path) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(folder)
        .expect("folder")
        .map(|entry| entry.expect("entry").file_name().into_string().unwrap())
        .collect();
    found.sort();
    found
}

/// As from the hub, of which nothing else is downloaded.
#[test]
fn verbs_that_write_a_model_write_the_variants_that_are_named_alone() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    model(here);
    let named = ["--variant", "decoder=q4"];
    let of_decoder = |found: &Value| -> Vec<String> {
        let components = found["components"].as_array().expect("components").iter();
        let decoders = components.filter(|part| part["role"] == "decoder");
        decoders.map(|part| part["file"].as_str().expect("a file").to_string()).collect()
    };
    let (full, q4) = ("onnx/decoder_model_merged.onnx", "onnx/decoder_model_merged_q4.onnx");
    let others = serde_json::json!([full, format!("{full}_data")]);
    assert_eq!(of_decoder(&run(here, &["--json", "inspect", "model"])), [full, q4]);
    let inspected = run(here, &[&["--json", "inspect", "model"][..], &named].concat());
    assert_eq!((of_decoder(&inspected), &inspected["variants"]["model"]), (vec![q4.to_string()], &"decoder=q4".into()));

    let plan = ["--json", "plan", "model", "--drop", "2,5", "-o", "plan.json"];
    assert_eq!(run(here, &[&plan[..], &named].concat())["variants"]["model"], "decoder=q4");
    // The plan is of the folder, whatever is written of it.
    let prune = ["--json", "prune", "model", "--plan", "plan.json"];
    let all = run(here, &[&prune[..], &["-o", "all"]].concat());
    assert_eq!((all["components"].as_array().map(Vec::len), &all["left_out"]), (Some(2), &Value::Null));
    let one = run(here, &[&prune[..], &named, &["-o", "one"]].concat());
    assert_eq!((&one["components"][0]["file"], &one["left_out"]), (&q4.into(), &others));
    let pruned = [q4.trim_start_matches("onnx/"), "embed_tokens.onnx", "vision_encoder.onnx"];
    let mut found = files(&here.join("one/onnx"));
    found.retain(|file| file.ends_with(".onnx") || file.contains("decoder"));
    assert_eq!(found, pruned);
    let record: Value =
        serde_json::from_slice(&fs::read(here.join("one/interlace.json")).expect("record")).expect("JSON");
    assert_eq!((&record["variants"]["model"], &record["left_out"]), (&"decoder=q4".into(), &others));
    assert_eq!(run(here, &["--json", "inspect", "one"])["num_layers"], 14);

    // Training one variant would leave another as it was, so it needs to be the only one that is written.
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data/finetune-small.parquet");
    let finetune = ["finetune", "model", "--layers", "3", "--data", data.to_str().expect("path"), "-o", "out"];
    let finetune = [&finetune[..], &["--recipe", "paper", "--max-steps", "1", "-q"]].concat();
    let output = interlace(here, &finetune);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("would keep their old weights"), "{}", stderr(&output));
    let output = interlace(here, &[&finetune[..], &named].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let mut found = files(&here.join("out/onnx"));
    found.retain(|file| file.ends_with(".onnx") || file.contains("decoder"));
    assert_eq!(found, pruned);
}

/// A JSON file.
fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("artifact")).expect("JSON")
}

/// A recipe or a sweep of the model in the folder, with its variant.
fn settings(kind: &str) -> String {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data");
    let (train, bench) = (data.join("finetune-small.parquet"), data.join("bench-small.tsv"));
    let own = match kind {
        "run" => "plan = { drop_count = 2, strategies = [\"shortgpt\"] }\nbench = { enabled = false }",
        _ => "drop_ratios = [0.13]\nstrategies = [\"shortgpt\"]\nseeds = [1]\nkeep_models = true",
    };
    let recipes = if kind == "run" { "recipe = \"paper\"" } else { "recipes = [\"paper\"]" };
    format!(
        r#"
        model = "model"
        variant = "decoder=q4"
        output = "out"
        {own}
        [calibration]
        data = "{train}"
        samples = 2
        turns = "separate"
        [finetune]
        data = "{train}"
        samples = 2
        turns = "separate"
        {recipes}
        dense = {{ enabled = false }}
        [eval]
        benchmarks = ["{bench}"]
        settings = {{ limit = 4 }}
        "#,
        train = train.display(),
        bench = bench.display()
    )
}

/// `run` and `sweep` read the variants from their file or from the command line, work on nothing else, and write them into every
/// report. Their folder does not mix steps of different variants.
#[test]
fn runs_and_sweeps_work_on_the_variants_that_are_named() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    // With the same answers, of which a part is right.
    model_with(here, 0.5);
    let named = serde_json::json!({ "model": "decoder=q4" });
    let q4 = "decoder_model_merged_q4.onnx";
    for (verb, table, healed) in [("run", "table.json", "healed-shortgpt"), ("sweep", "sweep.json", "healed-")] {
        fs::write(here.join("file.toml"), settings(verb)).expect("settings");
        let out = here.join(format!("out-{verb}"));
        let own = out.to_str().expect("path");
        let found = run(here, &["--json", verb, "file.toml", "-o", own, "-q"]);
        assert_eq!(found["variants"], named, "{verb}");
        let eval = read(&out.join("eval-bench-small-dense.json"));
        assert_eq!((&eval["variants"], &eval["model"]["model"]), (&named, &"model (decoder=q4)".into()), "{verb}");
        for file in [table, "scores.json"] {
            assert_eq!(read(&out.join(file))["variants"], named, "{verb}: {file}");
        }
        let models: Vec<String> = files(&out).into_iter().filter(|name| name.starts_with(healed)).collect();
        let graphs = files(&out.join(models.first().expect("a healed model")).join("onnx"));
        let decoders: Vec<&String> = graphs.iter().filter(|name| name.contains("decoder")).collect();
        assert_eq!(decoders, [q4], "{verb}");

        // A digest of the folder is the same for both variants.
        let other = interlace(here, &[verb, "file.toml", "-o", own, "--variant", "decoder=fp32"]);
        assert_eq!(other.status.code(), Some(0), "{}", stderr(&other));
        assert!(!stderr(&other).contains("score: kept from before"), "{}", stderr(&other));
        assert_eq!(read(&out.join(table))["variants"]["model"], "decoder=fp32");
        for (variant, wanted) in [("decoder=int8", q4), ("q5", "`q5` is none of fp32")] {
            let output = interlace(here, &[verb, "file.toml", "-o", "none", "--variant", variant]);
            assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
            assert!(stderr(&output).contains(wanted) && !here.join("none").exists(), "{}", stderr(&output));
        }
        let page = interlace(here, &["report", own, "-o", "page.html"]);
        assert_eq!(page.status.code(), Some(0), "{}", stderr(&page));
        let page = fs::read_to_string(here.join("page.html")).expect("a page");
        assert!(page.contains("model (decoder=fp32)"), "{verb}");
    }
    let rows = read(&here.join("out-run/table.json"))["rows"].clone();
    let size = |files: &[&str]| -> u64 {
        files.iter().map(|file| fs::metadata(here.join("model/onnx").join(file)).expect("a file").len()).sum()
    };
    let whole =
        ["decoder_model_merged.onnx", "decoder_model_merged.onnx_data", "embed_tokens.onnx", "vision_encoder.onnx"];
    assert_eq!(rows[0]["size_bytes"], size(&whole));
}

/// `tune` searches, makes and measures the variant that is named, and its work folder is of that one alone.
#[test]
fn a_tuning_works_on_the_variants_that_are_named() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    model(here);
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data/finetune-small.parquet");
    let data = data.to_str().expect("path");
    let tune = ["tune", "model", "--data", data, "--turns", "separate", "--samples", "4", "--held-back", "0.5"];
    let tune = [&tune[..], &["--rounds", "1", "--new-tokens", "2", "--candidates", "1", "--size", "17MB"]].concat();
    let (named, work) = (["--variant", "decoder=q4"], ["--work", "work"]);
    let found = run(here, &[&["--json", "-q"][..], &tune, &named, &work, &["-o", "out"]].concat());
    assert_eq!(found["variants"]["model"], "decoder=q4");
    for file in ["quality.json", "costs.json", "tune.json", "scores.json"] {
        assert_eq!(read(&here.join("work").join(file))["variants"]["model"], "decoder=q4", "{file}");
    }
    assert_eq!(read(&here.join("out/interlace.json"))["variants"]["model"], "decoder=q4");
    let graphs = files(&here.join("out/onnx"));
    let decoders: Vec<&String> = graphs.iter().filter(|name| name.contains("decoder")).collect();
    assert_eq!(decoders, ["decoder_model_merged_q4.onnx"]);

    let again = interlace(here, &[&tune[..], &work, &["--replan"]].concat());
    assert_eq!(again.status.code(), Some(2), "{}", stderr(&again));
    let wanted = "holds measurements with `--variant decoder=q4`, not with no `--variant`";
    assert!(stderr(&again).contains(wanted), "{}", stderr(&again));
    assert_eq!(interlace(here, &[&tune[..], &named, &work, &["--replan"]].concat()).status.code(), Some(0));
    let unknown = interlace(here, &[&tune[..], &["--variant", "decoder=int8", "-o", "none"]].concat());
    assert_eq!(unknown.status.code(), Some(2), "{}", stderr(&unknown));
    assert!(stderr(&unknown).contains("decoder_model_merged_q4.onnx"), "{}", stderr(&unknown));
}

/// Models beside MODEL have a flag of their own, and verbs that change graphs change the named ones.
#[test]
fn every_model_of_a_verb_can_be_told_its_variant() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    model(here);
    let ask =
        ["--json", "generate", "model", "--prompt", "what is it", "--max-tokens", "3", "-q", "--compare", "model"];
    let found = run(here, &[&ask[..], &["--compare-variant", "decoder=q4"]].concat());
    let answers = found["answers"].as_array().expect("answers");
    assert_eq!((&answers[0]["model"], &answers[1]["model"]), (&"model".into(), &"model (decoder=q4)".into()));
    assert_ne!(answers[0]["answer"], answers[1]["answer"]);

    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data/finetune-small.parquet");
    let data = data.to_str().expect("path");
    let finetune = ["--json", "finetune", "model", "--variant", "decoder=fp32", "--layers", "3", "--data", data];
    let more =
        ["--recipe", "best", "--max-steps", "1", "--samples", "2", "--learning-rate", "1e-3", "-q", "-o", "healed"];
    let teacher = ["--teacher", "model", "--teacher-variant", "decoder=q4"];
    let report = run(here, &[&finetune[..], &more, &teacher].concat());
    assert_eq!(report["variants"], serde_json::json!({ "model": "decoder=fp32", "teacher": "decoder=q4" }));
    assert_eq!(read(&here.join("healed/interlace.json"))["variants"], report["variants"]);

    // Precisions are written of the graphs that are named, and so is a smaller head.
    let named = ["--variant", "fp32"];
    let refused = interlace(here, &["export", "model", "--precision", "int4", "-o", "four"]);
    assert!(stderr(&refused).contains("is there already, in precision `int4`"), "{}", stderr(&refused));
    let export = ["--json", "export", "model", "--precision", "int4", "--rounding", "nearest", "-q"];
    let report = run(here, &[&export[..], &named, &["-o", "four"]].concat());
    assert_eq!(report["variants"]["model"], "fp32");
    assert!(here.join("four/onnx/decoder_model_merged_q4.onnx").is_file());
    let report = run(here, &[&export[..], &named, &["--to", "openvino", "-o", "vino"]].concat());
    assert!(report["models"]["onnx/decoder_model_merged_q4.onnx"].is_object(), "{report}");
    let cut = ["--json", "export", "model", "--vocabulary", data, "-q"];
    let refused = interlace(here, &[&cut[..], &["-o", "cut"]].concat());
    assert!(stderr(&refused).contains("`--variant fp32`"), "{}", stderr(&refused));
    let report = run(here, &[&cut[..], &named, &["-o", "cut"]].concat());
    assert_eq!(report["variants"]["model"], "fp32");

    let inputs = here.join("model/onnx/nothing.npz");
    let inputs = inputs.to_str().expect("path");
    let output =
        interlace(here, &["verify", "model/onnx/decoder_model_merged.onnx", "--variant", "q4", "--inputs", inputs]);
    assert!(stderr(&output).contains("variant `q4`"), "{}", stderr(&output));
}
