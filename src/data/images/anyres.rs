//! LLaVA-OneVision: one view of the whole picture. With tiles on, and if it is the only picture of the conversation,
//! the tiles of the best listed resolution follow.
//!
//! Output: `pixel_values` `[frames, 3, size, size]`; `image_sizes` `[1, 2]` with the original height and width.
//!
//! Source: `LlavaOnevisionImageProcessor` of transformers 5.24. Tiles are on when the vision encoder packs their features,
//! for which it needs `image_sizes`. The published graphs do not; for them transformers.js passes only the view of the
//! whole picture, and so does this processor.

use serde_json::Value;

use crate::base::Result;
use crate::prompt::{IMAGE_SIZES, PIXEL_VALUES};

use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::rule::{CLIP, ImageLayout, ImageRule, Processed, frames, int_row};
use super::settings::ProcessorSettings;

/// Maximum number of resolutions in a config.
const MAX_RESOLUTIONS: usize = 1024;

#[derive(Debug)]
pub(super) struct AnyRes {
    size: [usize; 2],
    tile: usize,
    /// Heights and widths of the resolutions that can be cut into tiles; empty without tiles.
    resolutions: Vec<[usize; 2]>,
    scaler: Scaler,
    levels: Levels,
}

impl AnyRes {
    pub fn new(settings: &mut ProcessorSettings) -> Result<Self> {
        let size = settings.rectangle("size", [384, 384])?;
        let tile = settings.rectangle("crop_size", size)?[0];
        let listed = resolutions(settings)?;
        let tiles = settings.tiles(false);
        if !settings.bool("do_resize", true)? || size[0] != size[1] || tile != size[0] {
            return Err(settings.contradiction("expected `do_resize`, and `size` and `crop_size` as one square"));
        }
        if let Some([height, width]) = listed.iter().find(|[height, width]| height % tile != 0 || width % tile != 0) {
            return Err(settings.contradiction(format!(
                "`image_grid_pinpoints` has {height} x {width}, expected multiples of {tile}"
            )));
        }
        settings.bool("default_to_square", false)?;
        settings.bool("do_pad", true)?;
        let (mean, std) = CLIP;
        Ok(AnyRes {
            size,
            tile,
            resolutions: if tiles { listed } else { Vec::new() },
            scaler: settings.scaler(Filter::Bicubic)?,
            levels: settings.levels(mean, std)?,
        })
    }
}

/// `image_grid_pinpoints`, or all pairs of multiples of 384 up to 2304.
fn resolutions(settings: &mut ProcessorSettings) -> Result<Vec<[usize; 2]>> {
    let Some(value) = settings.take("image_grid_pinpoints") else {
        let edges = || (1..=6).map(|n| n * 384);
        return Ok(edges().flat_map(|height| edges().map(move |width| [height, width])).collect());
    };
    let edge = |value: &Value| value.as_u64().filter(|edge| (1..=65536).contains(edge)).map(|edge| edge as usize);
    let pair = |value: &Value| match value.as_array().map(Vec::as_slice) {
        Some([height, width]) => Some([edge(height)?, edge(width)?]),
        _ => None,
    };
    let pairs = value.as_array().and_then(|pairs| pairs.iter().map(pair).collect::<Option<Vec<_>>>());
    pairs
        .filter(|pairs| (1..=MAX_RESOLUTIONS).contains(&pairs.len()))
        .ok_or_else(|| settings.error("image_grid_pinpoints", &value, "pairs of height and width"))
}

impl ImageRule for AnyRes {
    fn process(&self, picture: &Picture, count: usize) -> Result<Processed> {
        let [height, width] = self.size;
        let mut layout = ImageLayout {
            original: [picture.height(), picture.width()],
            frame: self.size,
            frames: 1,
            ..ImageLayout::default()
        };
        let mut all = Vec::new();
        if count > 1 && !self.resolutions.is_empty() {
            let padded = picture.in_square(self.levels.background())?;
            all.push(self.scaler.resize(&padded, width, height)?);
            layout.tiles = [1, 1];
        } else {
            all.push(self.scaler.resize(picture, width, height)?);
        }
        if count == 1
            && let Some(best) = best_resolution(layout.original, &self.resolutions)
        {
            all.extend(self.padded(picture, best)?.tiles(self.tile, self.tile)?);
            layout.tiles = best.map(|edge| edge / self.tile);
            layout.frames = all.len();
        }
        let arrays = vec![
            (PIXEL_VALUES, frames(&all, &self.levels)?),
            (IMAGE_SIZES, int_row(&layout.original.map(|edge| edge as i64))),
        ];
        Ok((arrays, layout))
    }
}

impl AnyRes {
    /// The picture scaled to fit a resolution, and centred on black.
    fn padded(&self, picture: &Picture, [height, width]: [usize; 2]) -> Result<Picture> {
        let (by_width, by_height) = (width as f64 / picture.width() as f64, height as f64 / picture.height() as f64);
        let (new_width, new_height) = if by_width < by_height {
            (width, ((picture.height() as f64 * by_width).ceil() as usize).min(height))
        } else {
            (((picture.width() as f64 * by_height).ceil() as usize).min(width), height)
        };
        let scaled = self.scaler.resize(picture, new_width, new_height)?;
        let (left, top) = ((width - new_width) / 2, (height - new_height) / 2);
        scaled.on_canvas(left as isize, top as isize, width, height, [0; 3])
    }
}

/// The resolution that keeps the most pixels of the picture; of several, the one with the fewest wasted pixels.
pub(in crate::data) fn best_resolution(original: [usize; 2], resolutions: &[[usize; 2]]) -> Option<[usize; 2]> {
    let [height, width] = original.map(|edge| edge as f64);
    let (mut best, mut most, mut least) = (None, 0.0, f64::INFINITY);
    for &[h, w] in resolutions {
        let scale = (w as f64 / width).min(h as f64 / height);
        let kept = ((width * scale).trunc() * (height * scale).trunc()).min(width * height);
        let wasted = (w * h) as f64 - kept;
        if kept > most || (kept == most && wasted < least) {
            (best, most, least) = (Some([h, w]), kept, wasted);
        }
    }
    best
}
