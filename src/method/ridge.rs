//! Ridge regression from sums over tokens, solved by Cholesky's factor.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

use crate::base::{Error, Result};

use super::low_rank::reduced;

/// Rows and columns of a block of the factor.
const BLOCK: usize = 32;

/// Ridges, relative to the mean of the diagonal of `A`, from which one is chosen on rows that are held out.
const RIDGES: [f64; 5] = [1e-3, 1e-2, 1e-1, 1.0, 10.0];

/// Sums over rows (tokens): `A = x^T x`, `B = x^T e`, `|e|^2`.
pub struct RidgeSums {
    /// `[K, K]`.
    a: Array2<f64>,
    /// `[K, D]`.
    b: Array2<f64>,
    distance: f64,
    rows: usize,
}

impl RidgeSums {
    /// No row yet, for `[K, D]` solutions.
    pub fn new(k: usize, d: usize) -> Self {
        RidgeSums { a: Array2::zeros((k, k)), b: Array2::zeros((k, d)), distance: 0.0, rows: 0 }
    }

    /// Adds rows: `x` is `[M, K]`, `e` is `[M, D]`. Products of one call are made in f32 and added in f64.
    pub fn add(&mut self, x: &Array2<f32>, e: &Array2<f32>) {
        let turned = x.t();
        self.a.zip_mut_with(&turned.dot(x), |sum, &own| *sum += f64::from(own));
        self.b.zip_mut_with(&turned.dot(e), |sum, &own| *sum += f64::from(own));
        self.distance += e.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
        self.rows += x.nrows();
    }

    fn absorb(&mut self, other: &RidgeSums) {
        self.a += &other.a;
        self.b += &other.b;
        self.distance += other.distance;
        self.rows += other.rows;
    }

    /// `(A + ridge mean(diag A) I)^-1 B`, `[K, D]`.
    ///
    /// Errors: `Error::NotFinite` when a sum is not finite.
    fn solve(&self, ridge: f64) -> Result<Array2<f64>> {
        let mut a = self.a.clone();
        let mean = a.diag().mean().unwrap_or(0.0);
        if !mean.is_finite() || !self.distance.is_finite() {
            return Err(Error::not_finite("the fit", "the stream or the dense model's stream is not finite")
                .remedy("check the model with `interlace verify`, or take other calibration samples"));
        }
        // Rows of zeros alone leave nothing to divide by.
        a.diag_mut().iter_mut().for_each(|own| *own += (ridge * mean).max(f64::MIN_POSITIVE));
        let mut x = self.b.clone();
        factor(&mut a.view_mut());
        substitute(&a.view(), &mut x.view_mut());
        Ok(x)
    }

    /// `|e - x D|^2 = |e|^2 + <D, A D - 2 B>` with the solution `D`.
    fn distance_with(&self, solution: &Array2<f64>) -> f64 {
        let mut moved = self.a.dot(solution);
        moved.scaled_add(-2.0, &self.b);
        self.distance + (&moved * solution).sum()
    }
}

/// The solution over all rows, with the ridge that leaves the least distance on the rows held out. Where nothing is held
/// out, or no ridge makes it less there, there is no solution.
///
/// Errors: `Error::NotFinite` when a sum is not finite.
pub fn solve(mut fitted: RidgeSums, held_out: &RidgeSums) -> Result<Option<Array2<f32>>> {
    let Some(ridge) = best_ridge(&fitted, held_out, |full| full)? else { return Ok(None) };
    fitted.absorb(held_out);
    Ok(Some(single(&fitted.solve(ridge)?)))
}

/// The same with a solution `U V^T` of a rank, as its factors `[K, R]` and `[R, D]`.
///
/// Errors: as `solve`.
pub fn solve_reduced(
    mut fitted: RidgeSums,
    held_out: &RidgeSums,
    rank: usize,
) -> Result<Option<(Array2<f32>, Array2<f32>)>> {
    let product = |full: Array2<f64>| {
        let (down, up) = reduced(&full, &fitted.b.view(), rank);
        down.dot(&up)
    };
    let Some(ridge) = best_ridge(&fitted, held_out, product)? else { return Ok(None) };
    fitted.absorb(held_out);
    let (down, up) = reduced(&fitted.solve(ridge)?, &fitted.b.view(), rank);
    Ok(Some((single(&down), single(&up))))
}

fn best_ridge(
    fitted: &RidgeSums,
    held_out: &RidgeSums,
    shape: impl Fn(Array2<f64>) -> Array2<f64>,
) -> Result<Option<f64>> {
    let mut best: Option<(f64, f64)> = None;
    for ridge in RIDGES {
        let left = held_out.distance_with(&shape(fitted.solve(ridge)?));
        if left < best.map_or(held_out.distance, |(least, _)| least) {
            best = Some((left, ridge));
        }
    }
    Ok(best.map(|(_, ridge)| ridge))
}

fn single(values: &Array2<f64>) -> Array2<f32> {
    values.mapv(|value| value as f32)
}

/// The lower factor `L` of a positive definite matrix `L L^T`, in its lower triangle, block by block (Golub and Van Loan,
/// section 4.2.5).
fn factor(a: &mut ArrayViewMut2<f64>) {
    let size = a.nrows();
    for start in (0..size).step_by(BLOCK) {
        let end = (start + BLOCK).min(size);
        for column in start..end {
            let own = a[[column, column]] - (start..column).map(|k| a[[column, k]].powi(2)).sum::<f64>();
            // Rounding can leave a number below zero of a matrix that is nearly singular.
            let own = own.max(f64::MIN_POSITIVE).sqrt();
            a[[column, column]] = own;
            for row in column + 1..size {
                let sum: f64 = (start..column).map(|k| a[[row, k]] * a[[column, k]]).sum();
                a[[row, column]] = (a[[row, column]] - sum) / own;
            }
        }
        let panel = a.slice(s![end.., start..end]).to_owned();
        let mut rest = a.slice_mut(s![end.., end..]);
        general_mat_mul(-1.0, &panel, &panel.t(), 1.0, &mut rest);
    }
}

/// Solves `L L^T X = B` in the place of `B`.
fn substitute(l: &ArrayView2<f64>, b: &mut ArrayViewMut2<f64>) {
    let size = l.nrows();
    let starts: Vec<usize> = (0..size).step_by(BLOCK).collect();
    for &start in &starts {
        let end = (start + BLOCK).min(size);
        let (before, mut own) = b.view_mut().split_at(ndarray::Axis(0), start);
        let mut own = own.slice_mut(s![..end - start, ..]);
        general_mat_mul(-1.0, &l.slice(s![start..end, ..start]), &before, 1.0, &mut own);
        for row in 0..end - start {
            for k in 0..row {
                let factor = l[[start + row, start + k]];
                let (above, mut this) = own.view_mut().split_at(ndarray::Axis(0), row);
                this.row_mut(0).scaled_add(-factor, &above.row(k));
            }
            own.row_mut(row).mapv_inplace(|value| value / l[[start + row, start + row]]);
        }
    }
    for &start in starts.iter().rev() {
        let end = (start + BLOCK).min(size);
        let (mut before, after) = b.view_mut().split_at(ndarray::Axis(0), end);
        let mut own = before.slice_mut(s![start.., ..]);
        general_mat_mul(-1.0, &l.slice(s![end.., start..end]).t(), &after, 1.0, &mut own);
        for row in (0..end - start).rev() {
            for k in row + 1..end - start {
                let factor = l[[start + k, start + row]];
                let (mut this, below) = own.view_mut().split_at(ndarray::Axis(0), k);
                this.row_mut(row).scaled_add(-factor, &below.row(0));
            }
            own.row_mut(row).mapv_inplace(|value| value / l[[start + row, start + row]]);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        Array2::from_shape_fn((rows, columns), |_| random.random_range(-1.0..1.0))
    }

    fn sums(x: &Array2<f32>, e: &Array2<f32>) -> RidgeSums {
        let mut sums = RidgeSums::new(x.ncols(), e.ncols());
        sums.add(x, e);
        sums
    }

    /// Sizes below, at and across the blocks of the factor: the solution satisfies the equations it was made from.
    #[test]
    fn solutions_satisfy_their_equations() {
        for size in [1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 17] {
            let sums = sums(&random(2 * size + 3, size, 1), &random(2 * size + 3, 7, 2));
            let solution = sums.solve(1e-2).unwrap();
            let ridge = 1e-2 * sums.a.diag().mean().unwrap();
            let left = sums.a.dot(&solution) + ridge * &solution - &sums.b;
            let worst = left.iter().fold(0.0f64, |worst, value| worst.max(value.abs()));
            assert!(worst < 1e-9, "{size}: {worst}");
        }
    }

    /// Two rows, by hand: x = (1, 0), (0, 2) and e = 3, 4 give A = diag(1, 4), B = (3, 8); without a ridge D = (3, 2).
    #[test]
    fn a_regression_by_hand() {
        let sums = sums(&ndarray::array![[1.0f32, 0.0], [0.0, 2.0]], &ndarray::array![[3.0f32], [4.0]]);
        let solution = sums.solve(0.0).unwrap();
        assert!((solution[[0, 0]] - 3.0).abs() < 1e-12 && (solution[[1, 0]] - 2.0).abs() < 1e-12, "{solution}");
        assert!(sums.distance_with(&solution).abs() < 1e-12);
        // With D = (1, 1): (3 - 1)^2 + (4 - 2)^2.
        assert!((sums.distance_with(&ndarray::array![[1.0], [1.0]]) - 8.0).abs() < 1e-12);
    }

    #[test]
    fn a_map_is_found_again_and_noise_has_none() {
        let (x, map) = (random(400, 12, 3), random(12, 5, 4));
        let part = |from: usize, to: usize, e: &Array2<f32>| {
            sums(&x.slice(s![from..to, ..]).to_owned(), &e.slice(s![from..to, ..]).to_owned())
        };
        let e = x.dot(&map);
        let found = solve(part(0, 300, &e), &part(300, 400, &e)).unwrap().unwrap();
        // The least ridge moves the map by about a thousandth.
        assert!((&found - &map).iter().all(|value| value.abs() < 2e-3));
        let noise = random(400, 5, 5);
        let few = solve(part(0, 14, &noise), &part(300, 400, &noise)).unwrap();
        let change = few.map_or(0.0, |found| found.iter().fold(0.0f32, |worst, value| worst.max(value.abs())));
        assert!(change < 0.1, "{change}");
        let endless = Array2::from_elem((400, 5), f32::INFINITY);
        assert!(solve(part(0, 300, &endless), &part(300, 400, &endless)).is_err());
    }
}
