//! The `interlace` command: every verb but those that compute in LibTorch, which it hands over to
//! `interlace-torch`.

use std::process::ExitCode;

fn main() -> ExitCode {
    interlace::cli::main(interlace::cli::hand_over)
}
