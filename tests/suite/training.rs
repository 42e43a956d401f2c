//! Finetuning as a process that is killed and resumed.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use super::cli::{interlace, stderr};

const STEPS: usize = 12;

fn fixture(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path).display().to_string()
}

fn arguments<'a>(output: &'a str, data: &'a str, steps: &'a str) -> Vec<&'a str> {
    let mut all = vec!["finetune", "pruned", "--plan", "plan.json", "--data", data, "-o", output, "--quiet"];
    all.extend(["--turns", "separate", "--recipe", "paper", "--settings", "settings.toml", "--max-steps", steps]);
    all
}

fn start(folder: &Path, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_interlace"));
    command.args(arguments).current_dir(folder).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("the binary starts")
}

/// Waits until this many steps are logged, or the run ends.
fn wait_for_steps(metrics: &Path, steps: usize, child: &mut Child) -> usize {
    let began = Instant::now();
    loop {
        let done = fs::read_to_string(metrics).map_or(0, |text| text.lines().count());
        if done >= steps || child.try_wait().expect("a child").is_some() {
            return done;
        }
        assert!(began.elapsed() < Duration::from_secs(600), "{done} of {steps} steps in ten minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn weights(folder: &Path) -> Vec<Vec<u8>> {
    ["decoder_model_merged.onnx", "decoder_model_merged.onnx_data"]
        .map(|name| fs::read(folder.join("onnx").join(name)).expect(name))
        .to_vec()
}

/// Killed twice, at steps that vary from run to run, perhaps while it writes a checkpoint.
#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = fixture("model");
    let data = fixture("data/finetune-small.parquet");
    let succeed = |arguments: &[&str]| {
        let output = interlace(here, arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    };
    succeed(&["plan", &model, "--drop", "2,9", "-o", "plan.json"]);
    succeed(&["prune", &model, "--plan", "plan.json", "-o", "pruned"]);
    let settings = "[optimizer]\nlearning_rate = 1e-3\n[batch]\nsize = 4\naccumulation_steps = 1\n[schedule]\nepochs = 9\n\
                    checkpoint_every = 1\n";
    fs::write(here.join("settings.toml"), settings).expect("settings");
    let steps = STEPS.to_string();
    succeed(&arguments("whole", &data, &steps));

    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock").subsec_nanos() as usize;
    let first = 1 + now % 5;
    let second = first + 1 + now / 5 % 5;
    let metrics = here.join("healed.work/metrics.jsonl");
    let mut run = arguments("healed", &data, &steps);
    for stop in [first, second] {
        let mut child = start(here, &run);
        let done = wait_for_steps(&metrics, stop, &mut child);
        child.kill().expect("kill");
        let status = child.wait().expect("wait");
        assert!(!status.success() && done < STEPS, "the run ended before it was killed at step {stop}");
        assert!(!here.join("healed").exists(), "killed at step {stop}, but a result exists");
        if run.last() != Some(&"--resume") {
            run.push("--resume");
        }
    }
    succeed(&run);
    assert_eq!(fs::read_to_string(&metrics).expect("metrics").lines().count(), STEPS);
    assert!(weights(&here.join("healed")) == weights(&here.join("whole")), "killed at steps {first} and {second}");
    assert!(weights(&here.join("healed")) != weights(&here.join("pruned")));
}

/// With a rate that makes the network diverge, the message names step, samples and weight, and the last good checkpoint
/// is kept.
#[test]
fn a_diverging_run_keeps_its_last_good_checkpoint() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = fixture("model");
    let data = fixture("data/finetune-small.parquet");
    for arguments in [
        ["plan", model.as_str(), "--drop", "2,9", "-o", "plan.json"],
        ["prune", model.as_str(), "--plan", "plan.json", "-o", "pruned"],
    ] {
        let output = interlace(here, &arguments);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }
    let settings = "[optimizer]\nlearning_rate = 1e30\nmax_grad_norm = 0.0\n[schedule]\nkind = \"constant\"\nwarmup_ratio = 0.0\n\
                    checkpoint_every = 1\n[batch]\nsize = 4\naccumulation_steps = 1\n";
    fs::write(here.join("settings.toml"), settings).expect("settings");
    let output = interlace(here, &arguments("healed", &data, "5"));
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("finetune step 2") && message.contains("samples"), "{message}");
    assert!(message.contains("gradient of `"), "{message}");
    let checkpoints: Vec<String> = fs::read_dir(here.join("healed.work/checkpoints"))
        .expect("checkpoints")
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(checkpoints, ["step-00000001"]);
    assert!(!here.join("healed").exists());

    // The only step leaves infinite weights, although its own loss and gradients are finite.
    fs::write(here.join("settings.toml"), settings.replace("1e30", "3e38\nweight_decay = 10.0")).expect("settings");
    let output = interlace(here, &arguments("one", &data, "1"));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("is not finite after the last step"), "{}", stderr(&output));
    assert!(!here.join("one").exists());
}

/// Layers named by index train as with a plan that names them. An unpruned model trains too, with the losses that apply
/// to it.
#[test]
fn layers_named_by_index_train_without_a_plan() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = fixture("model");
    let data = fixture("data/finetune-small.parquet");
    let run = |arguments: &[&str]| interlace(here, arguments);
    let succeed = |arguments: &[&str]| {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    };
    succeed(&["plan", &model, "--drop", "2,9", "-o", "plan.json"]);
    succeed(&["prune", &model, "--plan", "plan.json", "-o", "pruned"]);
    let plan: serde_json::Value =
        serde_json::from_slice(&fs::read(here.join("plan.json")).expect("plan")).expect("JSON");
    let named = plan["finetune_pruned"].as_array().expect("layers");
    let named: Vec<String> = named.iter().map(ToString::to_string).collect();
    let named = named.join(",");
    let common =
        ["--data", &data, "--samples", "4", "--batch-size", "4", "--max-steps", "2", "--learning-rate", "1e-3"];
    let finetune = |from: &str, more: &[&str], out: &str| {
        let mut all = vec!["finetune", from, "-o", out, "--quiet"];
        all.extend(common);
        all.extend(more);
        run(&all)
    };
    let done = |output: std::process::Output| assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    // `best` matches the answers of the dense model. Layers are matched by the record in the model folder.
    let best = ["--recipe", "best", "--teacher", &model, "--accumulation-steps", "1"];
    done(finetune("pruned", &[&["--plan", "plan.json"][..], &best].concat(), "by-plan"));
    done(finetune("pruned", &[&["--layers", &named][..], &best].concat(), "by-layers"));
    assert!(weights(&here.join("by-plan")) == weights(&here.join("by-layers")));

    let planned = finetune(&model, &["--layers", "all", "--recipe", "paper", "--dry-run", "--json"], "whole");
    let plan: serde_json::Value = serde_json::from_slice(&planned.stdout).expect("a plan");
    assert_eq!((plan["trained"].as_array().map(Vec::len), plan["frozen_before"].as_u64()), (Some(16), Some(0)));
    assert!(!here.join("whole").exists());
    done(finetune(&model, &["--layers", "all", "--recipe", "paper"], "whole"));
    done(finetune(&model, &[&["--layers", "3,9"][..], &best].concat(), "partly"));
    let record = |out: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(here.join(out).join("interlace.json")).expect("record")).expect("JSON")
    };
    assert_eq!(record("whole")["history"][0]["layers"].as_array().map(Vec::len), Some(16));
    assert_eq!(record("partly")["history"][0]["layers"], serde_json::json!([3, 9]));
    // Nothing was dropped, so nothing is fitted, and the report says so.
    assert_eq!(record("partly")["history"][0]["settings"]["fit"]["enabled"], false);
    assert_eq!(record("whole")["inputs"]["plan"], serde_json::Value::Null);
    succeed(&["verify", "whole"]);

    for (from, more, want) in [
        (model.as_str(), &["--layers", "all", "--recipe", "fast", "--teacher", &model][..], "lost no layer"),
        (&model, &["--layers", "2,16", "--recipe", "paper"], "layer 16"),
        (&model, &["--layers", "2,2", "--recipe", "paper"], "is named twice"),
        (&model, &["--layers", "all", "--recipe", "best"], "needs the dense model as teacher"),
        (&model, &["--plan", "plan.json", "--recipe", "paper"], "was not pruned by interlace"),
        (&model, &["--layers", "most", "--recipe", "paper"], "or `all`"),
        (&model, &["--recipe", "paper"], "--plan"),
        (&model, &["--layers", "all", "--recipe", "paper", "--train-head"], "ties the head to the embeddings"),
        (&model, &["--plan", "plan.json", "--layers", "all", "--recipe", "paper"], "cannot be used with"),
    ] {
        let output = finetune(from, more, "refused");
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{more:?}: {message}");
        assert!(message.contains(want), "{more:?}: {message}");
        assert!(!here.join("refused").exists() && !here.join("refused.work").exists(), "{more:?}");
    }
}

/// A token budget takes the first drawn samples that reach it, and no more.
#[test]
fn a_token_budget_takes_the_first_samples_of_the_draw() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = fixture("model");
    let data = fixture("data/finetune-small.parquet");
    let report = |budget: &str, out: &str| -> serde_json::Value {
        fs::write(here.join("settings.toml"), budget).expect("settings");
        let all = ["finetune", &model, "--layers", "9", "--data", &data, "--turns", "separate", "--recipe", "paper"];
        let more = ["--settings", "settings.toml", "--max-steps", "1", "-o", out, "--quiet"];
        let output = interlace(here, &[&all[..], &more].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        serde_json::from_slice(&fs::read(here.join(format!("{out}.work/finetune.json"))).expect("report"))
            .expect("JSON")
    };
    let whole = report("", "whole");
    let count = |report: &serde_json::Value| report["samples"].as_u64().expect("samples");
    let one = report("data.step_tokens = 1", "one");
    assert_eq!(count(&one), 1);
    let ids = |report: &serde_json::Value| report["sample_ids"].as_array().expect("ids").clone();
    let some = report("data.step_tokens = 500", "some");
    assert!(count(&some) > 1 && count(&some) < count(&whole), "{} of {}", count(&some), count(&whole));
    assert!(ids(&some).contains(&ids(&one)[0]) && ids(&some).iter().all(|id| ids(&whole).contains(id)));
    // The samples of this set have similar lengths, so a smaller budget takes fewer of the same samples.
    let fewer = report("data.step_tokens = 400", "fewer");
    assert!(count(&fewer) < count(&some) && ids(&fewer).iter().all(|id| ids(&some).contains(id)));
    assert_eq!(count(&report("data.step_tokens = 1000000000", "all")), count(&whole));

    // Held-back samples are never trained on, and `eval` reads only them.
    let run = |arguments: &[&str]| {
        let output = interlace(here, arguments);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    };
    let finetune = ["finetune", &model, "--layers", "9", "--data", &data, "--turns", "separate", "--recipe", "paper"];
    run(&[&finetune[..], &["--max-steps", "1", "-o", "rest", "--quiet", "--held-back", "0.4"]].concat());
    let text = fs::read(here.join("rest.work/finetune.json")).expect("report");
    let rest: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    run(&["eval", &model, "--data", &data, "--held-back", "0.4", "-o", "apart.json", "--quiet"]);
    run(&["eval", &model, "--data", &data, "-o", "all.json", "--quiet"]);
    let sequences = |name: &str| {
        let report: serde_json::Value = serde_json::from_slice(&fs::read(here.join(name)).expect(name)).expect("JSON");
        report["model"]["sequences"].as_array().expect("sequences").len()
    };
    // `eval` reads a conversation as one sample. All turns of a row are on one side.
    assert!(count(&rest) > 0 && count(&rest) < count(&whole));
    assert!(sequences("apart.json") > 0 && sequences("apart.json") < sequences("all.json"));
}

/// Numbers that no run can have are refused by their names, and a fit of one sample says what it lacks, once.
#[test]
fn wrong_sizes_are_refused_and_a_fit_without_a_held_out_sample_says_so() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = fixture("model");
    let run = |arguments: &[&str], code: i32| {
        let output = interlace(here, arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", stderr(&output));
        stderr(&output)
    };
    run(&["plan", &model, "--drop", "2,9", "-o", "plan.json"], 0);
    run(&["prune", &model, "--plan", "plan.json", "-o", "pruned"], 0);
    let finetune = |more: &[&str], code: i32| {
        let data = fixture("data/finetune-small.parquet");
        let all = ["finetune", "pruned", "--plan", "plan.json", "--data", &data, "--teacher", &model];
        run(&[&all[..], more].concat(), code)
    };
    let settings = "[batch]\nsize = 2147483648\naccumulation_steps = 2147483648\n[data]\ngroup_by_length = true\n";
    fs::write(here.join("large.toml"), settings).expect("settings");
    let error = finetune(&["--settings", "large.toml", "-o", "out"], 2);
    assert!(error.contains("`batch.size`: is 2147483648, must be at most 1048576"), "{error}");
    let error = finetune(&["--batch-tokens", "9223372036854775808", "--dry-run", "-o", "out"], 2);
    assert!(error.contains("--batch-tokens") && error.contains("16777216"), "{error}");
    for (recipe, out) in [("fast", "fast-out"), ("best", "best-out")] {
        let said = finetune(
            &["--recipe", recipe, "--samples", "1", "--max-steps", "2", "--learning-rate", "1e-4", "-o", out],
            0,
        );
        assert_eq!(said.matches("the fit has a single sample and holds none out").count(), 1, "{recipe}: {said}");
    }
}
