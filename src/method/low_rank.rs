//! The leading eigenvectors of a symmetric matrix, and the best map of low rank of a regression.

use ndarray::{Array2, ArrayView2, s};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Directions beside the wanted ones, which make the iteration converge sooner.
const BESIDE: usize = 8;
/// Rounds of the subspace iteration at most.
const ROUNDS: usize = 60;
/// The iteration ends when no eigenvalue moves by more than this part of the largest.
const SETTLED: f64 = 1e-12;
/// Rounds over all pairs of Jacobi's method at most.
const SWEEPS: usize = 50;

/// Eigenvectors of the `rank` largest eigenvalues of a symmetric matrix without negative eigenvalues, as the columns of
/// `[D, rank]`, the largest first. Where `rank` is above `D` there are `D` of them.
///
/// By subspace iteration with Rayleigh and Ritz's projection (Golub and Van Loan, section 8.2.4).
pub fn leading(matrix: &Array2<f64>, rank: usize) -> Array2<f64> {
    let size = matrix.nrows();
    let rank = rank.min(size);
    let width = (rank + BESIDE).min(size);
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut basis = match width == size {
        true => Array2::eye(size),
        false => Array2::from_shape_fn((size, width), |_| random.random_range(-1.0..1.0)),
    };
    orthonormalise(&mut basis);
    let mut before = vec![f64::INFINITY; width];
    for _ in 0..ROUNDS {
        let moved = matrix.dot(&basis);
        let (values, turn) = jacobi(basis.t().dot(&moved));
        basis = if width == size { basis.dot(&turn) } else { moved.dot(&turn) };
        orthonormalise(&mut basis);
        let most = values.first().map_or(0.0, |value| value.abs());
        let settled = values.iter().zip(&before).take(rank).all(|(now, old)| (now - old).abs() <= SETTLED * most);
        if settled || width == size {
            break;
        }
        before = values;
    }
    basis.slice(s![.., ..rank]).to_owned()
}

/// `(U, V^T)` of the map `U V^T` of rank `rank` that leaves the least distance where `full` is the regression with the sums
/// `A = x^T x` and `b = x^T e`: `V` are the leading eigenvectors of `full^T A full = full^T b`, and `U = full V`. Source:
/// Izenman 1975, reduced-rank regression.
pub fn reduced(full: &Array2<f64>, b: &ArrayView2<f64>, rank: usize) -> (Array2<f64>, Array2<f64>) {
    let explained = full.t().dot(b);
    // Symmetric but for rounding.
    let explained = (&explained + &explained.t()) * 0.5;
    let directions = leading(&explained, rank);
    (full.dot(&directions), directions.reversed_axes())
}

/// Gram and Schmidt's method, twice. A column that depends on those before it becomes zero.
fn orthonormalise(columns: &mut Array2<f64>) {
    for _ in 0..2 {
        for own in 0..columns.ncols() {
            let (before, mut rest) = columns.view_mut().split_at(ndarray::Axis(1), own);
            let mut column = rest.column_mut(0);
            let length = column.dot(&column).sqrt();
            let parts = before.t().dot(&column);
            column -= &before.dot(&parts);
            let left = column.dot(&column).sqrt();
            let scale = if left > 1e-13 * length { 1.0 / left } else { 0.0 };
            column.mapv_inplace(|value| value * scale);
        }
    }
}

/// Eigenvalues, the largest first, and eigenvectors as columns of a small symmetric matrix, by Jacobi's method.
fn jacobi(mut a: Array2<f64>) -> (Vec<f64>, Array2<f64>) {
    let size = a.nrows();
    let mut vectors: Array2<f64> = Array2::eye(size);
    for _ in 0..SWEEPS {
        let square = |place: (usize, usize)| a[place].powi(2);
        let off: f64 = (0..size).flat_map(|row| (0..row).map(move |column| (row, column))).map(square).sum();
        let all: f64 = a.diag().iter().map(|value| value * value).sum();
        if off <= 1e-30 * all {
            break;
        }
        for p in 0..size {
            for q in p + 1..size {
                rotate(&mut a, &mut vectors, p, q);
            }
        }
    }
    let mut order: Vec<usize> = (0..size).collect();
    order.sort_by(|&x, &y| a[[y, y]].total_cmp(&a[[x, x]]));
    let values = order.iter().map(|&place| a[[place, place]]).collect();
    (values, vectors.select(ndarray::Axis(1), &order))
}

/// Turns the axes `p` and `q` so that the entry between them is zero.
fn rotate(a: &mut Array2<f64>, vectors: &mut Array2<f64>, p: usize, q: usize) {
    let between = a[[p, q]];
    if between == 0.0 {
        return;
    }
    let theta = (a[[q, q]] - a[[p, p]]) / (2.0 * between);
    let tangent = if theta == 0.0 { 1.0 } else { theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt()) };
    let cosine = 1.0 / (tangent * tangent + 1.0).sqrt();
    let sine = tangent * cosine;
    for k in 0..a.nrows() {
        let (left, right) = (a[[k, p]], a[[k, q]]);
        (a[[k, p]], a[[k, q]]) = (cosine * left - sine * right, sine * left + cosine * right);
    }
    for k in 0..a.nrows() {
        let (left, right) = (a[[p, k]], a[[q, k]]);
        (a[[p, k]], a[[q, k]]) = (cosine * left - sine * right, sine * left + cosine * right);
        let (left, right) = (vectors[[k, p]], vectors[[k, q]]);
        (vectors[[k, p]], vectors[[k, q]]) = (cosine * left - sine * right, sine * left + cosine * right);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eigenvectors_satisfy_their_equation() {
        for (size, rank) in [(1, 1), (5, 2), (30, 4), (60, 20), (12, 40)] {
            let mut random = ChaCha8Rng::seed_from_u64(7);
            let root = Array2::from_shape_fn((size + 3, size), |_| random.random_range(-1.0..1.0));
            let matrix = root.t().dot(&root);
            let vectors = leading(&matrix, rank);
            assert_eq!(vectors.dim(), (size, rank.min(size)));
            let projected = vectors.t().dot(&matrix.dot(&vectors));
            let left = matrix.dot(&vectors) - vectors.dot(&projected);
            assert!(left.iter().all(|value| value.abs() < 1e-5 * size as f64), "{size} {rank}");
            // No direction outside has a larger value.
            let total: f64 = matrix.diag().sum();
            assert!(projected.diag().sum() <= total * (1.0 + 1e-12));
            assert!(projected.diag().windows(2).into_iter().all(|pair| pair[0] >= pair[1] - 1e-9 * total));
        }
    }
}
