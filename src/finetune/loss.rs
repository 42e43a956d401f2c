//! Loss terms, one row each. A term is a sum over tokens. The trainer divides it by the token count of the whole
//! optimiser step, so the gradient does not depend on the split of the step into forward passes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Reduction, Tensor};

use crate::base::{Error, Result};

use crate::finetune::error::torch_error;

/// Kind of loss term, in the order of [`LOSSES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// Cross-entropy of the answer tokens.
    Ce,
    /// Divergence of the student's answer distribution from the dense model's.
    Kd,
    /// Distance of the residual stream from the dense model's after each finetuned layer, and after each frozen anchor
    /// when other terms run the whole network.
    Anchor,
    /// Distance of the residual stream from the dense model's after every layer from the first finetuned one on.
    Hidden,
}

/// Tokens over which a term is averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denominator {
    /// Answer tokens.
    AnswerTokens,
    /// All tokens, image tokens included. The term is also averaged over the compared points of the stream.
    StreamTokens,
}

/// Output of the dense model that a term reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TeacherOutput {
    Nothing,
    /// The most probable tokens at the answer positions.
    Logits,
    /// The residual stream.
    Stream,
}

/// Points of the residual stream that a term compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ComparedPoints {
    /// After each finetuned layer, and after each frozen anchor when other terms run the whole network.
    TrainedAndAnchors,
    /// After every layer from the first finetuned one on.
    All,
}

/// Inputs of a term at the answer positions.
pub struct Answers<'a> {
    /// `[N, V]`.
    pub logits: &'a Tensor,
    /// i64 `[N]`: answer token ids.
    pub targets: &'a Tensor,
    pub top_k: Option<&'a TopK>,
    /// Softmax temperature, for terms that use one.
    pub temperature: f64,
}

/// Computation of a term: a sum over tokens, f32 `[]`.
pub enum Compute {
    /// From the logits at the answer positions.
    Answers(fn(&Answers) -> Result<Tensor>),
    /// From the student's and the dense model's residual stream at one point, `[M, D]` each.
    Stream(ComparedPoints, fn(&Tensor, &Tensor) -> Result<Tensor>),
}

/// One loss term.
pub struct LossRow {
    /// Kind of the term.
    pub kind: LossKind,
    /// Name in settings and reports.
    pub name: &'static str,
    /// One line for help texts and documents.
    pub summary: &'static str,
    /// Tokens over which the loss is averaged.
    pub denominator: Denominator,
    /// Outputs of the dense model that the loss reads.
    pub teacher: TeacherOutput,
    /// Sum of the loss over the tokens of a pass.
    pub compute: Compute,
}

/// All loss terms, in the order of [`LossKind`].
pub const LOSSES: &[LossRow] = &[
    LossRow {
        kind: LossKind::Ce,
        name: "ce",
        summary: "cross-entropy of the answer tokens",
        denominator: Denominator::AnswerTokens,
        teacher: TeacherOutput::Nothing,
        compute: Compute::Answers(|answers| cross_entropy(answers.logits, answers.targets)),
    },
    LossRow {
        kind: LossKind::Kd,
        name: "kd",
        summary: "KL divergence from the dense model's distribution over answer tokens, at temperature `kd.temperature`, over \
                  its `kd.top_k` most probable tokens and one bucket for the rest",
        denominator: Denominator::AnswerTokens,
        teacher: TeacherOutput::Logits,
        compute: Compute::Answers(|answers| {
            let top_k =
                answers.top_k.ok_or_else(|| Error::invalid("loss `kd`", "has no answers of the dense model"))?;
            distillation(answers.logits, top_k, answers.temperature)
        }),
    },
    LossRow {
        kind: LossKind::Anchor,
        name: "anchor",
        summary: "squared distance of the residual stream to the dense model's after each finetuned layer, divided by the \
                  squared length of the dense stream",
        denominator: Denominator::StreamTokens,
        teacher: TeacherOutput::Stream,
        compute: Compute::Stream(ComparedPoints::TrainedAndAnchors, stream_distance),
    },
    LossRow {
        kind: LossKind::Hidden,
        name: "hidden",
        summary: "the same after every layer",
        denominator: Denominator::StreamTokens,
        teacher: TeacherOutput::Stream,
        compute: Compute::Stream(ComparedPoints::All, stream_distance),
    },
];

impl LossKind {
    /// This term's row.
    pub fn row(self) -> &'static LossRow {
        &LOSSES[self as usize]
    }

    /// True for a term that reads an output of the dense model.
    pub fn needs_teacher(self) -> bool {
        self.row().teacher != TeacherOutput::Nothing
    }

    /// True for a term at the answer positions, which needs a run of the network up to the logits.
    pub fn looks_at_answers(self) -> bool {
        matches!(self.row().compute, Compute::Answers(_))
    }

    /// Name in settings and metrics.
    pub fn name(self) -> &'static str {
        self.row().name
    }
}

/// The dense model's answer distribution, reduced to its `K` most probable tokens.
#[derive(Debug)]
pub struct TopK {
    /// Natural log-probabilities at the run's temperature, f32 `[N, K]`.
    pub log_probs: Tensor,
    /// Token ids, i64 `[N, K]`.
    pub tokens: Tensor,
}

/// Sum over answer tokens of the cross-entropy in nats.
///
/// Shapes: logits `[N, V]`, targets i64 `[N]` -> `[]` f32. Errors: `Error::Engine` from LibTorch.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    logits
        .f_to_kind(Kind::Float)
        .and_then(|logits| logits.f_cross_entropy_loss::<Tensor>(targets, None, Reduction::Sum, -100, 0.0))
        .map_err(torch_error("the cross-entropy"))
}

/// Sum over answer tokens of `T^2 * KL(teacher || student)` in nats over the teacher's `K` most probable tokens and one
/// bucket for the rest, both distributions at temperature `T`.
///
/// Shapes: logits `[N, V]` -> `[]` f32. Errors: `Error::Engine` from LibTorch. Source: Hinton et al. 2015,
/// arXiv:1503.02531, section 2 (the factor `T^2`).
pub fn distillation(logits: &Tensor, teacher: &TopK, temperature: f64) -> Result<Tensor> {
    let compute = || -> Result<Tensor, tch::TchError> {
        // Lower bound on the mass of the rest bucket, which keeps its logarithm finite in f32.
        const FLOOR: f64 = 1e-6;
        let student = logits.f_to_kind(Kind::Float)?.f_div_scalar(temperature)?.f_log_softmax(-1, Kind::Float)?;
        let student = student.f_gather(1, &teacher.tokens, false)?;
        // Probability of all tokens outside the top K.
        let rest = |log_probs: &Tensor| -> Result<Tensor, tch::TchError> {
            let top = log_probs.f_exp()?.f_sum_dim_intlist(1, false, Kind::Float)?;
            top.f_neg()?.f_add_scalar(1.0)?.f_clamp_min(FLOOR)
        };
        let teacher_rest = rest(&teacher.log_probs)?;
        let top = teacher.log_probs.f_exp()?.f_mul(&teacher.log_probs.f_sub(&student)?)?.f_sum(Kind::Float)?;
        let apart = teacher_rest.f_log()?.f_sub(&rest(&student)?.f_log()?)?;
        let bucket = teacher_rest.f_mul(&apart)?.f_sum(Kind::Float)?;
        top.f_add(&bucket)?.f_mul_scalar(temperature * temperature)
    };
    compute().map_err(torch_error("the distillation loss"))
}

/// Sum over tokens of the squared distance between the student's and the teacher's residual stream, divided by the
/// teacher's squared length, so that tokens with massive activations do not dominate.
///
/// Shapes: student and teacher `[M, D]` -> `[]` f32. Errors: `Error::Engine` from LibTorch.
pub fn stream_distance(student: &Tensor, teacher: &Tensor) -> Result<Tensor> {
    let compute = || -> Result<Tensor, tch::TchError> {
        let teacher = teacher.f_to_kind(Kind::Float)?;
        let squared = |x: Tensor| x.f_square()?.f_sum_dim_intlist(-1, false, Kind::Float);
        let distance = squared(student.f_to_kind(Kind::Float)?.f_sub(&teacher)?)?;
        let length = squared(teacher)?.f_clamp_min(1e-12)?;
        distance.f_div(&length)?.f_sum(Kind::Float)
    };
    compute().map_err(torch_error("the residual-stream loss"))
}

/// Checks that there is a dense model when loss terms or a fit need one.
///
/// Errors: `Error::Invalid` naming the first term, or the fit, that needs it.
pub fn check_teacher(kinds: impl Iterator<Item = LossKind>, fits: bool, has_teacher: bool) -> Result<()> {
    let terms = kinds.filter(|kind| kind.needs_teacher());
    let mut needs = terms.map(|kind| format!("loss `{}`", kind.name())).chain(fits.then(|| "`fit`".to_string()));
    match needs.next() {
        Some(what) if !has_teacher => Err(Error::invalid(what, "needs the dense model as teacher, and none was given")
            .remedy("name the model that was pruned (`--teacher MODEL`), or heal without it (`--recipe paper`)")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(tensor: &Tensor) -> f64 {
        tensor.double_value(&[])
    }

    #[test]
    fn every_loss_has_one_row_under_its_serialised_name() {
        let schema = serde_json::to_value(schemars::schema_for!(LossKind)).unwrap();
        let terms: Vec<_> = schema["oneOf"].as_array().unwrap().iter().map(|term| &term["const"]).collect();
        assert_eq!(terms, LOSSES.iter().map(|row| row.name).collect::<Vec<_>>());
        for row in LOSSES {
            assert_eq!(serde_json::to_value(row.kind).unwrap(), row.name);
            assert_eq!(row.kind.row().name, row.name);
        }
    }

    /// Reference: `-log softmax` of the target, in f64.
    #[test]
    fn cross_entropy_is_summed_over_tokens() {
        let logits = [[1.0f64, 2.0, 3.0], [0.5, -0.5, 0.0]];
        let targets = [2usize, 1];
        let want: f64 = logits
            .iter()
            .zip(targets)
            .map(|(row, target)| row.iter().map(|z| z.exp()).sum::<f64>().ln() - row[target])
            .sum();
        let tensor = Tensor::from_slice(&logits.concat()).view([2, 3]);
        let found = value(&cross_entropy(&tensor, &Tensor::from_slice(&[2i64, 1])).unwrap());
        assert!((found - want).abs() < 1e-6, "{found}, expected {want}");
    }

    /// Reference: the divergence in f64, with two of four tokens in the bucket, and with all tokens in the top K. In
    /// the second case the bucket is empty and the sum is the plain KL divergence.
    #[test]
    fn distillation_is_the_kl_divergence_at_the_temperature() {
        let temperature = 2.0;
        let student = [0.3f64, -1.0, 0.7, 2.0];
        let teacher = [1.0f64, 0.0, -1.0, 0.5];
        let log_softmax = |z: &[f64]| -> Vec<f64> {
            let total = z.iter().map(|v| (v / temperature).exp()).sum::<f64>().ln();
            z.iter().map(|v| v / temperature - total).collect()
        };
        let (p, q) = (log_softmax(&teacher), log_softmax(&student));
        let logits = Tensor::from_slice(&student).view([1, 4]);
        let top_k = |tokens: &[i64]| TopK {
            log_probs: Tensor::from_slice(&tokens.iter().map(|&t| p[t as usize] as f32).collect::<Vec<_>>())
                .view([1, -1]),
            tokens: Tensor::from_slice(tokens).view([1, -1]),
        };
        // The top K has tokens 0 and 3, the bucket 1 and 2.
        let kept = [0usize, 3];
        let rest = |l: &[f64]| 1.0 - kept.iter().map(|&i| l[i].exp()).sum::<f64>();
        let mut want: f64 = kept.iter().map(|&i| p[i].exp() * (p[i] - q[i])).sum();
        want += rest(&p) * (rest(&p).ln() - rest(&q).ln());
        want *= temperature * temperature;
        let found = value(&distillation(&logits, &top_k(&[0, 3]), temperature).unwrap());
        assert!((found - want).abs() < 1e-6, "{found}, expected {want}");

        let full: f64 = (0..4).map(|i| p[i].exp() * (p[i] - q[i])).sum::<f64>() * temperature * temperature;
        let found = value(&distillation(&logits, &top_k(&[0, 1, 2, 3]), temperature).unwrap());
        assert!((found - full).abs() < 1e-5, "{found}, expected {full}");
    }

    #[test]
    fn the_stream_distance_is_relative_to_the_teacher() {
        let teacher = Tensor::from_slice(&[3.0f32, 4.0, 0.0, 100.0]).view([2, 2]);
        let student = Tensor::from_slice(&[3.0f32, 5.0, 0.0, 120.0]).view([2, 2]);
        let found = value(&stream_distance(&student, &teacher).unwrap());
        assert!((found - (1.0 / 25.0 + 400.0 / 10_000.0)).abs() < 1e-6);
        assert_eq!(value(&stream_distance(&teacher, &teacher).unwrap()), 0.0);
    }
}
