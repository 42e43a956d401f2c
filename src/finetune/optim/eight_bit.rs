//! Moments in 8 bits: one byte per number and one f32 scale per block, instead of four bytes per number.
//!
//! Within a block of [`BLOCK`] numbers, each is stored relative to the largest magnitude: the first moment as its
//! signed square root and the second as its fourth root, so that small numbers keep their precision. The update is
//! computed in f32 (Dettmers et al. 2022, arXiv:2110.02861, with another code within such blocks).

use tch::{Kind, Tensor};

/// Numbers per scale.
const BLOCK: i64 = 256;
/// Code levels of the first moment on each side of 0.
const SIGNED: f64 = 127.0;
/// Code levels of the second moment above 0.
const UNSIGNED: f64 = 255.0;

/// Bytes of a moment of `elements` numbers.
pub fn moment_bytes(elements: u64) -> u64 {
    let blocks = elements.div_ceil(BLOCK as u64);
    blocks * (BLOCK as u64 + 4)
}

/// A moment in 8 bits.
#[derive(Debug)]
pub struct Moment {
    /// `[blocks, BLOCK]`: i8 for the first moment, u8 for the second.
    pub codes: Tensor,
    /// f32 `[blocks, 1]`: largest magnitude in each block.
    pub scales: Tensor,
    size: Vec<i64>,
    signed: bool,
}

impl Moment {
    /// A moment of zeros in the shape of `value`; `signed` for a first moment.
    pub fn zeros(value: &Tensor, signed: bool) -> Result<Self, tch::TchError> {
        let blocks = (value.numel() as i64 + BLOCK - 1) / BLOCK;
        let (kind, device) = (if signed { Kind::Int8 } else { Kind::Uint8 }, value.device());
        let codes = Tensor::f_zeros([blocks, BLOCK], (kind, device))?;
        Ok(Moment { codes, scales: Tensor::f_zeros([blocks, 1], (Kind::Float, device))?, size: value.size(), signed })
    }

    /// The numbers in f32, in the shape of the weight.
    pub fn numbers(&self) -> Result<Tensor, tch::TchError> {
        let codes = self.codes.f_to_kind(Kind::Float)?;
        let parts = match self.signed {
            true => {
                let root = codes.f_div_scalar(SIGNED)?;
                root.f_mul(&root.f_abs()?)?
            }
            false => codes.f_div_scalar(UNSIGNED)?.f_square()?.f_square()?,
        };
        let count: i64 = self.size.iter().product();
        parts.f_mul(&self.scales)?.f_flatten(0, -1)?.f_narrow(0, 0, count)?.f_reshape(&self.size)
    }

    /// Stores `numbers`. A second moment above 0 remains above 0, because the update divides by its root.
    pub fn keep(&mut self, numbers: &Tensor) -> Result<(), tch::TchError> {
        let flat = numbers.f_flatten(0, -1)?;
        let lacking = self.codes.numel() as i64 - flat.numel() as i64;
        let blocks = flat.f_constant_pad_nd([0, lacking])?.f_reshape([-1, BLOCK])?;
        let scales = blocks.f_abs()?.f_amax([1i64].as_slice(), true)?;
        let parts = blocks.f_div(&scales.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)?;
        let codes = match self.signed {
            true => parts.f_abs()?.f_sqrt()?.f_mul(&parts.f_sign()?)?.f_mul_scalar(SIGNED)?.f_round()?,
            false => {
                let codes = parts.f_sqrt()?.f_sqrt()?.f_mul_scalar(UNSIGNED)?.f_round()?;
                codes.f_maximum(&parts.f_gt(0.0)?.f_to_kind(Kind::Float)?)?
            }
        };
        self.codes.f_copy_(&codes.f_to_kind(self.codes.kind())?)?;
        self.scales.f_copy_(&scales)
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn moments_of_very_different_sizes_keep_their_precision() {
        let sizes = Tensor::arange(700, (Kind::Float, Device::Cpu)).divide_scalar(-100.0).exp();
        let signs = (Tensor::arange(700, (Kind::Float, Device::Cpu)) + 1.0).sin().sign();
        for (signed, numbers, off) in [(true, &sizes * signs, 0.03), (false, sizes.square(), 0.03)] {
            let mut moment = Moment::zeros(&numbers, signed).unwrap();
            moment.keep(&numbers).unwrap();
            let found = moment.numbers().unwrap();
            // Within a block of 256, the numbers fall by a factor of 13 and their squares by a factor of 160.
            let apart = ((&found - &numbers) / &numbers).abs().max().double_value(&[]);
            assert!(apart < off, "{apart}");
            assert_eq!(moment_bytes(700), 3 * 260);
        }
        let tiny = Tensor::from_slice(&[1.0f32, 1e-30, 0.0]);
        let mut moment = Moment::zeros(&tiny, false).unwrap();
        moment.keep(&tiny).unwrap();
        let found = Vec::<f32>::try_from(moment.numbers().unwrap()).unwrap();
        assert!(found[1] > 0.0 && found[2] == 0.0, "{found:?}");
    }
}
