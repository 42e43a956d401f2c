//! Resizing 8-bit RGB pictures bit for bit as Pillow does.
//!
//! Pillow's `Resample.c`: for each output position a window of weights, normalised in f64 and rounded to 22 bits of
//! fraction; a horizontal pass, rounded to 8 bits, then a vertical pass. Pillow 13 turns the passes round where the
//! height shrinks much more than the width, which can move a value by one; this is the order of all releases before.

use crate::base::{Error, Result};

use super::picture::Picture;

/// A resampling filter with Pillow's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    Lanczos,
    Bilinear,
    Bicubic,
    Box,
    Hamming,
}

const PRECISION_BITS: u32 = 32 - 8 - 2;

impl Filter {
    /// From `PIL.Image.Resampling`.
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
                ));
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

/// The weights of one output position: where they start in the input, and their fixed-point values.
struct Window {
    start: usize,
    weights: Vec<i32>,
}

fn windows(input: usize, output: usize, filter: Filter) -> Vec<Window> {
    let scale = input as f64 / output as f64;
    let filter_scale = scale.max(1.0);
    let support = filter.support() * filter_scale;
    let step = 1.0 / filter_scale;
    (0..output)
        .map(|place| {
            let center = (place as f64 + 0.5) * scale;
            // Casts from f64 saturate at 0 and cut towards it, as C's do after Pillow's own clamping.
            let start = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            let weights: Vec<f64> = (start..end).map(|x| filter.weight((x as f64 - center + 0.5) * step)).collect();
            let sum: f64 = weights.iter().sum();
            let fixed = weights.iter().map(|&weight| {
                let weight = if sum == 0.0 { weight } else { weight / sum };
                let scaled = weight * f64::from(1u32 << PRECISION_BITS);
                if weight < 0.0 { (scaled - 0.5) as i32 } else { (scaled + 0.5) as i32 }
            });
            Window { start, weights: fixed.collect() }
        })
        .collect()
}

fn round_to_u8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// Resizes to `width` x `height`, both at least 1.
///
/// Errors: `Error::Invalid` when the new picture would have more pixels than a picture may have.
pub fn resize(picture: &Picture, width: usize, height: usize, filter: Filter) -> Result<Picture> {
    if (picture.width(), picture.height()) == (width, height) {
        return Ok(picture.clone());
    }
    Picture::check_size(width, height)?;
    let wide = if picture.width() == width { None } else { Some(horizontal(picture, width, filter)) };
    let wide = wide.as_deref().unwrap_or(picture.rgb());
    if picture.height() == height {
        return Picture::new(width, height, wide.to_vec());
    }
    Picture::new(width, height, vertical(wide, width, picture.height(), height, filter))
}

fn horizontal(picture: &Picture, width: usize, filter: Filter) -> Vec<u8> {
    let windows = windows(picture.width(), width, filter);
    let mut out = vec![0u8; width * picture.height() * 3];
    let rows = picture.rgb().chunks_exact(picture.width() * 3);
    for (row, out) in rows.zip(out.chunks_exact_mut(width * 3)) {
        for (window, out) in windows.iter().zip(out.chunks_exact_mut(3)) {
            let pixels = row.get(window.start * 3..).unwrap_or(&[]).chunks_exact(3);
            let mut sums = [HALF; 3];
            for (pixel, &weight) in pixels.zip(&window.weights) {
                for (sum, &channel) in sums.iter_mut().zip(pixel) {
                    *sum = sum.wrapping_add(i32::from(channel).wrapping_mul(weight));
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = round_to_u8(sum);
            }
        }
    }
    out
}

fn vertical(rgb: &[u8], width: usize, input: usize, output: usize, filter: Filter) -> Vec<u8> {
    let row = width * 3;
    let mut out = vec![0u8; row * output];
    let mut sums = vec![HALF; row];
    for (window, out) in windows(input, output, filter).iter().zip(out.chunks_exact_mut(row)) {
        sums.fill(HALF);
        let rows = rgb.get(window.start * row..).unwrap_or(&[]).chunks_exact(row);
        for (pixels, &weight) in rows.zip(&window.weights) {
            for (sum, &channel) in sums.iter_mut().zip(pixels) {
                *sum = sum.wrapping_add(i32::from(channel).wrapping_mul(weight));
            }
        }
        for (out, &sum) in out.iter_mut().zip(&sums) {
            *out = round_to_u8(sum);
        }
    }
    out
}
