//! The command line: one file per verb. Results go to standard output, progress and messages to standard error.
//!
//! Exit codes: 0 done; 1 it ran, but a gate that the user set or a check did not hold; 2 an error.

mod args;
mod bench;
mod data_args;
mod eval;
mod export;
mod finetune;
mod generate;
mod inspect;
mod output;
mod plan;
mod prune;
mod run;
mod schema;
mod score;
mod shell;
mod strip;
mod sweep;
mod torch;
mod verify;

use std::io::Write;

use clap::{CommandFactory, Parser, Subcommand};

use crate::base::{Cancel, Error, install_ctrl_c, set_quiet};

pub use output::Output;
pub use schema::schemas;
pub use torch::{RunTorchVerb, TorchVerb, hand_over, here};

/// Prune, heal and ship vision-language models as ONNX graphs.
#[derive(Parser)]
#[command(name = "interlace", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "Start with `interlace inspect MODEL`, or run all steps with `interlace run recipe.toml`.\n\
    Exit codes: 0 done; 1 a check or a gate that you set did not hold; 2 an error.")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Print the result as JSON [default: text]
    #[arg(long, global = true, display_order = 1000)]
    json: bool,
    /// Print no progress
    #[arg(long, short, global = true, display_order = 1001)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Verb {
    Inspect(inspect::Args),
    Score(score::Args),
    Plan(plan::Args),
    Prune(prune::Args),
    Finetune(Box<finetune::Args>),
    Generate(generate::Args),
    Eval(eval::Args),
    Bench(bench::Args),
    Verify(verify::Args),
    Export(export::Args),
    Run(run::Args),
    Sweep(sweep::Args),
    Completions(shell::CompletionsArgs),
    Man(shell::ManArgs),
    #[command(hide = true)]
    PeakMemory(bench::MemoryArgs),
}

/// Input of every verb besides its arguments.
pub struct Context {
    /// Form of the printed results.
    pub output: Output,
    /// Set by Ctrl-C.
    pub cancel: Cancel,
}

/// How a verb ended that met no error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ran, and every gate and check held.
    Done,
    /// A check or a gate did not hold; the verb has printed which.
    GateFailed,
}

/// Parses the process's arguments, runs the verb, reports and ends the process; `torch` runs the verbs that compute in
/// LibTorch. Nothing else may run in the process yet.
pub fn main(torch: RunTorchVerb) -> ! {
    // SAFETY: both programs call this first, and have started no thread.
    unsafe { crate::runtime::keep_telemetry_off() };
    let code = match Cli::try_parse() {
        Ok(cli) => report(cli.json, dispatch(cli, torch)),
        // Help and version are no errors; clap prints both kinds where they belong.
        Err(error) if error.print().is_ok() && !error.use_stderr() => 0,
        Err(_) => 2,
    };
    end(code)
}

fn report(json: bool, result: anyhow::Result<Outcome>) -> i32 {
    match result {
        Ok(Outcome::Done) => 0,
        Ok(Outcome::GateFailed) => 1,
        Err(error) if output::is_closed_pipe(&error) => 0,
        Err(error) => {
            output::print_error(&error, json);
            2
        }
    }
}

/// Ends the process without the engines' own clearing up, which takes LibTorch close to a tenth of a second and frees what
/// the system frees anyway. Every file is complete by now.
fn end(code: i32) -> ! {
    // What cannot be printed any more is nobody's concern: the reader has gone.
    let _ = std::io::stdout().flush();
    let _ = std::io::stderr().flush();
    // SAFETY: ends the process, whatever its threads do.
    unsafe { libc::_exit(code) }
}

impl Verb {
    /// The verb's action when an engine failed.
    fn doing(&self) -> &'static str {
        match self {
            Verb::Inspect(_) => "looking at the model",
            Verb::Score(_) => "scoring layers",
            Verb::Plan(_) => "making a plan",
            Verb::Prune(_) => "dropping layers",
            Verb::Finetune(_) => "finetuning",
            Verb::Generate(_) => "answering",
            Verb::Eval(_) => "evaluating the model",
            Verb::Bench(_) | Verb::PeakMemory(_) => "measuring speed and memory",
            Verb::Verify(_) => "verifying the model",
            Verb::Export(_) => "exporting the model",
            Verb::Run(_) | Verb::Sweep(_) => "running the recipe",
            Verb::Completions(_) => "printing completions",
            Verb::Man(_) => "writing manual pages",
        }
    }
}

/// An engine's error with what was being done.
fn explained(error: anyhow::Error, doing: &'static str) -> anyhow::Error {
    match error.downcast_ref::<Error>() {
        Some(Error::Engine { .. }) => match error.downcast::<Error>() {
            Ok(error) => error.during(doing).into(),
            Err(error) => error,
        },
        _ => error,
    }
}

fn dispatch(cli: Cli, torch: RunTorchVerb) -> anyhow::Result<Outcome> {
    set_quiet(cli.quiet);
    let context = Context { output: Output { json: cli.json, quiet: cli.quiet }, cancel: install_ctrl_c()? };
    let doing = cli.verb.doing();
    run_verb(cli.verb, &context, torch).map_err(|error| explained(error, doing))
}

fn run_verb(verb: Verb, context: &Context, run_torch: RunTorchVerb) -> anyhow::Result<Outcome> {
    match verb {
        Verb::Inspect(args) => inspect::run(args, context),
        Verb::Score(args) if torch::among_others() => run_torch(TorchVerb::Score(Box::new(args)), context),
        Verb::Score(args) => score::run(args, context, None),
        Verb::Plan(args) => plan::run(args, context),
        Verb::Prune(args) => prune::run(args, context),
        Verb::Finetune(args) => run_torch(TorchVerb::Finetune(args), context),
        Verb::Generate(args) => generate::run(args, context),
        Verb::Eval(args) if torch::among_others() => run_torch(TorchVerb::Eval(Box::new(args)), context),
        Verb::Eval(args) => eval::run(args, context, None),
        Verb::Bench(args) => bench::run(args, context),
        Verb::Verify(args) => run_torch(TorchVerb::Verify(args), context),
        Verb::Export(args) => export::run(args, context),
        Verb::Run(args) => run_torch(TorchVerb::Run(args), context),
        Verb::Sweep(args) => run_torch(TorchVerb::Sweep(args), context),
        Verb::Completions(args) => shell::completions(args),
        Verb::Man(args) => shell::man(args, context),
        Verb::PeakMemory(args) => bench::run_memory(args, context),
    }
}

/// The help of every verb in Markdown, for docs/cli.md.
pub fn reference() -> String {
    let mut text = String::new();
    let mut command = Cli::command().term_width(100);
    command.build();
    for verb in command.get_subcommands_mut().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        let help = verb.render_long_help().to_string();
        let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
        text.push_str(&format!("\n## {}\n\n```text\n{}\n```\n", verb.get_name(), lines.join("\n").trim_end()));
    }
    text.push('\n');
    text
}

/// Name and first line of help of every verb, for tests and documents.
pub fn verbs() -> Vec<(String, String)> {
    let command = Cli::command();
    let visible = command.get_subcommands().filter(|verb| !verb.is_hide_set());
    visible
        .map(|verb| (verb.get_name().to_string(), verb.get_about().map(ToString::to_string).unwrap_or_default()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_helps_with_an_example_of_itself() {
        for verb in Cli::command().get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let help = verb.clone().render_long_help().to_string();
            assert!(help.contains(&format!("interlace {} ", verb.get_name())), "{}", verb.get_name());
            assert!(verb.get_about().is_some(), "{}", verb.get_name());
        }
    }
}
