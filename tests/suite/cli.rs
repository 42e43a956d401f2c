//! The command line's contract: verbs, exit codes, one clear message, nothing half-written.

use std::path::Path;
use std::process::{Command, Output};

/// Runs the command in a folder.
pub fn interlace(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_interlace"))
        .args(arguments)
        .current_dir(folder)
        .env_remove("NO_COLOR")
        .output()
        .expect("the binary starts")
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn help_and_version_go_to_standard_output_with_status_0() {
    let folder = tempfile::tempdir().expect("folder");
    for arguments in [&["--help"][..], &["--version"], &["help"], &["plan", "--help"]] {
        let output = interlace(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(stdout(&output).contains("interlace"), "{arguments:?}");
        assert!(output.stderr.is_empty(), "{arguments:?}: {}", stderr(&output));
    }
}

#[test]
fn usage_errors_exit_with_2_and_say_what_is_wrong() {
    let folder = tempfile::tempdir().expect("folder");
    for (arguments, want) in [
        (&[][..], "Usage"),
        (&["polish"], "polish"),
        (&["plan"], "required"),
        (&["plan", "model", "-o", "p.json", "--drop-ratio", "0.25", "--drop-count", "4"], "cannot be used with"),
        (&["plan", "model", "-o", "p.json", "--drop", "2,x"], "`x` is no layer index"),
    ] {
        let output = interlace(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains(want), "{arguments:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}
