//! Pixtral and Mistral 3: the picture keeps its aspect within a maximum size, and both edges are rounded up to
//! multiples of the patch.
//!
//! Output: `pixel_values` `[1, 3, height, width]`; `image_sizes` `[1, 2]` with that height and width.
//!
//! Source: `PixtralImageProcessor` of transformers 5.24.

use crate::base::Result;
use crate::prompt::{IMAGE_SIZES, PIXEL_VALUES};

use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::rule::{CLIP, ImageLayout, ImageRule, Processed, frames, int_row};
use super::settings::{ProcessorSettings, Size};

#[derive(Debug)]
pub(super) struct Pixtral {
    resize: bool,
    /// Maximum height and width in pixels.
    most: [usize; 2],
    patch: [usize; 2],
    scaler: Scaler,
    levels: Levels,
}

impl Pixtral {
    pub fn new(settings: &mut ProcessorSettings) -> Result<Self> {
        let most = match settings.size_of("size", true)? {
            None => [1024, 1024],
            Some(Size::LongestEdge(edge)) => [edge, edge],
            Some(Size::Exact { height, width }) => [height, width],
            Some(Size::ShortestEdge(_)) => {
                return Err(settings.contradiction("`size` has a shortest edge, expected a longest one"));
            }
        };
        settings.bool("default_to_square", true)?;
        // A single picture needs no padding. A batch of several sizes is padded when it is assembled.
        settings.bool("do_pad", true)?;
        let (mean, std) = CLIP;
        Ok(Pixtral {
            resize: settings.bool("do_resize", true)?,
            most,
            patch: settings.rectangle("patch_size", [16, 16])?,
            scaler: settings.scaler(Filter::Bicubic)?,
            levels: settings.levels(mean, std)?,
        })
    }

    /// (width, height) of the scaled picture.
    fn size(&self, picture: &Picture) -> (usize, usize) {
        let (mut width, mut height) = (picture.width(), picture.height());
        let ratio = (height as f64 / self.most[0] as f64).max(width as f64 / self.most[1] as f64);
        if ratio > 1.0 {
            (width, height) = ((width as f64 / ratio) as usize, (height as f64 / ratio) as usize);
        }
        // An edge that truncates to 0 has no patch and is an error, as in transformers.
        (width.next_multiple_of(self.patch[1]), height.next_multiple_of(self.patch[0]))
    }
}

impl ImageRule for Pixtral {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let frame = if self.resize {
            let (width, height) = self.size(picture);
            self.scaler.resize(picture, width, height)?
        } else {
            picture.clone()
        };
        let layout = ImageLayout::whole(picture, &frame);
        let size = int_row(&layout.frame.map(|edge| edge as i64));
        Ok((vec![(PIXEL_VALUES, frames(&[frame], &self.levels)?), (IMAGE_SIZES, size)], layout))
    }
}
