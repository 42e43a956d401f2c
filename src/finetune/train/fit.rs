//! Least-squares fit of trained layers before the first step. A layer's output is a sum of the results of a few
//! products; in most networks these are the last products of attention and MLP. Each is fitted to the dense model's
//! stream.
//!
//! A layer's output is linear in its last weight: `y = r + h W`, with `h` the operand of the product. The weight that
//! brings `y` closest to the dense stream `t` has a closed form. Over all tokens, each weighted by `1 / |t|^2`, the
//! change `D` that minimises `sum |t - y - h D|^2 / |t|^2 + ridge * mean(diag A) * |D|^2` solves
//!
//! `(A + ridge * mean(diag A) * I) D = B`, `A = sum h^T h / |t|^2`, `B = sum h^T (t - y) / |t|^2`
//!
//! (ridge regression; Hoerl and Kennard 1970). The sum is the quantity that the loss term `anchor` measures behind the
//! trained layer. The weight is fitted with each value of [`RIDGES`] on three quarters of the tokens. The value with
//! the smallest distance on the held-out quarter is used for a fit on all samples. With too few samples to hold any
//! out, [`FEW_SAMPLES_RIDGE`] is used.
//!
//! The result of an earlier product also enters the rest of the layer, which is not linear in it. The product is fitted
//! as if the rest did not change, and the fit is undone if the layer is then farther from the dense stream than before.
//! Layers are fitted from the first to the last, each on the output of the fitted layers before it.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::analysis::Projection;
use crate::base::{Error, Progress, Result, notice};
use crate::finetune::cut::FitTarget;
use crate::finetune::data::{Feeds, TrainingBatch, TrainingSet, bf16_matrix};
use crate::finetune::error::torch_error;
use crate::finetune::plan::{FIT_PASS_TOKENS, FIT_TOKENS, order};
use crate::finetune::record::LayerFit;
use crate::finetune::student::Student;

use super::batches::each_batch;
use super::context::{Run, kept_aside};
use super::normal::{Normal, PassRows, Solved};
use super::workers;

/// Candidate ridges.
const RIDGES: [f64; 4] = [0.003, 0.01, 0.03, 0.3];
/// Ridge when there are too few samples to choose one.
const FEW_SAMPLES_RIDGE: f64 = 0.1;
/// Share of the tokens held out for the choice of the ridge.
const HELD_OUT: f64 = 0.25;

/// Samples of a forward pass, and its current stream `[B, T, D]`.
struct Pass {
    samples: Vec<usize>,
    stream: Option<Tensor>,
}

/// Passes of a fit in this process, the token counts of all processes, and the dense model's stream behind the next layers
/// to fit.
pub struct Drawn {
    fitted: Vec<Pass>,
    held_out: Vec<Pass>,
    tokens: u64,
    held_out_tokens: u64,
    /// Rows of each sample in bf16, by layer.
    held: Rows,
}

/// The dense model's stream behind some layers: rows in bf16, by layer and sample. They are in host memory.
type Rows = BTreeMap<usize, BTreeMap<usize, Vec<u8>>>;

impl Drawn {
    /// Draws the samples of a fit and computes the dense model's stream behind as many of its layers as are held at a time.
    /// Before the networks exist, the dense model has the memory for itself.
    ///
    /// Errors: those of a run of the dense model.
    pub fn new(run: &Run<'_>, targets: &[FitTarget], dataset: &TrainingSet) -> Result<Self> {
        let mut drawn = draw(run, targets, dataset);
        let layers = fittable(targets);
        if drawn.held_out_tokens == 0 && !layers.is_empty() {
            say_nothing_is_held_out();
        }
        drawn.load(run, &layers)?;
        Ok(drawn)
    }

    /// Loads the dense model's stream behind `layers[0]`, and behind as many of the next layers as are held at a time.
    fn load(&mut self, run: &Run<'_>, layers: &[usize]) -> Result<()> {
        let (Some(&next), Some(source)) = (layers.first(), run.dense) else { return Ok(()) };
        self.held.retain(|layer, _| *layer >= next);
        let samples = self.samples();
        if !source.computes(next) || self.held.contains_key(&next) || samples.is_empty() {
            return Ok(());
        }
        let computed = layers.iter().copied().filter(|&layer| source.computes(layer));
        let wanted: Vec<usize> = computed.take(run.fit_layers.max(1)).collect();
        run.release_cached()?;
        let found = source.rows_behind(&wanted, &samples)?;
        self.held.extend(wanted.into_iter().zip(found));
        Ok(())
    }

    /// The samples of this process.
    fn samples(&self) -> Vec<usize> {
        self.fitted.iter().chain(&self.held_out).flat_map(|pass| pass.samples.iter().copied()).collect()
    }
}

/// Tells the user that a fit has no sample to choose its ridge by.
pub fn say_nothing_is_held_out() {
    notice(format!(
        "the fit has a single sample and holds none out: its ridge is {FEW_SAMPLES_RIDGE}, chosen by no sample; draw more \
         samples, or raise `fit.tokens`"
    ));
}

/// The layers of `targets` that have a product to fit.
fn fittable(targets: &[FitTarget]) -> Vec<usize> {
    targets.iter().filter(|target| target.products.is_ok()).map(|target| target.layer).collect()
}

/// Fits the layers in place: every weight of `students` that a target names. `drawn`: the samples, when they are drawn
/// already.
///
/// Errors: `Error::Invalid` when an operator refuses its tensors; `Error::NotFinite` when a sum is not finite;
/// `Error::Interrupted`. After an error the weights are restored.
pub fn fit(
    run: &Run<'_>,
    students: &mut [Student],
    targets: &[FitTarget],
    dataset: &mut TrainingSet,
    drawn: Option<Drawn>,
) -> Result<Vec<LayerFit>> {
    let _guard = tch::no_grad_guard();
    let drawn = drawn.unwrap_or_else(|| draw(run, targets, dataset));
    run.load(dataset, &drawn.samples())?;
    if let Some(streamed) = run.streamed {
        // The rows are on disk; the normal matrices take the memory of the models that computed them.
        streamed.release();
    }
    let mut done = Vec::new();
    let result = fit_each(run, students, targets, dataset, drawn, &mut done);
    if result.is_err() {
        done.into_iter().rev().try_for_each(Fitted::undo)?;
    }
    result
}

/// Draws samples up to the token budget of the widest product and holds out a quarter of the tokens. Passes are
/// distributed over the ranks one by one; the samples of a pass do not depend on the number of ranks.
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
        let passes = workers::passes_of(dataset, samples, FIT_PASS_TOKENS).into_iter();
        passes.skip(rank).step_by(size).map(|samples| Pass { samples, stream: None }).collect()
    };
    let held = Rows::new();
    Drawn { fitted: passes(fitted), held_out: passes(held_out), tokens: all, held_out_tokens: apart, held }
}

/// Splits samples into those to fit on and those held out. The held-out ones have a quarter of the tokens, to within
/// half a sample.
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

/// Rows of a pass's samples behind a layer, `[M, D]`; `None` when they are on disk.
fn held_rows(held: &Rows, layer: usize, samples: &[usize], width: usize) -> Result<Option<Tensor>> {
    let Some(held) = held.get(&layer) else { return Ok(None) };
    let lacking = || Error::invalid("the fit", format!("has no target behind layer {layer}"));
    let mut bytes = Vec::new();
    for sample in samples {
        bytes.extend_from_slice(held.get(sample).ok_or_else(lacking)?);
    }
    bf16_matrix(&bytes, width).map(Some)
}

/// [`fit`] without the restoration; adds each change to `done`.
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
    let products = targets.iter().flat_map(|target| &target.products).map(Vec::len).sum::<usize>();
    let progress = Progress::new("fit", "samples", (products * samples.len()) as u64);
    let mut results = Vec::with_capacity(targets.len());
    let mut reached = dataset.begins_before();
    for (number, target) in targets.iter().enumerate() {
        drawn.load(run, &fittable(&targets[number..]))?;
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
                measure(run, students, &mut drawn, dataset, from, (target.layer, product))
            };
            let mut parts = measured()?;
            let mut distance = parts.distance()?;
            if last.take_if(|before| distance > *before).is_some()
                && let Some(worse) = done.pop()
            {
                worse.undo()?;
                result.weights.pop();
                result.ridges.pop();
                parts = measured()?;
                distance = parts.distance()?;
            }
            progress.advance(samples.len() as u64);
            let (ridge, sums, solved) = choose(parts)?;
            let (name, weight) = students[0].weight_of(product.weight)?;
            let change = if product.transposed { solved.change.tr() } else { solved.change };
            done.push(Fitted::change(name.clone(), weight, &change)?);
            last = Some(distance);
            result.weights.push(name);
            result.ridges.push(ridge);
            result.distance_before.get_or_insert(sums.distance()? / sums.tokens.max(1.0));
            result.distance_after = Some(solved.distance / sums.tokens.max(1.0));
        }
        results.push(result);
    }
    Ok(results)
}

/// A fitted weight and its values before the fit.
struct Fitted {
    name: String,
    weight: Tensor,
    before: Tensor,
}

impl Fitted {
    fn change(name: String, mut weight: Tensor, change: &Tensor) -> Result<Self> {
        let mut compute = || -> Result<Tensor, tch::TchError> {
            let before = kept_aside(&weight)?;
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

/// Sums over the samples of the fit, and over the held-out samples.
struct Parts {
    fitted: Normal,
    held_out: Normal,
}

impl Parts {
    fn distance(&self) -> Result<f64> {
        Ok(self.fitted.distance()? + self.held_out.distance()?)
    }
}

/// Advances every pass's stream from layer `from` to `layer` and returns the sums of the product's normal equations.
///
/// Passes run in parallel; their results are added in the order of the passes.
fn measure(
    run: &Run<'_>,
    students: &mut [Student],
    drawn: &mut Drawn,
    dataset: &TrainingSet,
    from: usize,
    (layer, product): (usize, &Projection),
) -> Result<Parts> {
    let width = dataset.hidden_size();
    let Drawn { fitted, held_out, held, .. } = drawn;
    let held = &*held;
    let sums = |students: &mut [Student], passes: &mut [Pass]| -> Result<Normal> {
        let mut sums = Normal::new(product.width as i64, width as i64, run.device)?;
        let place = (from, layer, product);
        let stopped = || run.cancel.check("nothing of the fit is kept");
        // The batch of a pass, with the dense model's stream behind the layer.
        let make = |feeds: &Feeds, samples: &[usize]| -> Result<TrainingBatch> {
            let own = held_rows(held, layer, samples, width)?;
            let read = if own.is_some() { 0..0 } else { layer..layer + 1 };
            let mut batch = dataset.batch_with(samples, feeds, Some(read), false)?;
            batch.streams.extend(own.map(|own| (layer + 1, own)));
            Ok(batch)
        };
        if run.device == Device::Cpu {
            let together = students.len().max(1);
            for passes in passes.chunks_mut(together) {
                stopped()?;
                let rows = workers::side_by_side(students, passes, run, |student, pass| {
                    rows(student, &make(student.feeds(), &pass.samples)?, &mut pass.stream, place)
                })?;
                sums.add(&rows)?;
            }
        } else {
            let (student, feeds) = (&students[0], students[0].feeds());
            let samples: Vec<Vec<usize>> = passes.iter().map(|pass| pass.samples.clone()).collect();
            let mut streams = passes.iter_mut().map(|pass| &mut pass.stream);
            each_batch(
                &samples,
                run.device,
                |samples| make(feeds, samples),
                |_, batch| {
                    stopped()?;
                    let stream =
                        streams.next().ok_or_else(|| Error::invalid("the fit", "has more batches than passes"))?;
                    sums.add(&[rows(student, batch, stream, place)?])
                },
            )?;
        }
        if let Some(ranks) = run.ranks {
            sums.sum_over(ranks)?;
        }
        Ok(sums)
    };
    Ok(Parts { fitted: sums(students, fitted)?, held_out: sums(students, held_out)? })
}

/// Chooses the ridge. Returns it with the sums over all passes and the change of the weight.
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

/// Advances a pass's stream from one layer to another and returns the product's operand and the residual of the layer's
/// output. `batch` has the dense model's stream behind the layer.
fn rows(
    student: &Student,
    batch: &TrainingBatch,
    kept: &mut Option<Tensor>,
    (from, layer, product): (usize, usize, &Projection),
) -> Result<PassRows> {
    let _guard = tch::no_grad_guard();
    let side = student.side(batch)?;
    let mut stream = match kept.take() {
        Some(stream) => stream,
        None => student.entering(&batch.hidden)?,
    };
    for number in from..layer {
        stream = student.layer(number, &stream, &side)?;
    }
    let (output, operand) = student.layer_with(layer, &stream, &side, product.operand)?;
    *kept = Some(stream);
    let target = batch.streams.get(&(layer + 1));
    let target = target.ok_or_else(|| Error::invalid("the fit", format!("has no target behind layer {layer}")))?;
    let places = batch.places();
    let compute = || -> Result<PassRows, tch::TchError> {
        let rows = |x: &Tensor| -> Result<Tensor, tch::TchError> {
            x.f_reshape([places, -1])?.f_index_select(0, &batch.real_rows)?.f_to_kind(Kind::Float)
        };
        let target = target.f_to_kind(Kind::Float)?;
        let length = target.f_square()?.f_sum_dim_intlist(-1, true, Kind::Float)?.f_clamp_min(1e-12)?;
        let scale = length.f_rsqrt()?;
        let rest = target.f_sub(&rows(&output)?)?.f_mul(&scale)?;
        Ok(PassRows { operand: rows(&operand)?.f_mul(&scale)?, rest })
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

    /// Few rows with much noise need a large ridge, many rows without noise a small one.
    #[test]
    fn the_ridge_is_chosen_on_the_held_out_rows() {
        tch::manual_seed(3);
        let weight = Tensor::randn([16, 2], (Kind::Float, Device::Cpu));
        let sums = |rows: i64, noise: f64| {
            let h = Tensor::randn([rows, 16], (Kind::Float, Device::Cpu));
            let rest = h.matmul(&weight) + noise * Tensor::randn([rows, 2], (Kind::Float, Device::Cpu));
            let mut sums = Normal::new(16, 2, Device::Cpu).unwrap();
            sums.add(&[PassRows { operand: h, rest }]).unwrap();
            sums
        };
        let none = || Normal::new(16, 2, Device::Cpu).unwrap();
        let ridge = |rows, noise| choose(Parts { fitted: sums(rows, noise), held_out: sums(512, noise) }).unwrap().0;
        assert_eq!((ridge(4096, 0.0), ridge(24, 20.0)), (0.003, 0.3));
        let alone = choose(Parts { fitted: sums(64, 1.0), held_out: none() }).unwrap();
        assert_eq!(alone.0, 0.1);
    }
}
