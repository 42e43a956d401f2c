//! The samples of a run with the rows that its plan keeps on disk.

use crate::base::{Cancel, Result, notice};
use crate::data::LeftOut;
use crate::finetune::data::{Example, RowStore, Streamed, TeacherTargets, TrainingSet, scan};
use crate::finetune::plan::{KeptRows, PlannedData, RunPlan};
use crate::torch::Ranks;

use super::digests::Digests;
use super::frozen::FrozenLayers;
use super::planning::{Opened, estimated, resolve};
use super::request::Request;

/// The samples of a run, and its plan for them.
pub struct RunRows<'a> {
    pub dataset: TrainingSet,
    pub left_out: LeftOut,
    pub plan: RunPlan,
    /// Computes the rows that are not on disk; `None` when all are.
    pub streamed: Option<Streamed<'a>>,
}

/// Decides which rows are on disk, computes those, and plans the run.
///
/// Errors: those of the samples and runs; `Error::Invalid` when the run exceeds its limits; `Error::Interrupted`.
pub fn of<'a>(
    request: &Request<'_>,
    opened: &Opened,
    frozen: &'a FrozenLayers<'a>,
    (targets, digests): (Option<&'a TeacherTargets<'a>>, &Digests),
    cancel: &'a Cancel,
) -> Result<RunRows<'a>> {
    let own = request.own_work();
    let element = frozen.element();
    let store = RowStore::new(&own, &digests.of_rows(request, opened, element)?, opened.side.clone(), element);
    let earlier = store.open()?;
    let written = targets.filter(|targets| earlier.is_none() && !targets.files().is_empty());
    let in_dense = written.map(|targets| frozen.in_dense(targets)).transpose()?.flatten();
    let mut parts = opened.parts();
    if earlier.is_none() {
        parts.sessions.in_dense &= written.is_none() || in_dense.is_some();
    }
    let mut estimate = PlannedData::default();
    let wanted = match earlier {
        Some(_) => None,
        None => {
            estimate = estimated(request.data, request.bundle)?;
            let plan = resolve(request, &parts, estimate.clone(), None);
            plan.check()?;
            Some(plan.rows())
        }
    };
    let rows = agreed(wanted, request.ranks)?;
    let (mut dataset, left_out) = match earlier {
        Some(earlier) => earlier,
        None if rows == KeptRows::All => frozen.fill(&store, targets, in_dense, cancel)?,
        None => {
            let (examples, left_out) = scan(request.data, request.settings.data.max_tokens as usize, cancel)?;
            (TrainingSet::of_windows(examples), left_out)
        }
    };
    let mut plan = resolve(request, &parts, planned_data(&dataset, &estimate), Some(rows));
    plan.check()?;
    if let Some(ranks) = request.ranks {
        plan.take_passes_of_first(ranks)?;
    }
    notice(plan.line());
    if let Some(connector) = &plan.connector {
        notice(connector.line());
    }
    if let Some(targets) = targets.filter(|_| rows != KeptRows::Nothing) {
        targets.complete(cancel)?;
        let width = if rows == KeptRows::All { dataset.hidden_size() } else { opened.sizes.hidden_size as usize };
        dataset.set_targets(targets.open(targets.files(), &dataset.examples, width)?);
    }
    let computed = targets.filter(|_| rows == KeptRows::Nothing);
    let place = (own.as_path(), &opened.sizes);
    let streamed =
        (rows != KeptRows::All).then(|| frozen.streamed(opened.side.clone(), computed, in_dense, place, cancel));
    Ok(RunRows { dataset, left_out, plan, streamed })
}

/// The rows that are kept on disk: the decision of the first process, unless it has the rows of an earlier run. `own`: None in
/// a process that has them.
fn agreed(own: Option<KeptRows>, ranks: Option<&Ranks>) -> Result<KeptRows> {
    const CHOICES: [KeptRows; 3] = [KeptRows::All, KeptRows::Dense, KeptRows::Nothing];
    let Some(ranks) = ranks else { return Ok(own.unwrap_or(KeptRows::All)) };
    let number = CHOICES.iter().position(|&choice| own == Some(choice)).unwrap_or(CHOICES.len());
    let first = ranks.from_first(&[number as u8])?.first().and_then(|&first| CHOICES.get(usize::from(first)).copied());
    Ok(own.map_or(KeptRows::All, |own| first.unwrap_or(own)))
}

/// Sizes of the samples. Summaries of samples do not count image tokens; their number is estimated then.
fn planned_data(dataset: &TrainingSet, estimate: &PlannedData) -> PlannedData {
    let examples = &dataset.examples;
    let tokens: u64 = examples.iter().map(|example| example.length as u64).sum();
    let image = |example: &Example| example.detail().image.iter().map(|&[_, count]| u64::from(count)).sum::<u64>();
    let counted: u64 = examples.iter().map(image).sum();
    let share = |example| image(example) as f64 / example.length.max(1) as f64;
    let scaled = u128::from(estimate.image_tokens) * u128::from(tokens) / u128::from(estimate.tokens.max(1));
    PlannedData {
        samples: examples.len() as u64,
        tokens,
        image_tokens: if counted > 0 { counted } else { scaled as u64 },
        image_share: examples.iter().map(share).fold(if counted > 0 { 0.0 } else { estimate.image_share }, f64::max),
        answer_tokens: examples.iter().map(|example| example.answers as u64).sum(),
        answer_share: examples.iter().map(|e| e.answers as f64 / e.length.max(1) as f64).fold(0.0, f64::max),
        longest_tokens: examples.iter().map(|example| example.length as u64).max().unwrap_or(0),
        estimated: false,
    }
}
