//! `interlace completions` and `interlace man`: shell completions and manual pages, generated from clap's definitions.

use std::io::Write;
use std::path::PathBuf;

use clap::Command;

use crate::base::Error;

use super::context::{Context, Outcome};

/// Print the completions of a shell
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace completions bash > ~/.local/share/bash-completion/completions/interlace")]
pub struct CompletionsArgs {
    /// Shell that reads them
    shell: clap_complete::Shell,
}

pub fn completions(args: CompletionsArgs, mut command: Command) -> anyhow::Result<Outcome> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "interlace", &mut text);
    std::io::stdout().lock().write_all(&text)?;
    Ok(Outcome::Done)
}

/// Write the manual pages, one per verb
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace man --output ~/.local/share/man/man1 && man interlace-prune")]
pub struct ManArgs {
    /// Existing folder for the pages; pages of the same names are replaced
    #[arg(long, short, value_name = "FOLDER")]
    output: PathBuf,
}

pub fn man(args: ManArgs, command: Command, context: &Context) -> anyhow::Result<Outcome> {
    if !args.output.is_dir() {
        let problem = "is not a folder, and the pages are written into one";
        return Err(Error::invalid(format!("`{}`", args.output.display()), problem)
            .remedy("make it first, for instance with `mkdir -p`")
            .into());
    }
    clap_mangen::generate_to(command, &args.output).map_err(|e| Error::io("write into", &args.output, e))?;
    context.output.note(format!("manual pages are in `{}`", args.output.display()));
    Ok(Outcome::Done)
}
