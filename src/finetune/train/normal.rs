//! Normal equations of a ridge regression: sums over tokens, and their solution on all cores.
//!
//! Work is split into tiles of a fixed size. Each tile is computed by one thread and added in the order of the tokens,
//! so the result does not depend on the number of threads.

use tch::{Device, Kind, Tensor};

use crate::base::{Error, Result};
use crate::finetune::error::torch_error;
use crate::torch::Ranks;

use super::pool::on_pool;
use crate::finetune::plan::sum_bytes;

/// Rows and columns of a tile.
const TILE: i64 = 512;

/// Contribution of one forward pass to the sums.
pub struct PassRows {
    /// Operand of the product, times each token's weight: f32 `[M, K]`.
    pub operand: Tensor,
    /// Residual of the layer's output, times the same weight: f32 `[M, D]`.
    pub rest: Tensor,
}

/// Sums over tokens: `A = h^T h`, `B = h^T e`, `|e|^2`, and the number of tokens. `h` is the operand and `e` the
/// residual of [`PassRows`]. [`sum_bytes`] selects f64 or f32 for the matrices.
pub struct Normal {
    /// `[K, K]`.
    pub a: Tensor,
    /// `[K, D]`.
    pub b: Tensor,
    /// f64 `[]` on the device: a pass does not wait for it.
    distance: Tensor,
    pub tokens: f64,
}

/// Solution of the regression: the change of the weight, f32 `[K, D]`, and the remaining sum of squared distances.
pub struct Solved {
    pub change: Tensor,
    pub distance: f64,
}

/// Start and length of each tile of an axis.
fn tiles(size: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..size).step_by(TILE as usize).map(move |start| (start, TILE.min(size - start)))
}

fn failed() -> impl FnOnce(tch::TchError) -> Error {
    torch_error("the fit")
}

impl Normal {
    /// Empty sums for a `[K, D]` weight.
    ///
    /// Errors: `Error::Engine` when there is not enough memory.
    pub fn new(k: i64, d: i64, device: Device) -> Result<Self> {
        let kind = if sum_bytes(k as u64, d as u64) == 8 { Kind::Double } else { Kind::Float };
        let zeros = |size: [i64; 2]| Tensor::f_zeros(size, (kind, device)).map_err(failed());
        let distance = Tensor::f_zeros([0i64; 0], (Kind::Double, device)).map_err(failed())?;
        Ok(Normal { a: zeros([k, k])?, b: zeros([k, d])?, distance, tokens: 0.0 })
    }

    /// Adds the rows of several passes, in their order.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn add(&mut self, passes: &[PassRows]) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for PassRows { rest, .. } in passes {
            let sum = rest.f_square().and_then(|squares| squares.f_sum(Kind::Double));
            let _ = sum.and_then(|sum| self.distance.f_add_(&sum)).map_err(failed())?;
            self.tokens += rest.size()[0] as f64;
        }
        let tasks = tiles(self.a.size()[0]).map(|(start, length)| {
            let shared = |tensor: &Tensor| tensor.shallow_clone();
            let rows: Vec<(Tensor, Tensor)> = passes.iter().map(|p| (shared(&p.operand), shared(&p.rest))).collect();
            let (a, b) = (self.a.narrow(0, start, length), self.b.narrow(0, start, length));
            move || {
                let _guard = tch::no_grad_guard();
                let (mut a, mut b) = (a, b);
                for (operand, rest) in rows {
                    let mut add = || -> Result<(), tch::TchError> {
                        let turned = operand.f_narrow(1, start, length)?.f_tr()?;
                        if a.kind() == Kind::Double {
                            // Each product is computed in f32 and is the same on every process; the sum is in f64.
                            let _ = a.f_add_(&turned.f_matmul(&operand)?)?;
                            let _ = b.f_add_(&turned.f_matmul(&rest)?)?;
                        } else {
                            let _ = a.f_addmm_(&turned, &operand)?;
                            let _ = b.f_addmm_(&turned, &rest)?;
                        }
                        Ok(())
                    };
                    add().map_err(failed())?;
                }
                Ok(())
            }
        });
        on_pool(1, tasks).map(|_| ())
    }

    /// The sum of squared distances. Reading it waits for a GPU.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn distance(&self) -> Result<f64> {
        self.distance.f_double_value(&[]).map_err(failed())
    }

    /// Adds the sums of `other`.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn absorb(&mut self, other: &Normal) -> Result<()> {
        let _ = self.distance.f_add_(&other.distance).map_err(failed())?;
        self.tokens += other.tokens;
        let _ = self.a.f_add_(&other.a).and_then(|_| self.b.f_add_(&other.b)).map_err(failed())?;
        Ok(())
    }

    /// Adds the sums of all ranks. The result is identical on every rank, to the bit.
    ///
    /// Errors: as `Ranks::sum`.
    pub fn sum_over(&mut self, ranks: &Ranks) -> Result<()> {
        ranks.sum(&[self.a.shallow_clone()])?;
        ranks.sum(&[self.b.shallow_clone()])?;
        let numbers = Tensor::from_slice(&[self.distance()?, self.tokens]);
        ranks.sum(std::slice::from_ref(&numbers))?;
        let _ = self.distance.f_fill_(numbers.double_value(&[0])).map_err(failed())?;
        self.tokens = numbers.double_value(&[1]);
        Ok(())
    }

    /// Solves `(A + ridge * mean(diag A) * I) D = B` for the weight's change `D`.
    ///
    /// Errors: `Error::NotFinite` when the sum of distances is not finite; `Error::Engine` from LibTorch.
    pub fn solve(&self, ridge: f64) -> Result<Solved> {
        if !self.distance()?.is_finite() {
            return Err(Error::not_finite("the fit", "the stream or the dense model's stream is not finite")
                .remedy("take a lower learning rate, or look at the samples with `interlace score`"));
        }
        let damped = || -> Result<Tensor, tch::TchError> {
            let a = self.a.f_to_dtype(Kind::Double, false, true)?;
            let added = a.f_diag(0)?.f_mean(Kind::Double)?.f_mul_scalar(ridge)?.f_clamp_min(f64::MIN_POSITIVE)?;
            let _ = a.f_diagonal(0, 0, 1)?.f_add_(&added)?;
            Ok(a)
        };
        let factor = cholesky(damped().map_err(failed())?)?;
        let tasks = tiles(self.b.size()[1]).map(|(start, length)| {
            let (factor, b) = (factor.shallow_clone(), self.b.narrow(1, start, length));
            move || {
                let solved = || b.f_to_kind(Kind::Double)?.f_cholesky_solve(&factor, false)?.f_to_kind(Kind::Float);
                solved().map_err(failed())
            }
        });
        let columns = on_pool(1, tasks)?;
        let change = Tensor::f_cat(&columns, 1).map_err(failed())?;
        let distance = self.distance_with(&change)?;
        Ok(Solved { change, distance })
    }

    /// Sum of squared distances with a change `D` of the weight: `|e - h D|^2 = |e|^2 - 2 <D, B> + <D, A D>`.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn distance_with(&self, change: &Tensor) -> Result<f64> {
        let tasks = tiles(self.b.size()[1]).map(|(start, length)| {
            let a = self.a.shallow_clone();
            let (b, d) = (self.b.narrow(1, start, length), change.narrow(1, start, length));
            move || {
                let sum = || -> Result<f64, tch::TchError> {
                    let (b, d) = (b.f_to_kind(Kind::Double)?, d.f_to_kind(Kind::Double)?);
                    let mut sum = 0.0;
                    // `A` is converted tile by tile; an f64 copy of all of it would double its memory.
                    for (row, rows) in tiles(a.size()[0]) {
                        let moved = a.f_narrow(0, row, rows)?.f_to_kind(Kind::Double)?.f_matmul(&d)?;
                        let own = b.f_narrow(0, row, rows)?;
                        let moved = moved.f_sub(&own)?.f_sub(&own)?;
                        sum += d.f_narrow(0, row, rows)?.f_mul(&moved)?.f_sum(Kind::Double)?.f_double_value(&[])?;
                    }
                    Ok(sum)
                };
                sum().map_err(failed())
            }
        });
        Ok(self.distance()? + on_pool(1, tasks)?.into_iter().sum::<f64>())
    }
}

/// Lower Cholesky factor `L` of a positive definite matrix `L L^T`, computed in place and tile by tile: the factor of
/// each diagonal tile, the column below it, and the update of the remaining tiles (Golub and Van Loan, section 4.2.5).
fn cholesky(matrix: Tensor) -> Result<Tensor> {
    let size = matrix.size()[0];
    let tile = |(row, rows): (i64, i64), (column, columns): (i64, i64)| {
        matrix.f_narrow(0, row, rows).and_then(|rows| rows.f_narrow(1, column, columns)).map_err(failed())
    };
    for (number, own) in tiles(size).enumerate() {
        let mut diagonal = tile(own, own)?;
        let lower = diagonal.f_linalg_cholesky(false).map_err(failed())?;
        diagonal.f_copy_(&lower).map_err(failed())?;
        let below: Vec<(i64, i64)> = tiles(size).skip(number + 1).collect();
        let mut columns = Vec::with_capacity(below.len());
        for &rows in &below {
            columns.push(tile(rows, own)?);
        }
        let panels = columns.iter().map(|column| {
            let (mut column, lower) = (column.shallow_clone(), lower.shallow_clone());
            move || {
                let solved =
                    lower.f_tr().and_then(|upper| upper.f_linalg_solve_triangular(&column, true, false, false));
                solved.and_then(|solved| column.f_copy_(&solved)).map_err(failed())
            }
        });
        on_pool(1, panels)?;
        let mut rest = Vec::new();
        for (left, &rows) in below.iter().enumerate() {
            for (right, &across) in below[..=left].iter().enumerate() {
                rest.push((tile(rows, across)?, columns[left].shallow_clone(), columns[right].shallow_clone()));
            }
        }
        let updates = rest.into_iter().map(|(mut own, left, right)| {
            move || {
                let product = right.f_tr().and_then(|right| left.f_matmul(&right));
                product.and_then(|product| own.f_sub_(&product)).map(|_| ()).map_err(failed())
            }
        });
        on_pool(1, updates)?;
    }
    matrix.f_tril(0).map_err(failed())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(size: [i64; 2]) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu))
    }

    fn sums(h: &Tensor, rest: &Tensor) -> Normal {
        let mut normal = Normal::new(h.size()[1], rest.size()[1], Device::Cpu).unwrap();
        normal.add(&[PassRows { operand: h.shallow_clone(), rest: rest.shallow_clone() }]).unwrap();
        normal
    }

    /// Rows computed with a known weight are explained by it; the remaining distance is 0.
    #[test]
    fn the_solution_recovers_a_known_weight() {
        tch::manual_seed(7);
        let (h, want) = (random([64, 5]), random([5, 3]));
        let sums = sums(&h, &h.matmul(&want));
        let solved = sums.solve(1e-9).unwrap();
        assert!((&solved.change - &want).abs().max().double_value(&[]) < 1e-4);
        assert!(solved.distance.abs() < 1e-4 * sums.distance().unwrap(), "{}", solved.distance);
        // With a very large ridge the weight does not change.
        let still = sums.solve(1e9).unwrap();
        assert!(still.change.abs().max().double_value(&[]) < 1e-6);
        assert!((still.distance / sums.distance().unwrap() - 1.0).abs() < 1e-6);
    }

    /// One feature, computed by hand: `(a + ridge * a) d = b`.
    #[test]
    fn the_ridge_is_relative_to_the_mean_square_of_the_features() {
        let scalar = |value: f32| Tensor::from_slice(&[value]).view([1, 1]);
        let sums = Normal { a: scalar(4.0), b: scalar(6.0), distance: Tensor::from(10.0), tokens: 1.0 };
        let solved = sums.solve(0.5).unwrap();
        assert!((solved.change.double_value(&[0, 0]) - 1.0).abs() < 1e-6);
        assert!((solved.distance - (10.0 - 2.0 * 6.0 + 4.0)).abs() < 1e-6);
        let broken = Normal { distance: Tensor::from(f64::NAN), ..sums };
        let error = broken.solve(0.5).err().unwrap();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        assert!(error.to_string().starts_with("the fit: the stream or the dense model's stream"), "{error}");
    }

    /// Several tiles are compared with LibTorch's factor and with sums in one piece.
    #[test]
    fn tiled_computation_equals_computation_in_one_piece() {
        tch::manual_seed(5);
        let (h, rest) = (random([1500, 1100]), random([1500, 530]));
        let whole = h.to_kind(Kind::Double);
        let normal = sums(&h, &rest);
        let close = |found: &Tensor, want: &Tensor, off: f64| {
            let (found, want) = (found.to_kind(Kind::Double), want.to_kind(Kind::Double));
            let (apart, size) = ((&found - &want).abs().max(), want.abs().max());
            assert!(apart.double_value(&[]) < off * size.double_value(&[]), "{apart} of {size}");
        };
        close(&normal.a, &whole.tr().matmul(&whole), 1e-5);
        let damped = normal.a.to_kind(Kind::Double) + Tensor::eye(1100, (Kind::Double, Device::Cpu)) * 10.0;
        close(&cholesky(damped.copy()).unwrap(), &damped.linalg_cholesky(false), 1e-12);
        let solved = normal.solve(0.1).unwrap();
        let left = (&rest - h.matmul(&solved.change)).square().sum(Kind::Double).double_value(&[]);
        assert!((left / solved.distance - 1.0).abs() < 1e-4, "{left}, {}", solved.distance);
        let mut parts = Normal::new(1100, 530, Device::Cpu).unwrap();
        for start in [0, 700] {
            let part = |x: &Tensor| x.narrow(0, start, 700 + (start > 0) as i64 * 100);
            parts.absorb(&sums(&part(&h), &part(&rest))).unwrap();
        }
        close(&parts.b, &normal.b, 1e-5);
    }
}
