//! Janus, DeepSeek-VL: the longer edge is scaled to the size, and the picture is centred on a square of the mean
//! colour.
//!
//! Output: `pixel_values` `[1, 3, size, size]`; without `do_pad`, the size of the scaled picture.
//!
//! Source: `JanusImageProcessor` and `DeepseekVLImageProcessor` of transformers 5.24.

use crate::base::Result;
use crate::prompt::PIXEL_VALUES;

use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::rule::{CLIP, ImageLayout, ImageRule, Processed, frames};
use super::settings::ProcessorSettings;

#[derive(Debug)]
pub(super) struct Centred {
    size: usize,
    min_size: usize,
    pad: bool,
    scaler: Scaler,
    levels: Levels,
}

impl Centred {
    pub fn new(settings: &mut ProcessorSettings) -> Result<Self> {
        let size = settings.rectangle("size", [384, 384])?;
        if size[0] != size[1] || !settings.bool("do_resize", true)? {
            return Err(settings.contradiction("expected `do_resize` and `size` as a square"));
        }
        settings.bool("default_to_square", true)?;
        settings.take("background_color");
        let (mean, std) = CLIP;
        Ok(Centred {
            size: size[0],
            min_size: settings.size("min_size", 14)?,
            pad: settings.bool("do_pad", true)?,
            scaler: settings.scaler(Filter::Bicubic)?,
            levels: settings.levels(mean, std)?,
        })
    }
}

impl ImageRule for Centred {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let scale = self.size as f64 / picture.width().max(picture.height()) as f64;
        let edge = |edge: usize| ((edge as f64 * scale).round_ties_even() as usize).max(self.min_size);
        let scaled = self.scaler.resize(picture, edge(picture.width()), edge(picture.height()))?;
        let frame = if self.pad { scaled.in_square(self.levels.background())? } else { scaled };
        let layout = ImageLayout::whole(picture, &frame);
        Ok((vec![(PIXEL_VALUES, frames(&[frame], &self.levels)?)], layout))
    }
}
