//! The `interlace` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    interlace::cli::main()
}
