//! Forward and backward pass of one batch: computes loss terms and gradients, with or without gradient checkpointing.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use crate::base::{Error, Result};

use crate::finetune::data::TrainingBatch;
use crate::finetune::error::torch_error;
use crate::finetune::loss::{Answers, Compute, Denominator, LOSSES, LossKind, LossRow};
use crate::finetune::plan::gradient_sum_bytes;
use crate::finetune::settings::Settings;
use crate::finetune::student::{SideTensors, Student};

/// Token counts of a whole optimiser step. Sums are divided by them, so gradient accumulation gives the mean over the
/// step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub answer_tokens: u64,
    pub tokens: u64,
}

impl Counts {
    fn of(self, denominator: Denominator) -> f64 {
        let count = match denominator {
            Denominator::AnswerTokens => self.answer_tokens,
            Denominator::StreamTokens => self.tokens,
        };
        count.max(1) as f64
    }
}

/// The batch's contribution to each term's mean over the step, without the term's weight: f32 `[]`.
pub type TermSums = BTreeMap<LossKind, Tensor>;

/// True when gradients of several passes are added in f64. The sum of a few f32 numbers is then the same to the bit in any
/// order, so it does not depend on how passes are divided among processes.
pub fn sums_in_f64(student: &Student) -> bool {
    let numbers: usize = student.weights_now().map(|weight| weight.tensor.numel()).sum();
    gradient_sum_bytes(numbers as u64) == 8
}

/// Adds to a sum of gradients, which is or becomes f64 where `in_f64` says so.
///
/// Errors: `Error::Engine` when the shapes differ.
pub fn add_to(sum: &mut Tensor, gradient: &Tensor, in_f64: bool) -> Result<()> {
    if in_f64 && sum.kind() != Kind::Double {
        *sum = sum.f_to_kind(Kind::Double).map_err(torch_error("gradient accumulation"))?;
    }
    let _ = sum.f_add_(gradient).map_err(torch_error("gradient accumulation"))?;
    Ok(())
}

/// Runs one batch forward and backward, and adds its contribution to the gradients of the step's mean loss to
/// `gradients`: one per currently trained weight, in their order, and none before the first pass of a step. They are f32
/// after the first pass; see [`sums_in_f64`] for those after several.
///
/// With gradient checkpointing a layer's gradients are added as soon as they are known, so a step with several passes
/// never holds the gradients of all weights twice.
///
/// Errors: `Error::Invalid` when an operator refuses its tensors, or when the loss does not depend on a trained weight.
pub fn pass(
    student: &Student,
    batch: &TrainingBatch,
    settings: &Settings,
    counts: Counts,
    gradients: &mut Vec<Tensor>,
) -> Result<TermSums> {
    let side = student.side(batch)?;
    let step = Step { student, batch, settings, counts, side, in_f64: sums_in_f64(student) };
    if settings.batch.gradient_checkpointing == Some(true) && step.wants_head() {
        step.checkpointed(gradients)
    } else {
        step.plain(gradients)
    }
}

struct Step<'a> {
    student: &'a Student,
    batch: &'a TrainingBatch,
    settings: &'a Settings,
    counts: Counts,
    side: SideTensors,
    in_f64: bool,
}

impl Step<'_> {
    /// Runs all layers in one autograd graph.
    ///
    /// With stream terms alone, the stream is detached before each trained layer, so no gradient reaches earlier
    /// layers, and layers behind the last compared point are skipped. In layer-by-layer training only the current layer
    /// and the frozen layers after it are run, up to the last compared point before the next trained layer.
    fn plain(&self, sums: &mut Vec<Tensor>) -> Result<TermSums> {
        let local = !self.wants_head();
        let layers = match self.student.only {
            Some(layer) => self.student.layers_to_run(layer),
            None if local => 0..self.points().iter().copied().max().unwrap_or(0),
            None => 0..self.student.layers(),
        };
        // The last layer is run with the head, unless a term compares the stream after it.
        let end = self.student.layers();
        let joined = end > 0
            && !local
            && layers == (0..end)
            && !self.active_terms().any(|row| self.student.compares(row.kind, end));
        let layers = if joined { 0..end - 1 } else { layers };
        let mut terms = Terms::default();
        let mut stream = self.student.entering(&self.batch.hidden)?;
        for layer in layers {
            if local && !self.student.layer_parameters(layer).is_empty() {
                stream = stream.detach();
            }
            stream = self.student.layer(layer, &stream, &self.side)?;
            self.stream_terms(layer + 1, &stream, &mut terms)?;
        }
        if joined {
            self.head_terms(&self.student.last_layer_and_head(&stream, self.batch, &self.side)?, &mut terms)?;
        } else if !local {
            self.head_terms(&self.student.head(&stream, self.batch, &self.side)?, &mut terms)?;
        }
        let loss = self.total(&terms)?.ok_or_else(|| Error::invalid("the loss", "has no term"))?;
        let parameters: Vec<&Tensor> = self.student.weights_now().map(|weight| &weight.tensor).collect();
        let mut collected: Vec<Option<Tensor>> = sums.drain(..).map(Some).collect();
        collected.resize_with(parameters.len(), || None);
        for (sum, gradient) in collected.iter_mut().zip(gradients(&loss, &parameters)?) {
            add(sum, gradient, self.in_f64)?;
        }
        *sums = self.all(collected)?;
        Ok(terms.detached())
    }

    /// Runs with gradient checkpointing: only the streams between layers are kept, and each layer is recomputed for its
    /// own backward pass.
    fn checkpointed(&self, sums: &mut Vec<Tensor>) -> Result<TermSums> {
        let mut streams = vec![self.student.entering(&self.batch.hidden)?];
        for layer in 0..self.student.layers() {
            let next = tch::no_grad(|| self.student.layer(layer, &streams[layer], &self.side))?;
            streams.push(next);
        }
        let leaf =
            |stream: &Tensor| stream.detach().f_set_requires_grad(true).map_err(torch_error("a checkpointed layer"));
        let mut collected: Vec<Option<Tensor>> = sums.drain(..).map(Some).collect();
        collected.resize_with(self.student.weights().len(), || None);
        let mut terms = Terms::default();
        let mut upstream = None;
        if self.wants_head() {
            let top = leaf(&streams[self.student.layers()])?;
            let mut head = Terms::default();
            self.head_terms(&self.student.head(&top, self.batch, &self.side)?, &mut head)?;
            if let Some(loss) = self.total(&head)? {
                upstream = gradients(&loss, &[&top])?.pop();
            }
            terms.absorb(head)?;
        }
        for layer in (0..self.student.layers()).rev() {
            streams.truncate(layer + 1);
            let input = if layer == 0 { streams[0].shallow_clone() } else { leaf(&streams[layer])? };
            let output = self.student.layer(layer, &input, &self.side)?;
            let mut own_terms = Terms::default();
            self.stream_terms(layer + 1, &output, &mut own_terms)?;
            let mut sum = self.total(&own_terms)?;
            terms.absorb(own_terms)?;
            if let Some(gradient) = upstream.take() {
                // The gradient of this sum is the layer's vector-Jacobian product with the upstream gradient.
                let chained = output.f_mul(&gradient).and_then(|product| product.f_sum(Kind::Float));
                let chained = chained.map_err(torch_error("the chain rule"))?;
                sum = Some(match sum {
                    Some(sum) => sum.f_add(&chained).map_err(torch_error("the chain rule"))?,
                    None => chained,
                });
            }
            let Some(sum) = sum else { continue };
            let own = self.student.layer_parameters(layer);
            let mut wanted: Vec<&Tensor> = own.iter().map(|&number| &self.student.weights()[number].tensor).collect();
            if layer > 0 {
                wanted.push(&input);
            }
            let mut found = gradients(&sum, &wanted)?;
            if layer > 0 {
                upstream = found.pop();
            }
            for (&number, gradient) in own.iter().zip(found) {
                add(&mut collected[number], gradient, self.in_f64)?;
            }
        }
        *sums = self.all(collected)?;
        Ok(terms.detached())
    }

    /// True when a term reads answers, so that all layers and the head must be run.
    fn wants_head(&self) -> bool {
        self.active_terms().any(|row| row.kind.looks_at_answers())
    }

    /// Terms with a weight above 0.
    fn active_terms(&self) -> impl Iterator<Item = &'static LossRow> {
        LOSSES.iter().filter(|row| self.settings.weight(row.kind) > 0.0)
    }

    fn points(&self) -> &[usize] {
        self.student.points()
    }

    /// Adds the terms that compare the logits `[N, V]` at the answer positions.
    fn head_terms(&self, logits: &Tensor, terms: &mut Terms) -> Result<()> {
        let (targets, top_k) = (&self.batch.targets, self.batch.top_k.as_ref());
        let answers = Answers { logits, targets, top_k, temperature: self.settings.kd.temperature };
        for row in self.active_terms() {
            if let Compute::Answers(compute) = row.compute {
                terms.add(row.kind, self.mean(row.kind, &compute(&answers)?, 1)?)?;
            }
        }
        Ok(())
    }

    /// Adds the terms at the point `at` of the residual stream, if a term compares it.
    fn stream_terms(&self, at: usize, stream: &Tensor, terms: &mut Terms) -> Result<()> {
        let mut own = None;
        for row in self.active_terms().filter(|row| self.student.compares(row.kind, at)) {
            let Compute::Stream(_, compute) = row.compute else { continue };
            let target = self.batch.streams.get(&at);
            let target = target.ok_or_else(|| Error::invalid("the residual-stream loss", "has no target"))?;
            let real = match own.take() {
                Some(real) => real,
                None => {
                    let width = target.size().last().copied().unwrap_or(0);
                    let rows = stream.f_reshape([-1, width]);
                    let rows = rows.and_then(|rows| rows.f_index_select(0, &self.batch.real_rows));
                    rows.map_err(torch_error("the residual-stream loss"))?
                }
            };
            terms.add(row.kind, self.mean(row.kind, &compute(&real, target)?, self.points_compared(row.kind))?)?;
            own = Some(real);
        }
        Ok(())
    }

    fn points_compared(&self, kind: LossKind) -> usize {
        let now = |point: usize| match self.student.only {
            Some(layer) => self.student.layers_to_run(layer).contains(&(point - 1)),
            None => true,
        };
        self.points().iter().filter(|&&point| self.student.compares(kind, point) && now(point)).count()
    }

    /// Contribution of a batch to the optimiser step's mean; stream terms are also averaged over their points.
    fn mean(&self, kind: LossKind, sum: &Tensor, points: usize) -> Result<Tensor> {
        let count = self.counts.of(kind.row().denominator) * points.max(1) as f64;
        sum.f_div_scalar(count).map_err(torch_error("the loss"))
    }

    fn total(&self, terms: &Terms) -> Result<Option<Tensor>> {
        let mut total: Option<Tensor> = None;
        for (kind, term) in &terms.0 {
            let weighted = term.f_mul_scalar(self.settings.weight(*kind)).map_err(torch_error("the loss"))?;
            total = Some(match total {
                Some(total) => total.f_add(&weighted).map_err(torch_error("the loss"))?,
                None => weighted,
            });
        }
        Ok(total)
    }

    /// The gradients of all currently trained weights.
    fn all(&self, gradients: Vec<Option<Tensor>>) -> Result<Vec<Tensor>> {
        let named =
            self.student.weights_now().zip(gradients).enumerate().map(
                |(number, (parameter, gradient))| match gradient {
                    Some(gradient) => Ok(gradient),
                    None if self.batch.connector.is_none() && self.student.reads_pictures_alone(number) => {
                        let zeros = parameter.tensor.f_detach().and_then(|weight| weight.f_zeros_like());
                        zeros.map_err(torch_error("the gradients"))
                    }
                    None => {
                        let problem = "is to be trained, but the loss does not depend on it";
                        Err(Error::invalid(format!("initializer `{}`", parameter.name), problem))
                    }
                },
            );
        named.collect()
    }
}

/// Loss terms; values added to a term are summed.
#[derive(Default)]
struct Terms(BTreeMap<LossKind, Tensor>);

impl Terms {
    fn add(&mut self, kind: LossKind, term: Tensor) -> Result<()> {
        let sum = match self.0.remove(&kind) {
            Some(sum) => sum.f_add(&term).map_err(torch_error("the loss"))?,
            None => term,
        };
        self.0.insert(kind, sum);
        Ok(())
    }

    /// The values, detached from the autograd graph.
    fn detached(self) -> TermSums {
        self.0.into_iter().map(|(kind, term)| (kind, term.detach())).collect()
    }

    /// Adds another's values, detached from the autograd graph.
    fn absorb(&mut self, other: Terms) -> Result<()> {
        other.0.into_iter().try_for_each(|(kind, term)| self.add(kind, term.detach()))
    }
}

/// Adds a weight's gradient, which is undefined where the loss does not depend on the weight.
fn add(sum: &mut Option<Tensor>, gradient: Tensor, in_f64: bool) -> Result<()> {
    match sum {
        _ if !gradient.defined() => {}
        Some(sum) => add_to(sum, &gradient, in_f64)?,
        None => *sum = Some(gradient),
    }
    Ok(())
}

fn gradients(loss: &Tensor, wanted: &[&Tensor]) -> Result<Vec<Tensor>> {
    Tensor::f_run_backward(&[loss], wanted, false, false).map_err(torch_error("the backward pass"))
}
