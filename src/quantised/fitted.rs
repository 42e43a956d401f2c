//! Scale and zero point of a block with the least squared error.
//!
//! For given quantised numbers `q` the best scale is `sum(w x q) / sum(w q q)`, and the error that it leaves is
//! `sum(w x x) - sum(w x q)^2 / sum(w q q)`. So a grid of scales is tried, each is replaced by the best one for the numbers that it
//! gives, and the one that leaves the least error is taken.

/// Scales on each side of that of the plain range.
const STEPS: i32 = 9;
/// Distance of the zero points that are tried from that of the plain range.
const ZEROS: i32 = 2;
/// Number of times that numbers and scale are fitted to each other.
const REFINEMENTS: usize = 2;

/// The block's numbers, and how much the squared error of each counts.
struct Block<'a> {
    numbers: &'a [f32],
    weights: &'a [f32],
    most: f32,
}

/// A scale, and how much it lowers the squared error below that of zeros.
#[derive(Clone, Copy)]
struct Fit {
    scale: f32,
    zero: f32,
    gain: f64,
}

impl Block<'_> {
    /// The scale that fits best to the numbers that another scale gives.
    fn improved(&self, scale: f32, zero: f32) -> Fit {
        let reciprocal = 1.0 / scale;
        let (mut product, mut square) = (0.0f64, 0.0f64);
        for (place, &number) in self.numbers.iter().enumerate() {
            let quantised = f64::from((number * reciprocal + zero).round().clamp(0.0, self.most) - zero);
            let weighted = f64::from(self.weights.get(place).copied().unwrap_or(1.0)) * quantised;
            product += weighted * f64::from(number);
            square += weighted * quantised;
        }
        if square <= 0.0 || product == 0.0 {
            return Fit { scale, zero, gain: 0.0 };
        }
        Fit { scale: (product / square) as f32, zero, gain: product * product / square }
    }

    /// The best of the scales that are tried.
    fn best(&self, tried: impl Iterator<Item = (f32, f32)>) -> Option<Fit> {
        let usable = tried.filter(|(scale, _)| scale.is_normal() && (1.0 / scale).is_finite());
        let mut best =
            usable.map(|(scale, zero)| self.improved(scale, zero)).max_by(|a, b| a.gain.total_cmp(&b.gain))?;
        for _ in 0..REFINEMENTS {
            if !best.scale.is_normal() {
                return None;
            }
            let next = self.improved(best.scale, best.zero);
            if next.gain > best.gain {
                best = next;
            }
        }
        best.scale.is_normal().then_some(best)
    }
}

/// Scale and zero point of a block without a zero point of its own.
pub(super) fn symmetric(numbers: &[f32], weights: &[f32], most: f32) -> (f32, f32) {
    let half = most.midpoint(1.0).floor();
    let largest = numbers.iter().copied().fold(0.0f32, |a, b| if b.abs() > a.abs() { b } else { a });
    let block = Block { numbers, weights, most };
    // One end of the range reaches further than the other, so both signs are tried.
    let scales = (-STEPS..=STEPS).flat_map(|step| {
        let scale = largest / (half + 0.1 * step as f32);
        [(-scale, half), (scale, half)]
    });
    block.best(scales).map_or((0.0, half), |fit| (fit.scale, fit.zero))
}

/// Scale and zero point of a block with a zero point of its own.
pub(super) fn asymmetric(numbers: &[f32], weights: &[f32], most: f32) -> (f32, f32) {
    let low = numbers.iter().copied().fold(0.0f32, f32::min);
    let high = numbers.iter().copied().fold(0.0f32, f32::max);
    let block = Block { numbers, weights, most };
    let plain = (high - low) / most;
    let middle = (-low / plain).round();
    let tried = (-STEPS..=STEPS).flat_map(|step| {
        let scale = plain * (1.0 + 0.03 * step as f32);
        (-ZEROS..=ZEROS)
            .map(move |shift| (scale, middle + shift as f32))
            .filter(|(_, zero)| (0.0..=most).contains(zero))
    });
    block.best(tried).map_or((0.0, 0.0), |fit| (fit.scale, fit.zero))
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn error(numbers: &[f32], weights: &[f32], (scale, zero): (f32, f32)) -> f64 {
        let reciprocal = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let rounded = |number: f32| ((number * reciprocal + zero).round().clamp(0.0, 15.0) - zero) * scale;
        let weight = |place: usize| f64::from(weights.get(place).copied().unwrap_or(1.0));
        numbers.iter().enumerate().map(|(at, &x)| weight(at) * f64::from(x - rounded(x)).powi(2)).sum()
    }

    /// Against a grid of 2,000 scales with every zero point. The least error that there is lies about a tenth below the range's own.
    #[test]
    fn the_error_is_near_the_least_one_that_any_scale_has() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for weighted in [false, true] {
            let (mut found, mut least, mut plain) = ([0.0; 2], [0.0; 2], [0.0; 2]);
            for _ in 0..20 {
                let numbers: Vec<f32> = (0..32).map(|_| (0..4).map(|_| rng.random::<f32>() - 0.5).sum()).collect();
                let weights: Vec<f32> = match weighted {
                    true => (0..32).map(|_| rng.random::<f32>()).collect(),
                    false => Vec::new(),
                };
                let most = numbers.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                let scales = (1..=1000).map(|step| most / 5.0 * step as f32 / 1000.0);
                let grid = |zeros: std::ops::RangeInclusive<i32>| {
                    let all = scales
                        .clone()
                        .flat_map(|s| [s, -s])
                        .flat_map(move |s| zeros.clone().map(move |z| (s, z as f32)));
                    all.map(|fit| error(&numbers, &weights, fit)).fold(f64::INFINITY, f64::min)
                };
                found[0] += error(&numbers, &weights, symmetric(&numbers, &weights, 15.0));
                found[1] += error(&numbers, &weights, asymmetric(&numbers, &weights, 15.0));
                least[0] += grid(8..=8);
                least[1] += grid(0..=15);
                for (at, name) in ["symmetric", "asymmetric"].into_iter().enumerate() {
                    let scheme = crate::quantised::SCHEMES.iter().find(|scheme| scheme.name == name).unwrap();
                    let packed = scheme.fitted(&numbers, 15.0);
                    plain[at] += error(&numbers, &weights, packed);
                }
            }
            for at in 0..2 {
                assert!(found[at] <= 1.01 * least[at] && found[at] < plain[at], "{found:?} {least:?} {plain:?}");
            }
        }
    }

    #[test]
    fn blocks_of_equal_numbers_and_of_zeros_have_finite_scales() {
        for numbers in [[0.0; 4], [0.25; 4], [-3.0; 4], [0.0, 0.0, 1e-30, 0.0], [f32::MIN_POSITIVE / 2.0; 4], [1e30; 4]]
        {
            for fit in [symmetric, asymmetric] {
                let (scale, zero) = fit(&numbers, &[], 15.0);
                assert!(scale.is_finite() && (0.0..=15.0).contains(&zero), "{numbers:?}: {scale} {zero}");
                let relative = error(&numbers, &[], (scale, zero)) / f64::from(numbers[0]).powi(2).max(1e-30);
                assert!(relative < 1e-6, "{numbers:?}: {scale} {zero}: {relative}");
            }
        }
    }
}
