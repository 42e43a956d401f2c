//! Ctrl-C ends a verb before its output has its name.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use interlace::base::{Cancel, Device, Error};
use interlace::bundle::{Bundle, ModelSource};
use interlace::eval::{BenchOptions, bench};
use interlace::export::{
    ExportSettings, PRECISIONS, PrecisionRequest, PrecisionSettings, export, export_variants, target_named,
    write_variants,
};
use interlace::runtime::Runtime;

use super::cli::{fixture, stderr};

/// A flag that is set.
fn stopped() -> Cancel {
    let cancel = Cancel::default();
    cancel.request();
    cancel
}

fn assert_interrupted<T: std::fmt::Debug>(result: Result<T, Error>, folder: &Path, what: &str) {
    let error = result.expect_err(what);
    assert!(matches!(error, Error::Interrupted { .. }), "{what}: {error}");
    let left: Vec<_> = std::fs::read_dir(folder).expect("folder").flatten().map(|entry| entry.file_name()).collect();
    assert!(left.is_empty(), "{what}: {left:?}");
}

#[test]
fn an_interrupted_export_leaves_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("out");
    let bundle = Bundle::open(Path::new(&fixture("model"))).expect("model");
    let target = target_named("transformers-js").expect("a target");
    let (settings, cancel) = (ExportSettings::default(), stopped());
    assert_interrupted(export(&bundle, target, &settings, &out, &cancel), folder.path(), "--to");
    for row in PRECISIONS.iter().filter(|row| !row.calibrated) {
        let precisions = [row];
        let request = PrecisionRequest {
            precisions: &precisions,
            settings: PrecisionSettings::default(),
            calibration: None,
            budget: None,
        };
        assert_interrupted(write_variants(&bundle, &request, &out, &cancel), folder.path(), row.name);
        let both = export_variants(&bundle, &request, target, &settings, &out, &cancel);
        assert_interrupted(both, folder.path(), row.name);
    }
}

#[test]
fn an_interrupted_measurement_gives_no_report() {
    let folder = tempfile::tempdir().expect("folder");
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let model = ModelSource::new(fixture("model"), None);
    let measured = bench(&model, None, &runtime, &BenchOptions::default(), None, &stopped());
    assert_interrupted(measured, folder.path(), "bench");
}

/// One round, which would take hours.
#[test]
fn ctrl_c_ends_bench_between_two_tokens() {
    let folder = tempfile::tempdir().expect("folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_interlace"));
    command.args(["bench", &fixture("model"), "--new-tokens", "1000000", "--rounds", "1", "-q", "-o", "bench.json"]);
    let child = command.current_dir(folder.path()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    std::thread::sleep(Duration::from_secs(5));
    let began = Instant::now();
    // SAFETY: the child runs until `wait_with_output`.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
    let output = child.wait_with_output().expect("the end");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("error: interrupted"), "{}", stderr(&output));
    assert!(began.elapsed() < Duration::from_secs(60));
    assert!(!folder.path().join("bench.json").exists());
}
