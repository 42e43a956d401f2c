//! CLIP, LLaVA-1.5, SigLIP: one frame of a fixed size. The config selects padding to a square (LLaVA only), resizing,
//! and a crop at the centre, in this order.
//!
//! Output: `pixel_values` `[1, 3, height, width]`.
//!
//! Source: `CLIPImageProcessor`, `LlavaImageProcessor` and `SiglipImageProcessor` of transformers 5.24.

use crate::base::Result;
use crate::prompt::PIXEL_VALUES;

use super::levels::Levels;
use super::picture::Picture;
use super::resample::{BackEnd, Filter, Scaler};
use super::rule::{CLIP, HALVES, ImageLayout, ImageRule, Processed, frames};
use super::settings::{ProcessorSettings, Size};

#[derive(Debug)]
pub(super) struct FixedSize {
    square_first: bool,
    size: Option<Size>,
    crop: Option<[usize; 2]>,
    scaler: Scaler,
    levels: Levels,
    back_end: BackEnd,
}

impl FixedSize {
    pub fn clip(settings: &mut ProcessorSettings) -> Result<Self> {
        Self::new(settings, Size::ShortestEdge(224), true, CLIP)
    }

    pub fn llava(settings: &mut ProcessorSettings) -> Result<Self> {
        let square_first = settings.bool("do_pad", false)?;
        Ok(FixedSize { square_first, ..Self::clip(settings)? })
    }

    pub fn siglip(settings: &mut ProcessorSettings) -> Result<Self> {
        Self::new(settings, Size::Exact { height: 224, width: 224 }, false, HALVES)
    }

    fn new(
        settings: &mut ProcessorSettings,
        size: Size,
        crop: bool,
        (mean, std): ([f64; 3], [f64; 3]),
    ) -> Result<Self> {
        let resize = settings.bool("do_resize", true)?;
        let square = settings.bool("default_to_square", false)?;
        let size = settings.size_of("size", square)?.unwrap_or(size);
        if let Size::LongestEdge(_) = size {
            return Err(settings
                .contradiction("`size` has a longest edge alone, expected `height` and `width` or `shortest_edge`"));
        }
        let crop = settings.bool("do_center_crop", crop)?;
        let crop_size = settings.rectangle("crop_size", [224, 224])?;
        Ok(FixedSize {
            square_first: false,
            size: resize.then_some(size),
            crop: crop.then_some(crop_size),
            scaler: settings.scaler(Filter::Bicubic)?,
            levels: settings.levels(mean, std)?,
            back_end: settings.back_end(),
        })
    }
}

impl ImageRule for FixedSize {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let padded = if self.square_first { picture.in_square(self.levels.background())? } else { picture.clone() };
        let scaled = match self.size {
            None | Some(Size::LongestEdge(_)) => padded,
            Some(Size::Exact { height, width }) => self.scaler.resize(&padded, width, height)?,
            Some(Size::ShortestEdge(edge)) => {
                let (width, height) = shortest_edge_size(padded.width(), padded.height(), edge);
                self.scaler.resize(&padded, width, height)?
            }
        };
        let frame = match self.crop {
            None => scaled,
            Some([height, width]) => center_crop(&scaled, width, height, self.back_end)?,
        };
        let layout = ImageLayout::whole(picture, &frame);
        Ok((vec![(PIXEL_VALUES, frames(&[frame], &self.levels)?)], layout))
    }
}

/// (width, height) with the shorter edge at `edge`. The longer edge is truncated to an integer.
fn shortest_edge_size(width: usize, height: usize, edge: usize) -> (usize, usize) {
    let longer = |long: usize, short: usize| ((edge * long) as f64 / short as f64) as usize;
    if width <= height { (edge, longer(height, width)) } else { (longer(width, height), edge) }
}

/// Crops at the centre, and pads a smaller picture with black. With an odd number of padding pixels, the two back ends
/// put the extra one on opposite sides.
fn center_crop(picture: &Picture, width: usize, height: usize, back_end: BackEnd) -> Result<Picture> {
    let offset = |have: usize, want: usize| -> isize {
        if have >= want {
            return -(((have - want) / 2) as isize);
        }
        match back_end {
            BackEnd::Pil => (want - have).div_ceil(2) as isize,
            BackEnd::Torchvision => ((want - have) / 2) as isize,
        }
    };
    let (left, top) = (offset(picture.width(), width), offset(picture.height(), height));
    picture.on_canvas(left, top, width, height, [0; 3])
}
