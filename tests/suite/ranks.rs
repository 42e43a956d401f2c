//! Finetuning with several processes: the losses of one process, one writer, and all processes end if one ends.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::cli::{fixture, interlace, stderr};

/// A pruned model and its plan in a temporary folder.
struct Pruned {
    folder: tempfile::TempDir,
}

impl Pruned {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        for arguments in [
            &["plan", &fixture("model"), "--drop", "3,9", "-o", "plan.json"][..],
            &["prune", &fixture("model"), "--plan", "plan.json", "-o", "pruned"],
        ] {
            let output = interlace(folder.path(), arguments);
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        }
        Pruned { folder }
    }

    fn here(&self) -> &Path {
        self.folder.path()
    }

    fn command(&self, recipe: &[&str], out: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_interlace-torch"));
        command.current_dir(self.here()).args(["finetune", "pruned", "--plan", "plan.json", "--data"]);
        command.arg(fixture("data/finetune-small.parquet")).args([
            "--teacher",
            &fixture("model"),
            "-o",
            out,
            "--quiet",
        ]);
        command.args(recipe).env("OMP_NUM_THREADS", "1");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts one process for each rank.
    fn start(&self, recipe: &[&str], out: &str, size: usize) -> Vec<Child> {
        start(size, &|| self.command(recipe, out))
    }

    fn losses(&self, out: &str) -> Vec<f64> {
        let text = fs::read_to_string(self.work(out).join("metrics.jsonl")).expect("metrics");
        let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["loss"].as_f64();
        text.lines().map(|text| line(text).expect("a loss")).collect()
    }

    fn work(&self, out: &str) -> PathBuf {
        self.here().join(format!("{out}.work"))
    }
}

/// Starts one process for each rank with the environment of torchrun.
pub fn start(size: usize, command: &dyn Fn() -> Command) -> Vec<Child> {
    start_each(size, &|_| command())
}

/// As [`start`], with a command for each rank.
fn start_each(size: usize, command: &dyn Fn(usize) -> Command) -> Vec<Child> {
    let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its number").port();
    let rank = |rank: usize| {
        let mut command = command(rank);
        command.env("WORLD_SIZE", size.to_string()).env("MASTER_ADDR", "127.0.0.1");
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("MASTER_PORT", port.to_string()).spawn().expect("a process")
    };
    (0..size).map(rank).collect()
}

pub fn ended(children: Vec<Child>) -> Vec<Output> {
    children.into_iter().map(|child| child.wait_with_output().expect("an end")).collect()
}

pub fn close(a: &[f64], b: &[f64]) {
    close_to(1e-6, a, b);
}

fn close_to(tolerance: f64, a: &[f64], b: &[f64]) {
    assert!(!a.is_empty() && a.len() == b.len(), "{a:?} and {b:?}");
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance * b.abs().max(1e-3), "step {step}: {a} and {b}");
    }
}

/// Every recipe at its own rate; `best` searches it.
#[test]
fn two_and_four_processes_give_the_losses_of_one() {
    let pruned = Pruned::new();
    for (name, recipe) in [
        ("paper", ["--recipe", "paper", "--max-steps", "10"]),
        ("best", ["--recipe", "best", "--max-steps", "10"]),
        ("fast", ["--recipe", "fast", "--max-steps", "10"]),
    ] {
        // Seven passes, whose sums have as many orders.
        let recipe = &[&recipe[..], &["--batch-tokens", "200"]].concat();
        let alone = pruned.command(recipe, name).output().expect("a process");
        assert!(alone.status.success(), "{}", stderr(&alone));
        for size in [2, 4] {
            let out = format!("{name}-{size}");
            for (rank, output) in ended(pruned.start(recipe, &out, size)).iter().enumerate() {
                assert!(output.status.success(), "rank {rank} of {size}: {}", stderr(output));
                assert!(rank == 0 || output.stdout.is_empty(), "rank {rank} prints results");
            }
            close_to(1e-12, &pruned.losses(&out), &pruned.losses(name));
            assert!(pruned.here().join(&out).join("interlace.json").is_file());
            let left = fs::read_dir(pruned.work(&out)).expect("the work folder").flatten();
            let left: Vec<_> = left.filter(|entry| entry.file_name().to_string_lossy().starts_with("rank-")).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

/// The first process decides how steps are cut into passes, also where another one's limits would cut them differently.
#[test]
fn processes_with_other_limits_cut_steps_as_the_first_one_does() {
    let pruned = Pruned::new();
    let recipe = ["--recipe", "paper", "--learning-rate", "1e-5", "--max-steps", "2"];
    let alone = pruned.command(&recipe, "alone").output().expect("a process");
    assert!(alone.status.success(), "{}", stderr(&alone));
    let children = start_each(2, &|rank| {
        let mut command = pruned.command(&recipe, "limited");
        command.args(["--batch-tokens", ["128", "4096"][rank]]);
        command
    });
    for (rank, output) in ended(children).iter().enumerate() {
        assert!(output.status.success(), "rank {rank}: {}", stderr(output));
    }
    close(&pruned.losses("limited"), &pruned.losses("alone"));
}

#[test]
fn a_killed_process_ends_the_others_and_the_run_resumes() {
    let pruned = Pruned::new();
    fs::write(pruned.here().join("often.toml"), "[schedule]\ncheckpoint_every = 2\n").expect("write");
    let recipe = ["--recipe", "paper", "--learning-rate", "1e-3", "--max-steps", "12", "--settings", "often.toml"];
    let whole = ended(pruned.start(&recipe, "whole", 2));
    assert!(whole.iter().all(|output| output.status.success()), "{}", stderr(&whole[0]));

    let mut children = pruned.start(&recipe, "killed", 2);
    let metrics = pruned.work("killed").join("metrics.jsonl");
    let begun = Instant::now();
    while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 5 {
        assert!(begun.elapsed() < Duration::from_secs(300), "no step was finished");
        assert!(children[0].try_wait().expect("a state").is_none(), "the run ended before it could be killed");
        std::thread::sleep(Duration::from_millis(2));
    }
    children[1].kill().expect("killed");
    let killed = Instant::now();
    for output in ended(children) {
        assert!(!output.status.success());
    }
    // Within seconds; the limit leaves room for a busy machine.
    assert!(killed.elapsed() < Duration::from_secs(60), "the other process ended after {:?}", killed.elapsed());
    assert!(!pruned.here().join("killed").exists());

    let again: Vec<&str> = recipe.iter().copied().chain(["--resume"]).collect();
    let resumed = ended(pruned.start(&again, "killed", 2));
    assert!(resumed.iter().all(|output| output.status.success()), "{}", stderr(&resumed[0]));
    close(&pruned.losses("killed"), &pruned.losses("whole"));
    let decoder =
        |out: &str| fs::read(pruned.here().join(out).join("onnx/decoder_model_merged.onnx_data")).expect("weights");
    assert!(decoder("killed") == decoder("whole"), "the resumed run has other weights");
}

/// Runs `interlace` with these arguments in `folder`, as one process or as this many processes. It delegates to the
/// program that links LibTorch. All processes must succeed, and only the first prints.
fn measure(folder: &Path, arguments: &[&str], out: &str, size: usize) -> serde_json::Value {
    let command = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_interlace"));
        command.current_dir(folder).args(arguments).args(["-o", out, "--quiet"]).env("OMP_NUM_THREADS", "1");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let outputs = match size {
        1 => vec![command().output().expect("a process")],
        _ => ended(start(size, &command)),
    };
    for (rank, output) in outputs.iter().enumerate() {
        assert!(output.status.success(), "rank {rank} of {size}: {}", stderr(output));
        assert_eq!(output.stdout.is_empty(), rank > 0, "rank {rank} of {size}");
    }
    serde_json::from_slice(&fs::read(folder.join(out)).expect("a report")).expect("JSON")
}

/// The report without its measured times.
fn untimed(mut report: serde_json::Value) -> serde_json::Value {
    for figures in ["/model", "/model/timing", "/baseline", "/baseline/timing"] {
        let Some(figures) = report.pointer_mut(figures).and_then(serde_json::Value::as_object_mut) else { continue };
        for key in ["seconds", "questions_per_second", "profile"] {
            figures.remove(key);
        }
    }
    report
}

#[test]
fn scores_and_reports_of_several_processes_equal_those_of_one() {
    let pruned = Pruned::new();
    let here = pruned.here();
    // An unreadable row in the second half is skipped and counted once.
    let talk = |number: usize| {
        format!(
            "\"conversations\": [{{\"from\": \"human\", \"value\": \"Say {number}\"}}, {{\"from\": \"gpt\", \"value\": \"{number}\"}}]}}"
        )
    };
    let row = |number: usize| match number {
        21 => format!("{{\"image\": \"none.png\", {}", talk(number)),
        _ => format!("{{{}", talk(number)),
    };
    fs::write(here.join("talk.jsonl"), (0..30).map(row).collect::<Vec<_>>().join("\n")).expect("write");
    let (model, data, bench) =
        (fixture("model"), fixture("data/finetune-small.parquet"), fixture("data/bench-small.tsv"));
    let eval = ["eval", "pruned", "--data", &bench, "--baseline", &model, "--limit", "20", "--batch-size", "1"];
    for (name, arguments) in [
        ("scores", &["score", &model, "--data", &data, "--turns", "separate", "--samples", "7"][..]),
        ("talk", &["score", &model, "--data", "talk.jsonl", "--fraction", "1"]),
        ("eval", &eval),
        ("likelihood", &["eval", "pruned", "--data", &bench, "--baseline", &model, "--likelihood-only"]),
        ("text", &["eval", "pruned", "--data", "talk.jsonl", "--baseline", &model]),
    ] {
        let alone = untimed(measure(here, arguments, &format!("{name}.json"), 1));
        for size in [2, 3] {
            let found = untimed(measure(here, arguments, &format!("{name}-{size}.json"), size));
            assert!(found == alone, "{name} of {size} processes: found {found}, one process gives {alone}");
        }
    }
}
