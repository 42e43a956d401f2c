//! Granite-Docling with its own model type: tiles on the grid nearest to the page's aspect, then a view of the whole
//! page. More tiles are allowed for pages that would otherwise be scaled down too much.
//!
//! Output: `pixel_values` `[frames, 3, height, width]`, `pixel_attention_mask` `[frames]`, and `tile_fine_mask` `[1]`
//! with `fine_route`.
//!
//! Source: `GraniteDoclingImageProcessor` of transformers 5.24.

use ndarray::{ArrayD, IxDyn};

use crate::base::Result;
use crate::prompt::{Array, PIXEL_ATTENTION_MASK, PIXEL_VALUES};

use super::grid;
use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::rule::{CLIP, ImageLayout, ImageRule, Processed, frames};
use super::settings::ProcessorSettings;

/// Maximum number of rows and of columns for which the tokenizer has tokens.
const MAX_SIDE: usize = 16;

#[derive(Debug)]
pub(super) struct GraniteDocling {
    size: [usize; 2],
    /// Minimum and maximum number of tiles; `None` for one view of the whole page.
    tiles: Option<(usize, usize)>,
    dense: Dense,
    fine: bool,
    scaler: Scaler,
    levels: Levels,
}

/// Condition for up to `most` tiles: the aspect (width / height) is above `least_aspect` and at most `most_aspect`, and
/// the width of the tiled picture is below `scale` times the page's width. A bound of 0 is not checked, but `scale` or
/// `least_aspect` must be set.
#[derive(Debug)]
struct Dense {
    most: usize,
    scale: f64,
    least_aspect: f64,
    most_aspect: f64,
}

impl GraniteDocling {
    pub fn new(settings: &mut ProcessorSettings) -> Result<Self> {
        let crop = settings.bool("crop_to_patches", true)?;
        let crop = settings.tiles(crop);
        let (least, most) = (settings.size("min_patches", 1)?, settings.size("max_patches", 32)?);
        let dense = Dense {
            most: settings.count("dense_max_patches", 0)?.unwrap_or(0),
            scale: settings.f64("dense_max_scale", 0.0)?,
            least_aspect: settings.f64("dense_min_aspect", 0.0)?,
            most_aspect: settings.f64("dense_max_aspect", 0.0)?,
        };
        if least > most || most.max(dense.most) > MAX_SIDE * MAX_SIDE {
            return Err(settings.contradiction(format!(
                "`min_patches` is {least}, `max_patches` {most} and `dense_max_patches` {}, expected at most {}",
                dense.most,
                MAX_SIDE * MAX_SIDE
            )));
        }
        settings.bool("do_resize", true)?;
        settings.bool("default_to_square", true)?;
        let (mean, std) = CLIP;
        Ok(GraniteDocling {
            size: settings.rectangle("size", [512, 512])?,
            tiles: (crop && most > 1).then_some((least, most)),
            dense,
            fine: settings.bool("fine_route", false)?,
            scaler: settings.scaler(Filter::Bicubic)?,
            levels: settings.levels(mean, std)?,
        })
    }

    /// Rows and columns of the tiles.
    fn grid(&self, original: [usize; 2]) -> [usize; 2] {
        let Some((least, most)) = self.tiles else { return [1, 1] };
        let nearest = |most| grid::nearest_within(original, self.size, least.min(most), most, MAX_SIDE);
        let [height, width] = original.map(|edge| edge as f64);
        let Dense { most: dense, scale, least_aspect, most_aspect } = self.dense;
        let aspect = width / height;
        let selected = dense > 0
            && (scale > 0.0 || least_aspect > 0.0)
            && (least_aspect <= 0.0 || aspect > least_aspect)
            && (most_aspect <= 0.0 || aspect <= most_aspect)
            && (scale <= 0.0 || ((nearest(most)[1] * self.size[1]) as f64 / width) < scale);
        nearest(if selected { dense } else { most })
    }
}

impl ImageRule for GraniteDocling {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let [height, width] = self.size;
        let original = [picture.height(), picture.width()];
        let [rows, columns] = self.grid(original);
        let canvas = self.scaler.resize(picture, width * columns, height * rows)?;
        let mut all = canvas.tiles(width, height)?;
        if all.len() > 1 {
            all.push(self.scaler.resize(picture, width, height)?);
        }
        let layout = ImageLayout {
            original,
            frame: self.size,
            tiles: [rows, columns],
            frames: all.len(),
            ..ImageLayout::default()
        };
        let mask = ArrayD::from_elem(IxDyn(&[all.len()]), true);
        let mut arrays = vec![(PIXEL_VALUES, frames(&all, &self.levels)?), (PIXEL_ATTENTION_MASK, Array::Bool(mask))];
        if self.fine {
            arrays.push(("tile_fine_mask", Array::Bool(ArrayD::from_elem(IxDyn(&[1]), true))));
        }
        Ok((arrays, layout))
    }
}
