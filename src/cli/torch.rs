//! Runs the verbs that compute in LibTorch. The library has 120 MB and takes up to a second to load, so only the
//! program `interlace-torch` links it. For those verbs `interlace` executes that program with the same arguments.

use std::env;
use std::hint::black_box;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;

use crate::base::{Error, Peers};

use super::context::{Context, Outcome};
use super::ranks::connect_peers;
use super::{eval, finetune, run, score, sweep, tune, verify};

/// The program that links LibTorch, in the same folder as `interlace`.
const TORCH_PROGRAM: &str = "interlace-torch";

/// A verb that computes in LibTorch.
pub enum TorchVerb {
    /// `interlace finetune`.
    Finetune(Box<finetune::Args>),
    /// `interlace run`.
    Run(run::Args),
    /// `interlace sweep`.
    Sweep(sweep::Args),
    /// `interlace tune` with healing.
    Tune(Box<tune::Args>),
    /// `interlace verify`.
    Verify(verify::Args),
    /// `interlace score` by several processes, which find one another through LibTorch.
    Score(Box<score::Args>),
    /// `interlace eval` by several processes.
    Eval(Box<eval::Args>),
}

/// The function with which a program runs the verbs that compute in LibTorch.
pub type RunTorchVerb = fn(TorchVerb, &Context) -> anyhow::Result<Outcome>;

/// Runs the verb in this process. A program that refers to this function links LibTorch.
///
/// The ranks are passed on as a value that link-time optimisation cannot see through: it would otherwise take them for the
/// only processes there are, call their methods directly in `score` and `eval`, and link LibTorch to `interlace` too.
pub fn here(verb: TorchVerb, context: &Context) -> anyhow::Result<Outcome> {
    match verb {
        TorchVerb::Finetune(args) => finetune::run(*args, context),
        TorchVerb::Run(args) => run::run(args, context),
        TorchVerb::Sweep(args) => sweep::run(args, context),
        TorchVerb::Tune(args) => tune::run(*args, context, Some(crate::pipeline::with_torch())),
        TorchVerb::Verify(args) => verify::run(args, context),
        TorchVerb::Score(mut args) => {
            let ranks = connect_peers(&mut args.device, context)?;
            score::run(*args, context, black_box(ranks.as_ref().map(|ranks| ranks as &dyn Peers)))
        }
        TorchVerb::Eval(mut args) => {
            let ranks = connect_peers(&mut args.device, context)?;
            eval::run(*args, context, black_box(ranks.map(|ranks| Box::new(ranks) as Box<dyn Peers + Send>)))
        }
    }
}

/// Replaces this process by `interlace-torch`, with the same arguments.
///
/// Errors: when that program is not in the folder of this one, or does not start.
pub fn hand_over(_: TorchVerb, _: &Context) -> anyhow::Result<Outcome> {
    let program = torch_program()?;
    let error = Command::new(&program).args(env::args_os().skip(1)).exec();
    Err(error).with_context(|| format!("cannot start `{}`", program.display()))
}

fn torch_program() -> anyhow::Result<PathBuf> {
    let own = env::current_exe().context("cannot find the folder of this program")?;
    let program = own.with_file_name(TORCH_PROGRAM);
    if !program.is_file() {
        return Err(Error::invalid(
            format!("`{}`", program.display()),
            "does not exist, and this verb computes in LibTorch",
        )
        .remedy(format!("keep `{TORCH_PROGRAM}` in the folder of `interlace`; `cargo build --release` makes both"))
        .into());
    }
    Ok(program)
}
