//! One forward and backward pass: from a batch to loss terms and gradients, with or without keeping every activation.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use crate::base::{Error, Result};

use super::batch::Batch;
use super::loss::{self, Denominator, LossKind};
use super::settings::Settings;
use super::student::{Side, Student};
use super::torch_error;

/// Tokens of a whole optimiser step, over which its sums become means.
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

/// What a pass gives.
pub struct Pass {
    /// Each term's share of the step's mean, before its weight; f32 `[]`.
    pub terms: BTreeMap<LossKind, Tensor>,
    /// Gradients in the order of the student's parameters; the part of the step's mean that this batch has.
    pub gradients: Vec<Tensor>,
}

/// Runs one batch forward and backward.
///
/// Errors: `Error::Invalid` when an operator refuses its tensors or a parameter has no influence on the loss.
pub fn pass(student: &Student, batch: &Batch, settings: &Settings, counts: Counts) -> Result<Pass> {
    let side = student.side(batch)?;
    let step = Step { student, batch, settings, counts, side };
    if settings.gradient_checkpointing { step.checkpointed() } else { step.plain() }
}

struct Step<'a> {
    student: &'a Student,
    batch: &'a Batch,
    settings: &'a Settings,
    counts: Counts,
    side: Side,
}

impl Step<'_> {
    /// All layers under one autograd graph.
    fn plain(&self) -> Result<Pass> {
        let mut stream = self.batch.hidden.shallow_clone();
        for layer in 0..self.student.layers() {
            stream = self.student.layer(layer, &stream, &self.side)?;
        }
        let (terms, loss) = self.head(&stream)?;
        let parameters: Vec<&Tensor> = self.student.parameters.iter().map(|parameter| &parameter.value).collect();
        let gradients = gradients(&loss, &parameters)?;
        self.named(terms, gradients.into_iter().map(Some).collect())
    }

    /// One layer at a time, each computed again for its own backward pass; only the stream between layers is kept.
    fn checkpointed(&self) -> Result<Pass> {
        let mut streams = vec![self.batch.hidden.shallow_clone()];
        for layer in 0..self.student.layers() {
            let next = tch::no_grad(|| self.student.layer(layer, &streams[layer], &self.side))?;
            streams.push(next);
        }
        let leaf =
            |stream: &Tensor| stream.detach().f_set_requires_grad(true).map_err(torch_error("a checkpointed layer"));
        let mut collected: Vec<Option<Tensor>> = self.student.parameters.iter().map(|_| None).collect();
        let top = leaf(&streams[self.student.layers()])?;
        let (terms, loss) = self.head(&top)?;
        let mut upstream = gradients(&loss, &[&top])?.pop();
        drop((loss, top));
        for layer in (0..self.student.layers()).rev() {
            streams.truncate(layer + 1);
            let input = if layer == 0 { streams[0].shallow_clone() } else { leaf(&streams[layer])? };
            let output = self.student.layer(layer, &input, &self.side)?;
            let Some(gradient) = upstream.take() else { break };
            // The gradient of this sum is the layer's share of the chain rule.
            let sum = output
                .f_mul(&gradient)
                .and_then(|product| product.f_sum(Kind::Float))
                .map_err(torch_error("the chain rule"))?;
            let own = self.student.layer_parameters(layer);
            let mut wanted: Vec<&Tensor> = own.iter().map(|&number| &self.student.parameters[number].value).collect();
            if layer > 0 {
                wanted.push(&input);
            }
            let mut found = gradients(&sum, &wanted)?;
            if layer > 0 {
                upstream = found.pop();
            }
            for (&number, gradient) in own.iter().zip(found) {
                collected[number] = Some(match collected[number].take() {
                    Some(sum) if sum.defined() && gradient.defined() => {
                        sum.f_add(&gradient).map_err(torch_error("a gradient"))?
                    }
                    _ => gradient,
                });
            }
        }
        self.named(terms, collected)
    }

    /// Loss terms at the answer positions and their weighted sum.
    fn head(&self, stream: &Tensor) -> Result<(BTreeMap<LossKind, Tensor>, Tensor)> {
        let mut terms = BTreeMap::new();
        let logits = self.student.head(stream, self.batch, &self.side)?;
        let sum = loss::cross_entropy(&logits, &self.batch.targets)?;
        self.add(LossKind::Ce, sum, &mut terms)?;
        let mut total: Option<Tensor> = None;
        for (kind, term) in &terms {
            let weighted = term.f_mul_scalar(self.settings.weight(*kind)).map_err(torch_error("the loss"))?;
            total = Some(match total {
                Some(total) => total.f_add(&weighted).map_err(torch_error("the loss"))?,
                None => weighted,
            });
        }
        let total = total.ok_or_else(|| Error::invalid("the loss", "has no term"))?;
        Ok((terms, total))
    }

    fn add(&self, kind: LossKind, sum: Tensor, terms: &mut BTreeMap<LossKind, Tensor>) -> Result<()> {
        let count = self.counts.of(kind.row().denominator);
        terms.insert(kind, sum.f_div_scalar(count).map_err(torch_error("the loss"))?);
        Ok(())
    }

    fn named(&self, terms: BTreeMap<LossKind, Tensor>, gradients: Vec<Option<Tensor>>) -> Result<Pass> {
        let mut defined = Vec::with_capacity(gradients.len());
        for (parameter, gradient) in self.student.parameters.iter().zip(gradients) {
            match gradient {
                Some(gradient) if gradient.defined() => defined.push(gradient),
                _ => {
                    let problem = "is to be trained, but the loss does not depend on it";
                    return Err(Error::invalid(format!("initializer `{}`", parameter.name), problem));
                }
            }
        }
        let terms = terms.into_iter().map(|(kind, term)| (kind, term.detach())).collect();
        Ok(Pass { terms, gradients: defined })
    }
}

fn gradients(loss: &Tensor, wanted: &[&Tensor]) -> Result<Vec<Tensor>> {
    Tensor::f_run_backward(&[loss], wanted, false, false).map_err(torch_error("the backward pass"))
}
