//! Resizes 8-bit RGB pictures bit for bit as Pillow or torchvision does.
//!
//! Pillow's `Resample.c`: each output position has a window of weights, normalised in f64 and rounded to 22 bits of
//! fraction. A horizontal pass is rounded to 8 bits, and a vertical pass follows. Pillow 13 swaps the passes when the
//! height shrinks much more than the width, which can change a value by one; this module has the order of all earlier
//! releases.
//!
//! Torchvision's antialiased resize of byte tensors (LibTorch's `UpSampleKernel`) has the same windows and passes. It
//! rounds the weights of a pass to the largest number of bits of fraction at which the largest weight fits 16 bits.

use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};

use super::picture::Picture;

/// A resampling filter with Pillow's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Windowed sinc with a support of 3 pixels; Pillow's 1.
    Lanczos,
    /// Triangle with a support of 1 pixel; Pillow's 2.
    Bilinear,
    /// Cubic with a = -0.5 and a support of 2 pixels; Pillow's 3.
    Bicubic,
    /// Mean of the covered pixels; Pillow's 4.
    Box,
    /// Hamming-windowed sinc with a support of 1 pixel; Pillow's 5.
    Hamming,
}

/// Image library whose arithmetic is reproduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BackEnd {
    /// Pillow, which rounds each of the two passes to 8 bits.
    Pil,
    /// torchvision on 8-bit tensors, which rounds the weights of a pass to 16 bits.
    Torchvision,
}

impl BackEnd {
    /// The name in transformers.
    pub fn name(self) -> &'static str {
        match self {
            BackEnd::Pil => "pil",
            BackEnd::Torchvision => "torchvision",
        }
    }
}

impl FromStr for BackEnd {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = [BackEnd::Pil, BackEnd::Torchvision].into_iter().find(|back_end| back_end.name() == text);
        found.ok_or_else(|| {
            Error::invalid(format!("image back end `{text}`"), "is not known").remedy("expected `pil` or `torchvision`")
        })
    }
}

/// Maximum number of bits of fraction of a weight.
const MAX_BITS: u32 = 32 - 8 - 2;

/// A filter with the arithmetic of a back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scaler {
    filter: Filter,
    back_end: BackEnd,
}

impl Scaler {
    /// Errors: `Error::Unsupported` for a filter that torchvision does not have for byte tensors.
    pub fn new(filter: Filter, back_end: BackEnd) -> Result<Self> {
        if back_end == BackEnd::Torchvision && !matches!(filter, Filter::Bilinear | Filter::Bicubic) {
            return Err(Error::unsupported(
                "image back end torchvision",
                format!("has no {filter:?} filter with antialiasing"),
            )
            .remedy("set the image back end to pil"));
        }
        Ok(Scaler { filter, back_end })
    }

    /// Resizes to `width` x `height`, both at least 1.
    ///
    /// Errors: `Error::Invalid` when the result would have more than 100 million pixels.
    pub fn resize(self, picture: &Picture, width: usize, height: usize) -> Result<Picture> {
        if (picture.width(), picture.height()) == (width, height) {
            return Ok(picture.clone());
        }
        Picture::check_size(width, height)?;
        let wide = if picture.width() == width { None } else { Some(horizontal(picture, width, self)) };
        let wide = wide.as_deref().unwrap_or(picture.rgb());
        if picture.height() == height {
            return Picture::new(width, height, wide.to_vec());
        }
        Picture::new(width, height, vertical(wide, width, picture.height(), height, self))
    }
}

impl Filter {
    /// The filter with this number in `PIL.Image.Resampling`.
    ///
    /// Errors: `Error::Unsupported` for another number (0 is nearest neighbour).
    pub fn from_number(number: i64) -> Result<Self> {
        Ok(match number {
            1 => Filter::Lanczos,
            2 => Filter::Bilinear,
            3 => Filter::Bicubic,
            4 => Filter::Box,
            5 => Filter::Hamming,
            _ => {
                return Err(Error::unsupported(
                    format!("`resample` {number}"),
                    "known are 1 lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming",
                )
                .remedy("set `resample` to one of these in the image processor's config"));
            }
        })
    }

    fn support(self) -> f64 {
        match self {
            Filter::Box => 0.5,
            Filter::Bilinear | Filter::Hamming => 1.0,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Filter::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Filter::Bilinear => (1.0 - x.abs()).max(0.0),
            Filter::Hamming => match x.abs() {
                0.0 => 1.0,
                x if x >= 1.0 => 0.0,
                x => {
                    let x = x * std::f64::consts::PI;
                    x.sin() / x * (0.54 + 0.46 * x.cos())
                }
            },
            Filter::Bicubic => {
                const A: f64 = -0.5;
                match x.abs() {
                    x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
                    x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
                    _ => 0.0,
                }
            }
            Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Filter::Lanczos => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * std::f64::consts::PI;
    x.sin() / x
}

/// The weights of one output position: the position of the first in the input, and their fixed-point values.
struct Window {
    start: usize,
    weights: Vec<i32>,
}

/// The windows of a pass, and the number of bits of fraction of their weights.
fn windows(input: usize, output: usize, scaler: Scaler) -> (Vec<Window>, u32) {
    let filter = scaler.filter;
    let scale = input as f64 / output as f64;
    let filter_scale = scale.max(1.0);
    let support = filter.support() * filter_scale;
    let step = 1.0 / filter_scale;
    let exact: Vec<(usize, Vec<f64>)> = (0..output)
        .map(|place| {
            let center = (place as f64 + 0.5) * scale;
            // Casts from f64 truncate and saturate at 0, like C's casts after Pillow's clamping.
            let start = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            let mut weights: Vec<f64> = (start..end).map(|x| filter.weight((x as f64 - center + 0.5) * step)).collect();
            let sum: f64 = weights.iter().sum();
            if sum != 0.0 {
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
            (start, weights)
        })
        .collect();
    let bits = match scaler.back_end {
        BackEnd::Pil => MAX_BITS,
        BackEnd::Torchvision => {
            let largest =
                exact.iter().flat_map(|(_, weights)| weights).fold(0.0, |most: f64, &weight| most.max(weight));
            let fits = |bits: &u32| (0.5 + largest * f64::from(1u32 << (bits + 1))) < f64::from(1u32 << 15);
            (0..MAX_BITS).find(|bits| !fits(bits)).unwrap_or(MAX_BITS)
        }
    };
    let fixed = |weight: f64| {
        let scaled = weight * f64::from(1u32 << bits);
        if weight < 0.0 { (scaled - 0.5) as i32 } else { (scaled + 0.5) as i32 }
    };
    let window =
        |(start, weights): (usize, Vec<f64>)| Window { start, weights: weights.into_iter().map(fixed).collect() };
    (exact.into_iter().map(window).collect(), bits)
}

fn round_to_u8(sum: i32, bits: u32) -> u8 {
    (sum >> bits).clamp(0, 255) as u8
}

fn horizontal(picture: &Picture, width: usize, scaler: Scaler) -> Vec<u8> {
    let (windows, bits) = windows(picture.width(), width, scaler);
    let half = half(bits);
    let mut out = vec![0u8; width * picture.height() * 3];
    let rows = picture.rgb().chunks_exact(picture.width() * 3);
    for (row, out) in rows.zip(out.chunks_exact_mut(width * 3)) {
        for (window, out) in windows.iter().zip(out.chunks_exact_mut(3)) {
            let pixels = row.get(window.start * 3..).unwrap_or(&[]).chunks_exact(3);
            let mut sums = [half; 3];
            for (pixel, &weight) in pixels.zip(&window.weights) {
                for (sum, &channel) in sums.iter_mut().zip(pixel) {
                    *sum = sum.wrapping_add(i32::from(channel).wrapping_mul(weight));
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = round_to_u8(sum, bits);
            }
        }
    }
    out
}

fn vertical(rgb: &[u8], width: usize, input: usize, output: usize, scaler: Scaler) -> Vec<u8> {
    let row = width * 3;
    let (windows, bits) = windows(input, output, scaler);
    let half = half(bits);
    let mut out = vec![0u8; row * output];
    let mut sums = vec![half; row];
    for (window, out) in windows.iter().zip(out.chunks_exact_mut(row)) {
        sums.fill(half);
        let rows = rgb.get(window.start * row..).unwrap_or(&[]).chunks_exact(row);
        for (pixels, &weight) in rows.zip(&window.weights) {
            for (sum, &channel) in sums.iter_mut().zip(pixels) {
                *sum = sum.wrapping_add(i32::from(channel).wrapping_mul(weight));
            }
        }
        for (out, &sum) in out.iter_mut().zip(&sums) {
            *out = round_to_u8(sum, bits);
        }
    }
    out
}

/// Half a unit in the last place. Added to a sum, it makes the truncating shift round.
fn half(bits: u32) -> i32 {
    1 << bits >> 1
}
