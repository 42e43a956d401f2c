//! Matrix products, and the choice of the library that computes them.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__cpuid;
use std::ffi::{c_char, c_void};
use std::sync::LazyLock;

use tch::{Device, Kind, TchError, Tensor};

use super::kernel::is_float;
use super::op_error::OpResult;
use super::ranks::text_of;

/// The operand in the autocast kind, if it is a float.
pub fn lowered(x: &Tensor, cast: Option<Kind>) -> OpResult<Tensor> {
    match cast {
        Some(kind) if is_float(x.f_kind()?) => Ok(x.f_to_kind(kind)?),
        _ => Ok(x.shallow_clone()),
    }
}

/// Batched matrix product, as NumPy's `matmul`.
pub fn product(a: &Tensor, b: &Tensor, cast: Option<Kind>) -> OpResult<Tensor> {
    let (a, b) = (lowered(a, cast)?, lowered(b, cast)?);
    if *ONEDNN_IS_FASTER && suits_onednn(&a, &b)? { onednn(&a, &b) } else { Ok(a.f_matmul(&b)?) }
}

/// True on AMD processors from Zen 5 on. They compute 512-bit vectors at once, while MKL, which LibTorch uses for
/// f32 products, runs 256-bit kernels on AMD. There oneDNN needed 0.46 of MKL's time, including its layout copies; on
/// Zen 4, which splits 512-bit vectors, it needed 1.3 times MKL's time.
static ONEDNN_IS_FASTER: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: every x86-64 processor has `cpuid` and both leaves. Newer compilers know that it is safe.
        #[allow(unused_unsafe)]
        let (maker, version) = unsafe { (__cpuid(0), __cpuid(1).eax) };
        let amd = [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).concat() == *b"AuthenticAMD";
        amd && family(version) >= ZEN_5 && is_x86_feature_detected!("avx512f")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
});

/// The family of AMD's Zen 5.
#[cfg(target_arch = "x86_64")]
const ZEN_5: u32 = 0x1a;

/// A processor's family from `cpuid` leaf 1. Source: AMD, APM volume 3, appendix E.3.2.
#[cfg(target_arch = "x86_64")]
fn family(version: u32) -> u32 {
    let (base, extended) = (version >> 8 & 0xf, version >> 20 & 0xff);
    if base == 0xf { base + extended } else { base }
}

/// Smallest number of multiplications for oneDNN; below it, the layout copies take a noticeable share of the time.
const ONEDNN_FROM: i64 = 1 << 20;

/// True for f32 products of rows with a matrix on a CPU.
fn suits_onednn(a: &Tensor, b: &Tensor) -> OpResult<bool> {
    let floats = a.f_kind()? == Kind::Float && b.f_kind()? == Kind::Float;
    if !floats || a.device() != Device::Cpu || b.dim() != 2 || a.dim() < 2 || !tch::utils::has_mkldnn() {
        return Ok(false);
    }
    let (size, columns) = (b.size(), b.size()[1]);
    let work = (a.numel() as i64).checked_mul(columns);
    Ok(a.size().last() == Some(&size[0]) && size[0] > 0 && work.is_none_or(|work| work >= ONEDNN_FROM))
}

/// `[.., K]` by `[K, N]` with oneDNN, with gradients; computed in f32 as in MKL.
///
/// oneDNN compiles a kernel for every number of rows and caches a thousand of them, about 200 KB each. Rows of zeros
/// are added up to a round number, so that few kernels are compiled.
fn onednn(a: &Tensor, b: &Tensor) -> OpResult<Tensor> {
    let mut size = a.size();
    let (depth, columns) = (b.size()[0], b.size()[1]);
    let mut out = a.f_reshape([-1, depth])?.f_contiguous()?;
    let count = round_count(out.size()[0]);
    let mut error = std::ptr::null_mut();
    // SAFETY: the handles are tensors of LibTorch that live until the call returns, which puts the product in the rows' place.
    if !unsafe { interlace_onednn_product(out.as_mut_ptr().cast(), b.as_ptr().cast(), count, &mut error) } {
        return Err(TchError::Torch(text_of(error)).into());
    }
    if let Some(last) = size.last_mut() {
        *last = columns;
    }
    Ok(out.f_reshape(&size)?)
}

unsafe extern "C" {
    fn interlace_onednn_product(rows: *mut c_void, weight: *const c_void, count: i64, error: *mut *mut c_char) -> bool;
}

/// The next number with at most five significant bits that is also a multiple of 32.
fn round_count(count: i64) -> i64 {
    let step = count.checked_ilog2().map_or(1, |bits| 1u64 << bits.saturating_sub(4)).max(32);
    let round = count.unsigned_abs().checked_next_multiple_of(step);
    round.and_then(|round| i64::try_from(round).ok()).unwrap_or(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_counts_are_rounded_up_to_few_distinct_values() {
        let counts: Vec<i64> = [1, 32, 33, 392, 511, 512, 513, 1000, 5000].map(round_count).to_vec();
        assert_eq!(counts, [32, 32, 64, 416, 512, 512, 544, 1024, 5120]);
        let distinct: std::collections::BTreeSet<i64> = (1..=8192).map(round_count).collect();
        assert!(distinct.len() < 100, "{}", distinct.len());
    }

    /// A Zen 5, a Zen 4 and an Intel processor (Sapphire Rapids).
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_cpu_family_is_read_from_base_and_extended_fields() {
        assert_eq!([0x00b0_0f21, 0x00a1_0f11, 0x0008_06f8].map(family), [0x1a, 0x19, 0x6]);
    }

    /// An operand is kept for a gradient only where the other one has one: a kept one cannot be written to before the
    /// backward pass.
    #[test]
    fn operands_that_no_gradient_reads_are_not_kept() {
        let fill =
            |size: &[i64]| Tensor::arange(size.iter().product::<i64>(), (Kind::Float, Device::Cpu)).sin().view(size);
        // Without added rows, which are a copy.
        assert_eq!(round_count(320), 320);
        for trained in [false, true] {
            let leaf = fill(&[320, 80]).set_requires_grad(true);
            let b = fill(&[80, 60]).set_requires_grad(trained);
            let mut a = &leaf * 1.0;
            let out = onednn(&a, &b).unwrap();
            let expected = Tensor::ones([320, 60], (Kind::Float, Device::Cpu)).matmul(&b.detach().tr());
            let _ = tch::no_grad(|| a.zero_());
            let gradient = Tensor::f_run_backward(&[out.sum(Kind::Float)], &[&leaf], false, false);
            match gradient {
                Ok(gradient) => assert!(!trained && gradient[0].allclose(&expected, 1e-4, 1e-4, false)),
                Err(error) => {
                    assert!(trained && error.to_string().contains("modified by an inplace operation"), "{error}")
                }
            }
        }
    }

    /// Values and gradients are as close to those of double precision as LibTorch's own product.
    #[test]
    fn large_products_lose_no_precision() {
        let fill = |size: &[i64], step: f64| {
            let count: i64 = size.iter().product();
            let place = Tensor::arange(count, (Kind::Double, Device::Cpu));
            (place * step).sin().reshape(size).to_kind(Kind::Float)
        };
        let turned = fill(&[4, 80, 96], 0.37).transpose(1, 2);
        for a in [fill(&[3, 90, 80], 0.37), fill(&[300, 80], 0.11), turned] {
            let b = fill(&[80, 60], 0.73);
            assert!(suits_onednn(&a, &b).unwrap());
            let weight = fill(&[1, 60], 0.29);
            let run = |kind: Kind, product: &dyn Fn(&Tensor, &Tensor) -> Tensor| -> Vec<Tensor> {
                let a = a.to_kind(kind).detach().set_requires_grad(true);
                let b = b.to_kind(kind).detach().set_requires_grad(true);
                let out = product(&a, &b);
                let loss = (&out * weight.to_kind(kind)).sum(kind);
                let mut all = Tensor::run_backward(&[loss], &[&a, &b], false, false);
                all.push(out);
                all
            };
            let exact = run(Kind::Double, &|a, b| a.matmul(b));
            let plain = run(Kind::Float, &|a, b| a.matmul(b));
            let own = run(Kind::Float, &|a, b| onednn(a, b).unwrap());
            for ((exact, plain), own) in exact.iter().zip(plain).zip(own) {
                assert_eq!(own.size(), exact.size());
                let off = |found: Tensor| (found.to_kind(Kind::Double) - exact).abs().max().double_value(&[]);
                let (plain, own) = (off(plain), off(own));
                assert!(own <= 2.0 * plain, "error {own:e}, with LibTorch's own product {plain:e}");
            }
        }
    }
}
