//! Converts bytes to the normalised floats of a vision encoder.

use super::picture::Picture;
use super::resample::BackEnd;

/// Lookup table of the float for each byte, by channel.
///
/// Classes on Pillow: `byte * rescale_factor` in f64, rounded to f32, then `(x - mean) / std` in f32. Classes on
/// torchvision: one step in f32, `(byte - mean / rescale_factor) / (std / rescale_factor)`.
#[derive(Clone, Debug)]
pub(in crate::data) struct Levels {
    table: Box<[[f32; 256]; 3]>,
    background: [u8; 3],
}

impl Levels {
    pub fn new(
        rescale: Option<f64>,
        normalize: Option<([f64; 3], [f64; 3])>,
        mean: [f64; 3],
        back_end: BackEnd,
    ) -> Self {
        let mut table = Box::new([[0f32; 256]; 3]);
        for (channel, levels) in table.iter_mut().enumerate() {
            for (byte, level) in levels.iter_mut().enumerate() {
                let normalize = normalize.map(|(mean, std)| (mean[channel] as f32, std[channel] as f32));
                *level = match back_end {
                    BackEnd::Pil => {
                        let value = rescale.map_or(byte as f32, |factor| (byte as f64 * factor) as f32);
                        normalize.map_or(value, |(mean, std)| (value - mean) / std)
                    }
                    BackEnd::Torchvision => match (rescale, normalize) {
                        (Some(factor), Some((mean, std))) => {
                            let unit = (1.0 / factor) as f32;
                            (byte as f32 - mean * unit) / (std * unit)
                        }
                        (None, Some((mean, std))) => (byte as f32 - mean) / std,
                        (Some(factor), None) => byte as f32 * factor as f32,
                        (None, None) => byte as f32,
                    },
                };
            }
        }
        Levels { table, background: mean.map(|mean| (mean * 255.0) as u8) }
    }

    /// The mean colour, which pads pictures to squares.
    pub fn background(&self) -> [u8; 3] {
        self.background
    }

    /// Appends the picture as `[3, H, W]`.
    pub fn append_planes(&self, picture: &Picture, out: &mut Vec<f32>) {
        for (channel, levels) in self.table.iter().enumerate() {
            out.extend(picture.rgb().iter().skip(channel).step_by(3).map(|&byte| levels[usize::from(byte)]));
        }
    }

    /// Appends the picture as square patches in row-major order, each `[row, column, channel]`. Pixels after the last
    /// whole patch of a row or column are left out.
    pub fn append_patches(&self, picture: &Picture, patch: usize, out: &mut Vec<f32>) {
        let (rows, columns, line) = (picture.height() / patch, picture.width() / patch, picture.width() * 3);
        for row in 0..rows {
            for column in 0..columns {
                for y in row * patch..(row + 1) * patch {
                    let start = y * line + column * patch * 3;
                    let pixels = picture.rgb().get(start..start + patch * 3).unwrap_or(&[]).chunks_exact(3);
                    for pixel in pixels {
                        out.extend(self.table.iter().zip(pixel).map(|(levels, &byte)| levels[usize::from(byte)]));
                    }
                }
            }
        }
    }
}
