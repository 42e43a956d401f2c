//! The command line: one file per verb. Results are printed on standard output, progress and
//! messages on standard error.
//!
//! Exit codes: 0: success. 1: the verb ran, but a gate of the user or a check failed. 2: an error.

mod args;
mod bench;
mod context;
mod data_args;
mod eval;
mod export;
mod finetune;
mod generate;
mod graft;
mod inspect;
mod output;
mod plan;
mod precision;
mod prune;
mod ranks;
mod refused;
mod report;
mod run;
mod schema;
mod score;
mod shell;
mod strip;
mod sweep;
mod torch;
mod tune;
mod verify;

use std::any::TypeId;
use std::io::Write;
use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::base::{Error, install_ctrl_c, on_runaway, set_quiet};

pub use context::{Context, Outcome};
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
    Graft(graft::Args),
    Run(run::Args),
    Sweep(sweep::Args),
    Tune(Box<tune::Args>),
    Report(report::Args),
    Completions(shell::CompletionsArgs),
    Man(shell::ManArgs),
    #[command(hide = true)]
    PeakMemory(bench::MemoryArgs),
}

/// Parses the process's arguments, runs the verb, reports the result and ends the process. `torch` runs the verbs that
/// compute in LibTorch. The process must not have started any thread.
pub fn main(torch: RunTorchVerb) -> ! {
    // SAFETY: both programs call this first and have not started a thread.
    unsafe { crate::runtime::keep_telemetry_off() };
    let code = match parse() {
        Ok(cli) => {
            let json = cli.json;
            on_runaway(move |error| {
                output::print_error(&error.into(), json);
                end(2)
            });
            exit_code(json, dispatch(cli, torch))
        }
        // Help and version are not errors; clap prints them to standard output.
        Err(error) => match error.print() {
            _ if error.use_stderr() => {
                if output::json_is_asked(std::env::args_os().skip(1)) {
                    output::print_usage_error(&error.render().to_string());
                }
                2
            }
            Err(failed) if failed.kind() != std::io::ErrorKind::BrokenPipe => 2,
            _ => 0,
        },
    };
    end(code)
}

/// Errors: as `Cli::try_parse`.
fn parse() -> Result<Cli, clap::Error> {
    let mut matches = with_negative_numbers(Cli::command()).try_get_matches()?;
    Cli::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut Cli::command()))
}

/// Takes a negative number behind a flag as its value, so that the flag says what it expects. Files are no numbers.
fn with_negative_numbers(command: clap::Command) -> clap::Command {
    let as_value = |arg: clap::Arg| {
        let is_file = arg.get_value_parser().type_id() == TypeId::of::<PathBuf>();
        let takes = arg.get_action().takes_values() && !arg.is_positional() && !is_file;
        if takes { arg.allow_negative_numbers(true) } else { arg }
    };
    command.mut_args(as_value).mut_subcommands(with_negative_numbers)
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

/// Name and first help line of every verb, for tests and documents.
pub fn verbs() -> Vec<(String, String)> {
    let command = Cli::command();
    let visible = command.get_subcommands().filter(|verb| !verb.is_hide_set());
    visible
        .map(|verb| (verb.get_name().to_string(), verb.get_about().map(ToString::to_string).unwrap_or_default()))
        .collect()
}

/// Exit code of a verb's result. Prints an error.
fn exit_code(json: bool, result: anyhow::Result<Outcome>) -> i32 {
    match result {
        Ok(Outcome::Done) => 0,
        Ok(Outcome::GateFailed) => 1,
        Err(error) if output::is_closed_pipe(&error) => 0,
        Err(error) => {
            output::print_error(&refused::explained(error), json);
            2
        }
    }
}

/// Ends the process without the engines' cleanup, which takes LibTorch almost a tenth of a second and only frees memory
/// that the system frees anyway. Every file is complete at this point.
fn end(code: i32) -> ! {
    // Write errors are ignored: the pipe is closed.
    let _ = std::io::stdout().flush();
    let _ = std::io::stderr().flush();
    // SAFETY: ends the process, regardless of its threads.
    unsafe { libc::_exit(code) }
}

impl Verb {
    /// Description of the verb's work, for errors of an engine.
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
            Verb::Graft(_) => "writing weights into the graphs",
            Verb::Tune(_) => "tuning the model",
            Verb::Run(_) | Verb::Sweep(_) => "running the recipe",
            Verb::Report(_) => "writing the report",
            Verb::Completions(_) => "printing completions",
            Verb::Man(_) => "writing manual pages",
        }
    }
}

/// Adds a description of the work to an engine's error.
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
        Verb::Score(args) if ranks::has_peers() => run_torch(TorchVerb::Score(Box::new(args)), context),
        Verb::Score(args) => score::run(args, context, None),
        Verb::Plan(args) => plan::run(args, context),
        Verb::Prune(args) => prune::run(args, context),
        Verb::Finetune(args) => run_torch(TorchVerb::Finetune(args), context),
        Verb::Generate(args) => generate::run(args, context),
        Verb::Eval(args) if ranks::has_peers() => run_torch(TorchVerb::Eval(Box::new(args)), context),
        Verb::Eval(args) => eval::run(args, context, None),
        Verb::Bench(args) => bench::run(args, context),
        Verb::Verify(args) => run_torch(TorchVerb::Verify(args), context),
        Verb::Export(args) => export::run(args, context),
        Verb::Graft(args) => graft::run(args, context),
        Verb::Run(args) => run_torch(TorchVerb::Run(args), context),
        Verb::Tune(args) if args.heals() => run_torch(TorchVerb::Tune(args), context),
        Verb::Tune(args) => tune::run(*args, context, None),
        Verb::Sweep(args) => run_torch(TorchVerb::Sweep(args), context),
        Verb::Report(args) => report::run(args, context),
        Verb::Completions(args) => shell::completions(args, Cli::command()),
        Verb::Man(args) => shell::man(args, Cli::command(), context),
        Verb::PeakMemory(args) => bench::run_memory(args, context),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_definition_is_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_of_every_verb_contains_an_example() {
        for verb in Cli::command().get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let help = verb.clone().render_long_help().to_string();
            assert!(help.contains(&format!("interlace {} ", verb.get_name())), "{}", verb.get_name());
            assert!(verb.get_about().is_some(), "{}", verb.get_name());
        }
    }
}
