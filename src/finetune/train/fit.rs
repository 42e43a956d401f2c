//! Least squares before the first step: the products of each trained layer whose results its output is a sum of, those of
//! attention and MLP in most networks, are fitted to the dense model's stream.
//!
//! A layer's output is linear in its last weight: `y = r + h W`, with `h` what the product reads. The weight that
//! brings `y` closest to the dense stream `t` has a closed form. Over all tokens, each weighted by `1 / |t|^2`, the
//! change `D` that minimises `sum |t - y - h D|^2 / |t|^2 + ridge * mean(diag A) * |D|^2` solves
//!
//! `(A + ridge * mean(diag A) * I) D = B`, `A = sum h^T h / |t|^2`, `B = sum h^T (t - y) / |t|^2`
//!
//! (ridge regression; Hoerl and Kennard 1970). The sum is what the loss term `anchor` looks at behind the trained layer.
//! The ridge is the one of [`RIDGES`] that, fitted on three quarters of the tokens, leaves least on the samples that hold the
//! last quarter; all of them decide the weight with it. Where there are too few samples for that, [`FEW_SAMPLES_RIDGE`] is taken.
//!
//! What a product before the last gives is read by the rest of the layer too, in which it is not linear. It is fitted as if
//! that stayed as it is, and set back where the layer then is farther from the dense stream than before. The layers are
//! fitted from the first to the last, each on the stream that the fitted ones before it give.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::base::{Error, Progress, Result};
use crate::finetune::cut::{FitTarget, Projection};
use crate::finetune::data::{TrainingSet, bf16_matrix};
use crate::finetune::error::torch_error;
use crate::finetune::plan::{FIT_TOKENS, order};
use crate::finetune::record::LayerFit;
use crate::finetune::student::Student;

use super::context::Run;
use super::dense::DenseStream;
use super::normal::{Normal, Rows, Solved};
use super::workers;

/// Ridges to choose from.
const RIDGES: [f64; 4] = [0.003, 0.01, 0.03, 0.3];
/// The ridge where there are too few samples to choose by.
const FEW_SAMPLES_RIDGE: f64 = 0.1;
/// The part of the tokens that is held out when the ridge is chosen.
const HELD_OUT: f64 = 0.25;
/// Tokens of a forward pass, padding included, longer samples aside: a number of its own, so that the fit does not depend on
/// how steps are cut into passes.
const PASS_TOKENS: usize = 512;
/// Memory for the dense model's stream at the points that are asked for together.
const TARGET_BYTES: u64 = 1 << 30;

/// A forward pass's samples and the stream that it has reached, `[B, T, D]`.
struct Pass {
    samples: Vec<usize>,
    stream: Option<Tensor>,
}

/// The samples that a fit looks at, in passes: those of this process, the tokens of all of them.
struct Drawn {
    fitted: Vec<Pass>,
    held_out: Vec<Pass>,
    tokens: u64,
    held_out_tokens: u64,
}

impl Drawn {
    /// The samples of this process.
    fn samples(&self) -> Vec<usize> {
        self.fitted.iter().chain(&self.held_out).flat_map(|pass| pass.samples.iter().copied()).collect()
    }
}

/// Fits the layers in place, each weight of `students` that a target names.
///
/// Errors: `Error::Invalid` when an operator refuses its tensors; `Error::NotFinite` when a sum is not finite;
/// `Error::Interrupted`. The weights are what they were then.
pub fn fit(
    run: &Run<'_>,
    students: &mut [Student],
    targets: &[FitTarget],
    dataset: &mut TrainingSet,
) -> Result<Vec<LayerFit>> {
    let _guard = tch::no_grad_guard();
    let drawn = draw(run, targets, dataset);
    run.load(dataset, &drawn.samples())?;
    let mut done = Vec::new();
    let result = fit_each(run, students, targets, dataset, drawn, &mut done);
    if result.is_err() {
        done.into_iter().rev().try_for_each(Fitted::undo)?;
    }
    result
}

/// Draws the samples: as many as the widest product wants tokens, every fourth token's sample held out. Passes are dealt out
/// to the ranks one by one; which samples share one does not depend on how many ranks there are.
fn draw(run: &Run<'_>, targets: &[FitTarget], dataset: &TrainingSet) -> Drawn {
    let settings = run.settings;
    let widths = targets.iter().flat_map(|target| &target.products).flatten().map(|product| product.width);
    let most = settings.fit_budget(widths.max().unwrap_or(0) as u64).min(FIT_TOKENS) as usize;
    let mut tokens = 0;
    let drawn = order::epoch(settings, &dataset.lengths(), 0).concat().concat();
    let count = drawn.iter().take_while(|&&sample| {
        tokens += dataset.examples[sample].length;
        tokens <= most
    });
    let count = count.count().max(1).min(drawn.len());
    let samples = drawn[..count].to_vec();
    let (fitted, held_out) = held_out(&samples, |sample| dataset.examples[sample].length);
    let length = |samples: &[usize]| samples.iter().map(|&sample| dataset.examples[sample].length as u64).sum::<u64>();
    let (all, apart) = (length(&samples), length(&held_out));
    let (rank, size) = run.ranks.map_or((0, 1), |ranks| (ranks.rank(), ranks.size()));
    let passes = |samples: Vec<usize>| -> Vec<Pass> {
        let passes = workers::passes_of(dataset, samples, PASS_TOKENS).into_iter();
        passes.skip(rank).step_by(size).map(|samples| Pass { samples, stream: None }).collect()
    };
    Drawn { fitted: passes(fitted), held_out: passes(held_out), tokens: all, held_out_tokens: apart }
}

/// Parts samples so that those held out have a quarter of the tokens, to within half a sample.
fn held_out(samples: &[usize], length: impl Fn(usize) -> usize) -> (Vec<usize>, Vec<usize>) {
    let (mut fitted, mut apart) = (Vec::new(), Vec::new());
    let (mut seen, mut held) = (0.0, 0.0);
    for &sample in samples {
        let own = length(sample) as f64;
        seen += own;
        if held + own / 2.0 <= HELD_OUT * seen && !fitted.is_empty() {
            held += own;
            apart.push(sample);
        } else {
            fitted.push(sample);
        }
    }
    (fitted, apart)
}

/// The dense model's stream behind the layers that are fitted next, for the drawn samples.
struct Targets<'a> {
    dataset: &'a TrainingSet,
    source: Option<&'a dyn DenseStream>,
    samples: &'a [usize],
    tokens: u64,
    held: BTreeMap<usize, BTreeMap<usize, Vec<u8>>>,
}

impl Targets<'_> {
    /// Makes the stream behind `layers[0]` available, and as many of those after it as there is room for.
    fn reach(&mut self, layers: &[usize]) -> Result<()> {
        let Some(&first) = layers.first() else { return Ok(()) };
        self.held.retain(|layer, _| *layer >= first);
        if self.dataset.has_target(first) || self.held.contains_key(&first) || self.samples.is_empty() {
            return Ok(());
        }
        let source = self.source.ok_or_else(|| Error::invalid("the fit", "has no dense model"))?;
        let each = 2 * self.tokens * self.dataset.hidden_size() as u64;
        let room = (TARGET_BYTES / each.max(1)).max(1) as usize;
        let wanted: Vec<usize> = layers.iter().copied().take(room).collect();
        let found = source.behind(&wanted, self.samples)?;
        self.held.extend(wanted.into_iter().zip(found));
        Ok(())
    }

    /// The rows of a pass's samples, `[M, D]`.
    fn of(&self, layer: usize, samples: &[usize]) -> Result<Option<Tensor>> {
        let Some(held) = self.held.get(&layer) else { return Ok(None) };
        let lacking = || Error::invalid("the fit", format!("has no target behind layer {layer}"));
        let mut bytes = Vec::new();
        for sample in samples {
            bytes.extend_from_slice(held.get(sample).ok_or_else(lacking)?);
        }
        bf16_matrix(&bytes, self.dataset.hidden_size()).map(Some)
    }
}

/// [`fit`], which notes what it changed in `done`.
fn fit_each(
    run: &Run<'_>,
    students: &mut [Student],
    targets: &[FitTarget],
    dataset: &TrainingSet,
    mut drawn: Drawn,
    done: &mut Vec<Fitted>,
) -> Result<Vec<LayerFit>> {
    let Run { first, .. } = *run;
    let (tokens, held_out_tokens) = (drawn.tokens, drawn.held_out_tokens);
    let samples = drawn.samples();
    let held = BTreeMap::new();
    let own_tokens = samples.iter().map(|&sample| dataset.examples[sample].length as u64).sum();
    let mut streams = Targets { dataset, source: run.dense, samples: &samples, tokens: own_tokens, held };
    let products = targets.iter().flat_map(|target| &target.products).map(Vec::len).sum::<usize>();
    let progress = Progress::new("fit", "samples", (products * samples.len()) as u64);
    let mut results = Vec::with_capacity(targets.len());
    let mut reached = dataset.begins_before();
    for (number, target) in targets.iter().enumerate() {
        let coming = targets[number..].iter().filter(|target| target.products.is_ok());
        streams.reach(&coming.map(|target| target.layer).collect::<Vec<_>>())?;
        let mut result = LayerFit {
            layer: first + target.layer,
            weights: Vec::new(),
            problem: target.products.as_ref().err().cloned(),
            distance_before: None,
            distance_after: None,
            ridges: Vec::new(),
            tokens,
            held_out_tokens,
        };
        let mut last: Option<f64> = None;
        for product in target.products.iter().flatten() {
            let mut measured = || {
                let from = std::mem::replace(&mut reached, target.layer);
                measure(run, students, &mut drawn, &streams, from, (target.layer, product))
            };
            let mut parts = measured()?;
            if last.take_if(|before| parts.distance() > *before).is_some()
                && let Some(worse) = done.pop()
            {
                worse.undo()?;
                result.weights.pop();
                result.ridges.pop();
                parts = measured()?;
            }
            progress.advance(samples.len() as u64);
            let distance = parts.distance();
            let (ridge, sums, solved) = choose(parts)?;
            let (name, weight) = students[0].weight_of(product.weight)?;
            let change = if product.transposed { solved.change.tr() } else { solved.change };
            done.push(Fitted::change(name.clone(), weight, &change)?);
            last = Some(distance);
            result.weights.push(name);
            result.ridges.push(ridge);
            result.distance_before.get_or_insert(sums.distance / sums.tokens.max(1.0));
            result.distance_after = Some(solved.distance / sums.tokens.max(1.0));
        }
        results.push(result);
    }
    Ok(results)
}

/// A weight that was changed, and what it was.
struct Fitted {
    name: String,
    weight: Tensor,
    before: Tensor,
}

impl Fitted {
    fn change(name: String, mut weight: Tensor, change: &Tensor) -> Result<Self> {
        let mut compute = || -> Result<Tensor, tch::TchError> {
            let before = weight.f_detach()?.f_add_scalar(0.0)?;
            let _ = weight.f_add_(change)?;
            Ok(before)
        };
        let before = compute().map_err(torch_error(format!("initializer `{name}`")))?;
        Ok(Fitted { name, weight, before })
    }

    fn undo(mut self) -> Result<()> {
        self.weight.f_copy_(&self.before).map_err(torch_error(format!("initializer `{}`", self.name)))
    }
}

/// Sums over the samples that a weight is fitted on, and over those that are held out.
struct Parts {
    fitted: Normal,
    held_out: Normal,
}

impl Parts {
    fn distance(&self) -> f64 {
        self.fitted.distance + self.held_out.distance
    }
}

/// Brings every pass's stream from layer `from` to the layer to fit, and gives the sums behind that.
///
/// Passes run side by side; what they give is added in their order.
fn measure(
    run: &Run<'_>,
    students: &mut [Student],
    drawn: &mut Drawn,
    targets: &Targets<'_>,
    from: usize,
    (layer, product): (usize, &Projection),
) -> Result<Parts> {
    let width = targets.dataset.hidden_size() as i64;
    let sums = |students: &mut [Student], passes: &mut [Pass]| -> Result<Normal> {
        let mut sums = Normal::new(product.width as i64, width, run.device)?;
        let together = students.len().max(1);
        for passes in passes.chunks_mut(together) {
            run.cancel.check("nothing of the fit is kept")?;
            let rows = workers::side_by_side(students, passes, run, |student, pass| {
                rows(student, targets, pass, from, (layer, product), run.device)
            })?;
            sums.add(&rows)?;
        }
        if let Some(ranks) = run.ranks {
            sums.sum_over(ranks)?;
        }
        Ok(sums)
    };
    Ok(Parts { fitted: sums(students, &mut drawn.fitted)?, held_out: sums(students, &mut drawn.held_out)? })
}

/// The ridge, the sums over all passes, and the change of the weight that follows from both.
fn choose(parts: Parts) -> Result<(f64, Normal, Solved)> {
    let Parts { mut fitted, held_out } = parts;
    let mut chosen = (FEW_SAMPLES_RIDGE, f64::INFINITY);
    if held_out.tokens > 0.0 {
        for ridge in RIDGES {
            let left = held_out.distance_with(&fitted.solve(ridge)?.change)?;
            if left < chosen.1 {
                chosen = (ridge, left);
            }
        }
    }
    fitted.absorb(&held_out)?;
    let solved = fitted.solve(chosen.0)?;
    Ok((chosen.0, fitted, solved))
}

/// Brings a pass's stream to the layer to fit, and gives what the product reads there and what it is to explain.
fn rows(
    student: &Student,
    targets: &Targets<'_>,
    pass: &mut Pass,
    from: usize,
    (layer, product): (usize, &Projection),
    device: Device,
) -> Result<Rows> {
    let _guard = tch::no_grad_guard();
    // Of the targets only the one behind this layer is read, and that from memory where it is there.
    let own = targets.of(layer, &pass.samples)?;
    let read = if own.is_some() { 0..0 } else { layer..layer + 1 };
    let batch = targets.dataset.batch_with(&pass.samples, Some(read), false, device)?;
    let side = student.side(&batch)?;
    let mut stream = pass.stream.take().unwrap_or_else(|| batch.hidden.shallow_clone());
    for number in from..layer {
        stream = student.layer(number, &stream, &side)?;
    }
    let (output, operand) = student.layer_with(layer, &stream, &side, product.operand)?;
    pass.stream = Some(stream);
    let target = own.as_ref().or_else(|| batch.streams.get(&(layer + 1)));
    let target = target.ok_or_else(|| Error::invalid("the fit", format!("has no target behind layer {layer}")))?;
    let places = (batch.step.batch() * batch.step.time()) as i64;
    let compute = || -> Result<Rows, tch::TchError> {
        let rows = |x: &Tensor| -> Result<Tensor, tch::TchError> {
            x.f_reshape([places, -1])?.f_index_select(0, &batch.real_rows)?.f_to_kind(Kind::Float)
        };
        let target = target.f_to_device(device)?.f_to_kind(Kind::Float)?;
        let length = target.f_square()?.f_sum_dim_intlist(-1, true, Kind::Float)?.f_clamp_min(1e-12)?;
        let scale = length.f_rsqrt()?;
        let rest = target.f_sub(&rows(&output)?)?.f_mul(&scale)?;
        Ok(Rows { operand: rows(&operand)?.f_mul(&scale)?, rest })
    };
    compute().map_err(torch_error("the fit"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_undone_to_the_bit() {
        let weight = Tensor::from_slice(&[0.1f32, 1e-7, -3.0]);
        let fitted = Fitted::change("w".into(), weight.shallow_clone(), &Tensor::from_slice(&[1e3f32; 3])).unwrap();
        assert!(weight.get(0).double_value(&[]) > 1e3);
        fitted.undo().unwrap();
        assert!(weight.equal(&Tensor::from_slice(&[0.1f32, 1e-7, -3.0])));
    }

    #[test]
    fn a_quarter_of_the_tokens_is_held_out_for_any_number_of_samples() {
        let lengths = [310usize, 270, 455, 290, 512, 330, 280, 300, 325, 61];
        for count in 4..=10 {
            let samples: Vec<usize> = (0..count).collect();
            let (fitted, apart) = held_out(&samples, |sample| lengths[sample]);
            let total = |samples: &[usize]| samples.iter().map(|&sample| lengths[sample]).sum::<usize>() as f64;
            assert_eq!(fitted.len() + apart.len(), count);
            let part = total(&apart) / total(&samples);
            assert!((part - 0.25).abs() * total(&samples) <= 512.0 / 2.0 + 1.0, "{count}: {part}");
        }
        assert_eq!(held_out(&[7], |_| 100), (vec![7], vec![]));
    }

    /// Few rows and much noise want a large ridge, many rows without noise a small one.
    #[test]
    fn the_ridge_is_chosen_on_the_held_out_rows() {
        tch::manual_seed(3);
        let weight = Tensor::randn([16, 2], (Kind::Float, Device::Cpu));
        let sums = |rows: i64, noise: f64| {
            let h = Tensor::randn([rows, 16], (Kind::Float, Device::Cpu));
            let rest = h.matmul(&weight) + noise * Tensor::randn([rows, 2], (Kind::Float, Device::Cpu));
            let mut sums = Normal::new(16, 2, Device::Cpu).unwrap();
            sums.add(&[Rows { operand: h, rest }]).unwrap();
            sums
        };
        let none = || Normal::new(16, 2, Device::Cpu).unwrap();
        let ridge = |rows, noise| choose(Parts { fitted: sums(rows, noise), held_out: sums(512, noise) }).unwrap().0;
        assert_eq!((ridge(4096, 0.0), ridge(24, 20.0)), (0.003, 0.3));
        let alone = choose(Parts { fitted: sums(64, 1.0), held_out: none() }).unwrap();
        assert_eq!(alone.0, 0.1);
    }
}
