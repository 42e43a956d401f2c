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
//! The ridge is the one of [`RIDGES`] that, fitted on three quarters of the forward passes, leaves least on the rest; all
//! of them decide the weight with it.
//!
//! What a product before the last gives is read by the rest of the layer too, in which it is not linear. It is fitted as if
//! that stayed as it is, and set back where the layer then is farther from the dense stream than before. The layers are
//! fitted from the first to the last, each on the stream that the fitted ones before it give.

use tch::{Device, Kind, Tensor};

use crate::base::{Error, Progress, Result};

use super::context::Run;
use super::workers;
use crate::finetune::cut::{FitTarget, Projection};
use crate::finetune::data::TrainingSet;
use crate::finetune::error::torch_error;
use crate::finetune::plan::{FIT_TOKENS, order};
use crate::finetune::record::LayerFit;
use crate::finetune::student::Student;

/// Ridges to choose from, the last one where there are too few passes to choose by.
const RIDGES: [f64; 5] = [0.003, 0.01, 0.03, 0.3, 0.1];

/// Every this many forward passes one is held out when the ridge is chosen.
const HELD_OUT: usize = 4;

/// Sums over the tokens.
#[derive(Default)]
struct Sums {
    /// `[K, K]` and `[K, D]`, f32.
    normal: Option<(Tensor, Tensor)>,
    distance: f64,
    tokens: f64,
}

/// A forward pass's samples and the stream that it has reached, `[B, T, D]`.
struct Pass {
    samples: Vec<usize>,
    held_out: bool,
    stream: Option<Tensor>,
}

/// Fits the layers in place, each weight of `students` that a target names.
///
/// Errors: `Error::Invalid` when an operator refuses its tensors; `Error::NotFinite` when a sum is not finite;
/// `Error::Interrupted`. The weights are what they were then.
pub fn fit(
    run: &Run<'_>,
    students: &mut [Student],
    targets: &[FitTarget],
    dataset: &TrainingSet,
) -> Result<Vec<LayerFit>> {
    let _guard = tch::no_grad_guard();
    let mut done = Vec::new();
    let result = fit_each(run, students, targets, dataset, &mut done);
    if result.is_err() {
        done.into_iter().rev().try_for_each(Fitted::undo)?;
    }
    result
}

/// [`fit`], which notes what it changed in `done`.
fn fit_each(
    run: &Run<'_>,
    students: &mut [Student],
    targets: &[FitTarget],
    dataset: &TrainingSet,
    done: &mut Vec<Fitted>,
) -> Result<Vec<LayerFit>> {
    let Run { settings, device, cancel, first, .. } = *run;
    let widths = targets.iter().flat_map(|target| &target.products).flatten().map(|product| product.width);
    let most =
        widths.max().unwrap_or(0).saturating_mul(settings.fit_tokens_per_feature as usize).min(FIT_TOKENS as usize);
    let mut tokens = 0;
    let drawn = order::epoch(settings, &dataset.lengths(), 0).concat().concat();
    let count = drawn.iter().take_while(|&&sample| {
        tokens += dataset.examples[sample].length;
        tokens <= most
    });
    let count = count.count().max(1).min(drawn.len());
    let shares = workers::deal(dataset, drawn[..count].to_vec(), students.len(), run.batch_tokens).into_iter();
    let pass = |(number, samples)| Pass { samples, held_out: number % HELD_OUT == HELD_OUT - 1, stream: None };
    let mut shares: Vec<Vec<Pass>> = shares.map(|share| share.into_iter().enumerate().map(pass).collect()).collect();
    let products = targets.iter().flat_map(|target| &target.products).map(Vec::len).sum::<usize>();
    let progress = Progress::new("fit", "samples", (products * count) as u64);
    let mut results = Vec::with_capacity(targets.len());
    let mut reached = dataset.begins_before();
    for target in targets {
        let mut result = LayerFit {
            layer: first + target.layer,
            weights: Vec::new(),
            problem: target.products.as_ref().err().cloned(),
            distance_before: None,
            distance_after: None,
            ridges: Vec::new(),
        };
        let mut last: Option<f64> = None;
        for product in target.products.iter().flatten() {
            let mut measured = || {
                let from = std::mem::replace(&mut reached, target.layer);
                over(students, &mut shares, device, |student, pass| {
                    cancel.check("nothing of the fit is kept")?;
                    measure(student, dataset, pass, from, target.layer, product, device)
                })
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
            progress.advance(count as u64);
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

/// Sums over the passes that a weight is fitted on, and over those that are held out.
#[derive(Default)]
struct Parts {
    fitted: Sums,
    held_out: Sums,
}

impl Parts {
    fn distance(&self) -> f64 {
        self.fitted.distance + self.held_out.distance
    }
}

/// Runs `work` over every pass, a thread per student, and adds up what it gives, always in the same order.
fn over(
    students: &mut [Student],
    shares: &mut [Vec<Pass>],
    device: Device,
    work: impl Fn(&Student, &mut Pass) -> Result<Sums> + Sync,
) -> Result<Parts> {
    let results = workers::side_by_side(students, shares, device, |student, passes| {
        let _guard = tch::no_grad_guard();
        let mut total = Parts::default();
        for pass in passes {
            let sums = work(student, pass)?;
            if pass.held_out { total.held_out.absorb(sums)? } else { total.fitted.absorb(sums)? }
        }
        Ok(total)
    })?;
    let mut total = Parts::default();
    for parts in results {
        total.fitted.absorb(parts.fitted)?;
        total.held_out.absorb(parts.held_out)?;
    }
    Ok(total)
}

/// The ridge, the sums over all passes, and the change of the weight that follows from both.
fn choose(parts: Parts) -> Result<(f64, Sums, Solved)> {
    let Parts { mut fitted, held_out } = parts;
    let mut chosen = (RIDGES[RIDGES.len() - 1], f64::INFINITY);
    if held_out.normal.is_some() && fitted.normal.is_some() {
        for ridge in RIDGES {
            let left = held_out.distance_with(&solve(&fitted, ridge)?.change)?;
            if left < chosen.1 {
                chosen = (ridge, left);
            }
        }
    }
    fitted.absorb(held_out)?;
    let solved = solve(&fitted, chosen.0)?;
    Ok((chosen.0, fitted, solved))
}

/// Brings a pass's stream from layer `from` to the layer to fit, and gives the sums behind that.
fn measure(
    student: &Student,
    dataset: &TrainingSet,
    pass: &mut Pass,
    from: usize,
    layer: usize,
    product: &Projection,
    device: Device,
) -> Result<Sums> {
    let batch = dataset.batch(&pass.samples, device)?;
    let side = student.side(&batch)?;
    let mut stream = pass.stream.take().unwrap_or_else(|| batch.hidden.shallow_clone());
    for number in from..layer {
        stream = student.layer(number, &stream, &side)?;
    }
    let (output, operand) = student.layer_with(layer, &stream, &side, product.operand)?;
    pass.stream = Some(stream);
    let target = batch.streams.get(&(layer + 1));
    let target = target.ok_or_else(|| Error::invalid("the fit", format!("has no target behind layer {layer}")))?;
    let places = (batch.step.batch() * batch.step.time()) as i64;
    let compute = || -> Result<Sums, tch::TchError> {
        let rows = |x: &Tensor| -> Result<Tensor, tch::TchError> {
            x.f_reshape([places, -1])?.f_index_select(0, &batch.real_rows)?.f_to_kind(Kind::Float)
        };
        let target = target.f_to_kind(Kind::Float)?;
        let length = target.f_square()?.f_sum_dim_intlist(-1, true, Kind::Float)?.f_clamp_min(1e-12)?;
        let scale = length.f_rsqrt()?;
        let rest = target.f_sub(&rows(&output)?)?.f_mul(&scale)?;
        let operand = rows(&operand)?.f_mul(&scale)?;
        let turned = operand.f_tr()?;
        Ok(Sums {
            normal: Some((turned.f_matmul(&operand)?, turned.f_matmul(&rest)?)),
            distance: rest.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?,
            tokens: batch.real_rows.size()[0] as f64,
        })
    };
    compute().map_err(torch_error("the fit"))
}

/// The change of the weight, `[K, D]`, and the sum of squared distances that is left with it.
struct Solved {
    change: Tensor,
    distance: f64,
}

/// Errors: `Error::NotFinite` when a sum is not finite.
fn solve(sums: &Sums, ridge: f64) -> Result<Solved> {
    let Some((normal, right)) = &sums.normal else { return Err(Error::invalid("the fit", "has no sample")) };
    let compute = || -> Result<Tensor, tch::TchError> {
        let (a, b) = (normal.f_to_kind(Kind::Double)?, right.f_to_kind(Kind::Double)?);
        let added = a.f_diag(0)?.f_mean(Kind::Double)?.f_mul_scalar(ridge)?.f_clamp_min(f64::MIN_POSITIVE)?;
        let size = a.size()[0];
        let damped = a.f_add(&Tensor::f_eye(size, (Kind::Double, a.device()))?.f_mul(&added)?)?;
        let change = b.f_cholesky_solve(&damped.f_linalg_cholesky(false)?, false)?;
        change.f_to_kind(Kind::Float)
    };
    if !sums.distance.is_finite() {
        return Err(Error::not_finite("the fit", "the stream or the dense model's stream is not finite")
            .remedy("take a lower learning rate, or look at the samples with `interlace score`"));
    }
    let change = compute().map_err(torch_error("the fit"))?;
    let distance = sums.distance_with(&change)?;
    Ok(Solved { change, distance })
}

impl Sums {
    /// The sum of squared distances with a change of the weight: `|e - h D|^2 = |e|^2 - 2 <D, B> + <D, A D>`.
    fn distance_with(&self, change: &Tensor) -> Result<f64> {
        let Some((a, b)) = &self.normal else { return Ok(self.distance) };
        let compute = || -> Result<f64, tch::TchError> {
            let (a, b, d) = (a.f_to_kind(Kind::Double)?, b.f_to_kind(Kind::Double)?, change.f_to_kind(Kind::Double)?);
            let moved = a.f_matmul(&d)?.f_sub(&b)?.f_sub(&b)?;
            d.f_mul(&moved)?.f_sum(Kind::Double)?.f_double_value(&[])
        };
        Ok(self.distance + compute().map_err(torch_error("the fit"))?)
    }

    fn absorb(&mut self, other: Sums) -> Result<()> {
        self.distance += other.distance;
        self.tokens += other.tokens;
        match (&mut self.normal, other.normal) {
            (Some((a, b)), Some((c, d))) => {
                let _ = a.f_add_(&c).and_then(|_| b.f_add_(&d)).map_err(torch_error("the fit"))?;
            }
            (empty @ None, found) => *empty = found,
            (Some(_), None) => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows made by a known weight are explained by it, and the distance left is 0.
    #[test]
    fn a_weight_that_explains_the_rest_is_found() {
        tch::manual_seed(7);
        let h = Tensor::randn([64, 5], (Kind::Float, Device::Cpu));
        let want = Tensor::randn([5, 3], (Kind::Float, Device::Cpu));
        let rest = h.matmul(&want);
        let sums = Sums {
            normal: Some((h.tr().matmul(&h), h.tr().matmul(&rest))),
            distance: rest.square().sum(Kind::Double).double_value(&[]),
            tokens: 64.0,
        };
        let solved = solve(&sums, 1e-9).unwrap();
        assert!((&solved.change - &want).abs().max().double_value(&[]) < 1e-4);
        assert!(solved.distance.abs() < 1e-4 * sums.distance, "{}", solved.distance);
        // With an ever larger ridge the weight stays as it is.
        let still = solve(&sums, 1e9).unwrap();
        assert!(still.change.abs().max().double_value(&[]) < 1e-6);
        assert!((still.distance / sums.distance - 1.0).abs() < 1e-6);
    }

    #[test]
    fn a_change_is_undone_to_the_bit() {
        let weight = Tensor::from_slice(&[0.1f32, 1e-7, -3.0]);
        let fitted = Fitted::change("w".into(), weight.shallow_clone(), &Tensor::from_slice(&[1e3f32; 3])).unwrap();
        assert!(weight.get(0).double_value(&[]) > 1e3);
        fitted.undo().unwrap();
        assert!(weight.equal(&Tensor::from_slice(&[0.1f32, 1e-7, -3.0])));
    }

    /// One feature, by hand: `(a + ridge * a) d = b`.
    #[test]
    fn the_ridge_is_relative_to_the_mean_square() {
        let scalar = |value: f32| Tensor::from_slice(&[value]).view([1, 1]);
        let sums = Sums { normal: Some((scalar(4.0), scalar(6.0))), distance: 10.0, tokens: 1.0 };
        let solved = solve(&sums, 0.5).unwrap();
        assert!((solved.change.double_value(&[0, 0]) - 1.0).abs() < 1e-6);
        assert!((solved.distance - (10.0 - 2.0 * 6.0 + 4.0)).abs() < 1e-6);
        let broken = Sums { distance: f64::NAN, ..sums };
        assert!(solve(&broken, 0.5).is_err());
    }

    /// Few rows and much noise want a large ridge, many rows without noise a small one.
    #[test]
    fn the_ridge_is_chosen_on_what_was_held_out() {
        tch::manual_seed(3);
        let weight = Tensor::randn([16, 2], (Kind::Float, Device::Cpu));
        let sums = |rows: i64, noise: f64| {
            let h = Tensor::randn([rows, 16], (Kind::Float, Device::Cpu));
            let rest = h.matmul(&weight) + noise * Tensor::randn([rows, 2], (Kind::Float, Device::Cpu));
            Sums {
                normal: Some((h.tr().matmul(&h), h.tr().matmul(&rest))),
                distance: rest.square().sum(Kind::Double).double_value(&[]),
                tokens: rows as f64,
            }
        };
        let ridge = |rows, noise| choose(Parts { fitted: sums(rows, noise), held_out: sums(512, noise) }).unwrap().0;
        assert_eq!((ridge(4096, 0.0), ridge(24, 20.0)), (0.003, 0.3));
        let alone = choose(Parts { fitted: sums(64, 1.0), held_out: Sums::default() }).unwrap();
        assert_eq!(alone.0, 0.1);
    }
}
