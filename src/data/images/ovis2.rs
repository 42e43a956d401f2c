//! Ovis2: a view of the whole picture, then tiles on the smallest grid that keeps most of the picture's detail.
//!
//! Output: `pixel_values` `[frames, 3, height, width]`.
//!
//! Source: `Ovis2ImageProcessor` of transformers 5.24.

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
/// Share of the picture's area that a grid must exceed.
const COVERED: f64 = 0.9;

#[derive(Debug)]
pub(super) struct Ovis2 {
    size: [usize; 2],
    /// Minimum and maximum number of tiles; `None` for one view of the whole picture.
    tiles: Option<(usize, usize)>,
    covering: bool,
    scaler: Scaler,
    levels: Levels,
}

impl Ovis2 {
    pub fn new(settings: &mut ProcessorSettings) -> Result<Self> {
        let crop = settings.bool("crop_to_patches", false)?;
        let crop = settings.tiles(crop);
        let (least, most) = (settings.size("min_patches", 1)?, settings.size("max_patches", 12)?);
        if least > most || most > MAX_TILES || !settings.bool("do_resize", true)? {
            return Err(settings.contradiction(format!(
                "`min_patches` is {least} and `max_patches` {most}, expected at most {MAX_TILES} in this order, and \
                 `do_resize`"
            )));
        }
        settings.bool("default_to_square", true)?;
        let (mean, std) = CLIP;
        Ok(Ovis2 {
            size: settings.rectangle("size", [384, 384])?,
            tiles: (crop && most > 1).then_some((least, most)),
            covering: settings.bool("use_covering_area_grid", true)?,
            scaler: settings.scaler(Filter::Bicubic)?,
            levels: settings.levels(mean, std)?,
        })
    }
}

impl ImageRule for Ovis2 {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let [height, width] = self.size;
        let original = [picture.height(), picture.width()];
        let mut layout = ImageLayout { original, frame: self.size, tiles: [1, 1], ..ImageLayout::default() };
        let mut all = Vec::new();
        if let Some((least, most)) = self.tiles {
            let [rows, columns] = if self.covering {
                covering(original, height, most)
            } else {
                grid::nearest(original, self.size, least, most)
            };
            let canvas = self.scaler.resize(picture, width * columns, height * rows)?;
            all = canvas.tiles(width, height)?;
            layout.tiles = [rows, columns];
        }
        if all.len() != 1 {
            all.insert(0, self.scaler.resize(picture, width, height)?);
        }
        layout.frames = all.len();
        Ok((vec![(PIXEL_VALUES, frames(&all, &self.levels)?)], layout))
    }
}

/// Rows and columns of the grid with the fewest tiles whose share exceeds `COVERED`, or of the grid with the largest
/// share if there is none.
///
/// As in transformers, the share of a grid is computed with its rows and columns swapped.
fn covering(original: [usize; 2], tile: usize, most: usize) -> [usize; 2] {
    let judged: Vec<([usize; 2], f64)> = grid::grids(1, most)
        .into_iter()
        .map(|[rows, columns]| ([rows, columns], covered(original, [columns, rows], tile)))
        .collect();
    let count = |grid: &[usize; 2]| grid[0] * grid[1];
    let mut best: Option<&([usize; 2], f64)> = None;
    for found in judged.iter().filter(|(_, share)| *share > COVERED) {
        let better = best.is_none_or(|best| {
            count(&found.0) < count(&best.0) || (count(&found.0) == count(&best.0) && found.1 > best.1)
        });
        if better {
            best = Some(found);
        }
    }
    if best.is_none() {
        for found in &judged {
            let better =
                best.is_none_or(|best| found.1 > best.1 || (found.1 == best.1 && count(&found.0) < count(&best.0)));
            if better {
                best = Some(found);
            }
        }
    }
    best.map_or([1, 1], |(grid, _)| *grid)
}

/// The share of the picture's area that remains when each tile is scaled down to fit a square of `tile` pixels.
fn covered([height, width]: [usize; 2], [rows, columns]: [usize; 2], tile: usize) -> f64 {
    let (row, column) = (height / rows, width / columns);
    let mut sum = 0.0;
    for place in 0..rows * columns {
        let (r, c) = (place / columns, place % columns);
        let h = if r == rows - 1 { height - r * row } else { row };
        let w = if c == columns - 1 { width - c * column } else { column };
        let (long, short) = (w.max(h) as f64, w.min(h) as f64);
        sum += if long > tile as f64 { tile as f64 * (short / long * tile as f64) } else { long * short };
    }
    sum / (width * height) as f64
}
