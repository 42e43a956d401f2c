//! Gemma 4: the picture keeps its aspect within a maximum number of patches. The patches are in row-major order and
//! padded to that number.
//!
//! Output, with P = `max_soft_tokens * pool * pool`: `pixel_values` `[1, P, 3 * patch * patch]`; `pixel_position_ids`
//! `[1, P, 2]` with the column and row of each patch, -1 at padding.
//!
//! Source: `Gemma4ImageProcessor` of transformers 5.24.

use ndarray::{ArrayD, IxDyn};

use crate::base::{Error, Result};
use crate::prompt::{Array, PIXEL_POSITION_IDS, PIXEL_VALUES};

use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::rule::{ImageLayout, ImageRule, Processed, floats};
use super::settings::ProcessorSettings;

/// Values of `max_soft_tokens` (image features) that the models were trained with.
const SOFT_TOKENS: [usize; 5] = [70, 140, 280, 560, 1120];

#[derive(Debug)]
pub(super) struct Gemma4 {
    resize: bool,
    patch: usize,
    pool: usize,
    soft_tokens: usize,
    scaler: Scaler,
    levels: Levels,
}

impl Gemma4 {
    pub fn new(settings: &mut ProcessorSettings) -> Result<Self> {
        let soft_tokens = settings.size("max_soft_tokens", 280)?;
        if !SOFT_TOKENS.contains(&soft_tokens) {
            return Err(settings.contradiction(format!("`max_soft_tokens` is {soft_tokens}, expected {SOFT_TOKENS:?}")));
        }
        settings.take("size");
        Ok(Gemma4 {
            resize: settings.bool("do_resize", true)?,
            patch: settings.size("patch_size", 16)?,
            pool: settings.size("pooling_kernel_size", 3)?,
            soft_tokens,
            scaler: settings.scaler(Filter::Bicubic)?,
            levels: settings.levels_unless(false, [0.0; 3], [1.0; 3])?,
        })
    }

    /// Number of patches in the output, padding included.
    fn rows(&self) -> usize {
        self.soft_tokens * self.pool * self.pool
    }

    /// (width, height) of the largest picture of this aspect, in multiples of `pool * patch`.
    ///
    /// Errors: `Error::Invalid` when no size fits the number of patches.
    fn size(&self, picture: &Picture) -> Result<(usize, usize)> {
        let (width, height) = (picture.width(), picture.height());
        let most = (self.rows() * self.patch * self.patch) as f64;
        let grow = (most / (width as f64 * height as f64)).sqrt();
        let unit = self.pool * self.patch;
        let fit = |edge: usize| (grow * edge as f64 / unit as f64).floor() as usize * unit;
        // If the shorter edge would round down to 0, it becomes one `unit`.
        let long = |long: usize, short: usize| ((long / short) * unit).min(self.soft_tokens * unit);
        let (w, h) = match (fit(width), fit(height)) {
            (0, 0) => (0, 0),
            (_, 0) => (long(width, height), unit),
            (0, _) => (unit, long(height, width)),
            fitting => fitting,
        };
        if w == 0 || h == 0 || (w * h) as f64 > most {
            return Err(Error::invalid(
                "picture",
                format!("is {width} x {height} pixels, which do not fit {} patches of {}", self.rows(), self.patch),
            )
            .remedy("crop the picture to an aspect ratio closer to 1"));
        }
        Ok((w, h))
    }
}

impl ImageRule for Gemma4 {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let frame = if self.resize {
            let (width, height) = self.size(picture)?;
            self.scaler.resize(picture, width, height)?
        } else {
            picture.clone()
        };
        let unit = self.pool * self.patch;
        let (rows, columns) = (frame.height() / self.patch, frame.width() / self.patch);
        if !frame.height().is_multiple_of(unit) || !frame.width().is_multiple_of(unit) || rows * columns > self.rows() {
            return Err(Error::invalid(
                "picture",
                format!(
                    "is {} x {} pixels, expected multiples of {unit} and at most {} patches",
                    frame.width(),
                    frame.height(),
                    self.rows()
                ),
            ));
        }
        let width = 3 * self.patch * self.patch;
        let mut data = Vec::with_capacity(self.rows() * width);
        self.levels.append_patches(&frame, self.patch, &mut data);
        data.resize(self.rows() * width, 0.0);
        let positions = ArrayD::from_shape_fn(IxDyn(&[1, self.rows(), 2]), |place| match (place[1], place[2]) {
            (patch, _) if patch >= rows * columns => -1,
            (patch, 0) => (patch % columns) as i64,
            (patch, _) => (patch / columns) as i64,
        });
        let mut layout = ImageLayout::whole(picture, &frame);
        layout.features = [rows / self.pool, columns / self.pool];
        let pixels = floats(&[1, self.rows(), width], data)?;
        Ok((vec![(PIXEL_VALUES, pixels), (PIXEL_POSITION_IDS, Array::Int(positions))], layout))
    }
}
