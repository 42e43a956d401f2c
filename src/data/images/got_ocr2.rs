//! GOT-OCR2, InternVL3 and Aya Vision: tiles on the grid nearest to the picture's aspect, then a view of the whole
//! picture if there are several tiles.
//!
//! Output: `pixel_values` `[frames, 3, height, width]`.
//!
//! Source: `GotOcr2ImageProcessor` of transformers 5.24.

use crate::base::Result;
use crate::prompt::PIXEL_VALUES;

use super::grid;
use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::rule::{CLIP, ImageLayout, ImageRule, Processed, frames};
use super::settings::ProcessorSettings;

/// Upper limit of `max_patches` in a config.
const MAX_TILES: usize = 256;

#[derive(Debug)]
pub(super) struct GotOcr2 {
    resize: bool,
    size: [usize; 2],
    /// Minimum and maximum number of tiles; `None` for one view of the whole picture.
    tiles: Option<(usize, usize)>,
    scaler: Scaler,
    levels: Levels,
}

impl GotOcr2 {
    pub fn new(settings: &mut ProcessorSettings) -> Result<Self> {
        let crop = settings.bool("crop_to_patches", false)?;
        let crop = settings.tiles(crop);
        let (least, most) = (settings.size("min_patches", 1)?, settings.size("max_patches", 12)?);
        if least > most || most > MAX_TILES {
            return Err(settings.contradiction(format!(
                "`min_patches` is {least} and `max_patches` {most}, expected at most {MAX_TILES} in this order"
            )));
        }
        settings.bool("default_to_square", true)?;
        let (mean, std) = CLIP;
        Ok(GotOcr2 {
            resize: settings.bool("do_resize", true)?,
            size: settings.rectangle("size", [384, 384])?,
            tiles: crop.then_some((least, most)),
            scaler: settings.scaler(Filter::Bicubic)?,
            levels: settings.levels(mean, std)?,
        })
    }
}

impl ImageRule for GotOcr2 {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let [height, width] = self.size;
        let original = [picture.height(), picture.width()];
        let mut layout = ImageLayout { original, frame: self.size, frames: 1, ..ImageLayout::default() };
        let mut all = Vec::new();
        if let Some((least, most)) = self.tiles {
            let [rows, columns] = grid::nearest(original, self.size, least, most);
            let canvas = self.scaler.resize(picture, width * columns, height * rows)?;
            all = canvas.tiles(width, height)?;
            if all.len() > 1 {
                all.push(self.scaler.resize(picture, width, height)?);
            }
            layout.tiles = [rows, columns];
            layout.frames = all.len();
        } else if self.resize {
            all.push(self.scaler.resize(picture, width, height)?);
        } else {
            all.push(picture.clone());
            layout.frame = original;
        }
        Ok((vec![(PIXEL_VALUES, frames(&all, &self.levels)?)], layout))
    }
}
