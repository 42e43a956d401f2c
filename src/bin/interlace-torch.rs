//! `interlace` with LibTorch in it. `interlace` starts it for the verbs that compute there; it takes the
//! same arguments.

use std::process::ExitCode;

fn main() -> ExitCode {
    interlace::cli::main(interlace::cli::here)
}
