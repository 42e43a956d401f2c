//! Finetuning as a process: killed without warning and taken up again.

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

/// Waits until so many steps are written down, or the run ends.
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

/// Killed twice at steps that differ from run to run, once perhaps while it writes a checkpoint.
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
        assert!(!here.join("healed").exists(), "killed at step {stop}, a result is there");
        if run.last() != Some(&"--resume") {
            run.push("--resume");
        }
    }
    succeed(&run);
    assert_eq!(fs::read_to_string(&metrics).expect("metrics").lines().count(), STEPS);
    assert!(weights(&here.join("healed")) == weights(&here.join("whole")), "killed at steps {first} and {second}");
    assert!(weights(&here.join("healed")) != weights(&here.join("pruned")));
}

/// A rate that breaks the network: the message names step, samples and weight, and the last good checkpoint stays.
#[test]
fn a_run_that_breaks_keeps_its_last_good_checkpoint() {
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
}
