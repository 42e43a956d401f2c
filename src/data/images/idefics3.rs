//! Idefics3 and SmolVLM: the longest edge is scaled, then the picture is cut into square tiles, and a view of the whole
//! picture follows. Without splitting, the picture is resized to one square.
//!
//! Output: `pixel_values` `[frames, 3, tile, tile]`; `pixel_attention_mask` `[frames, tile, tile]`, true everywhere.
//!
//! Source: `Idefics3ImageProcessor` and `SmolVLMImageProcessor` on Pillow, of Hugging Face transformers. Sizes are in
//! f64, as there.

use ndarray::{ArrayD, IxDyn};

use crate::base::{Error, Result};
use crate::prompt::{Array, PIXEL_ATTENTION_MASK, PIXEL_VALUES};

use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::rule::{HALVES, ImageLayout, ImageRule, Processed, frames};
use super::settings::ProcessorSettings;

/// Maximum edge after the first resize, in pixels.
const MAX_EDGE: usize = 4096;
/// Maximum number of tiles of one picture.
const MAX_TILES: usize = 1024;

#[derive(Debug)]
pub(super) struct Idefics3 {
    resize: Option<ResizeTarget>,
    split: bool,
    tile: usize,
    scaler: Scaler,
    levels: Levels,
}

#[derive(Debug)]
enum ResizeTarget {
    LongestEdge(usize),
    Exact { height: usize, width: usize },
}

impl Idefics3 {
    pub fn new(settings: &mut ProcessorSettings) -> Result<Self> {
        let do_resize = settings.bool("do_resize", true)?;
        let edges = settings.edges("size", &["longest_edge", "height", "width"])?;
        let target = match edges.as_deref() {
            None => ResizeTarget::LongestEdge(4 * 364),
            Some([Some(longest), _, _]) => ResizeTarget::LongestEdge(*longest),
            Some([None, Some(height), Some(width)]) => ResizeTarget::Exact { height: *height, width: *width },
            Some(_) => {
                return Err(Error::invalid(
                    "`size` in the image processor's config",
                    "expected `longest_edge`, or `height` and `width`",
                )
                .remedy("restore the config that belongs to the model"));
            }
        };
        let tile = match settings.edges("max_image_size", &["longest_edge"])?.as_deref() {
            Some([Some(edge)]) if *edge <= MAX_EDGE => *edge,
            None => 364,
            Some(_) => {
                return Err(Error::invalid(
                    "`max_image_size` in the image processor's config",
                    format!("expected `longest_edge` of 1 to {MAX_EDGE}"),
                )
                .remedy("restore the config that belongs to the model"));
            }
        };
        // All frames have one size, so padding adds nothing to one sample except the mask.
        settings.bool("do_pad", true)?;
        settings.bool("default_to_square", true)?;
        let split = settings.bool("do_image_splitting", true)?;
        let (mean, std) = HALVES;
        Ok(Idefics3 {
            resize: do_resize.then_some(target),
            split: settings.tiles(split),
            tile,
            scaler: settings.scaler(Filter::Lanczos)?,
            levels: settings.levels(mean, std)?,
        })
    }

    /// Appends the frames to `out`. Returns the rows and columns of tiles, 0 x 0 for a picture that is not cut.
    fn cut(&self, picture: &Picture, out: &mut Vec<Picture>) -> Result<[usize; 2]> {
        let scaled = match &self.resize {
            None => picture.clone(),
            Some(ResizeTarget::Exact { height, width }) => self.scaler.resize(picture, *width, *height)?,
            Some(ResizeTarget::LongestEdge(edge)) => {
                let (width, height) = longest_edge_size(picture.width(), picture.height(), *edge);
                self.scaler.resize(picture, width, height)?
            }
        };
        let tile = self.tile;
        if !self.split {
            out.push(self.scaler.resize(&scaled, tile, tile)?);
            return Ok([0, 0]);
        }
        let (width, height) = tiled_size(scaled.width(), scaled.height(), tile);
        let whole = self.scaler.resize(&scaled, width, height)?;
        if width <= tile && height <= tile {
            out.push(whole);
            return Ok([0, 0]);
        }
        let (rows, columns) = (height / tile, width / tile);
        if rows.saturating_mul(columns) > MAX_TILES {
            return Err(Error::invalid(
                "picture",
                format!("makes {rows} x {columns} tiles, expected at most {MAX_TILES}"),
            )
            .remedy("crop the picture to an aspect ratio closer to 1"));
        }
        for row in 0..rows {
            for column in 0..columns {
                out.push(whole.crop(column * tile, row * tile, tile, tile)?);
            }
        }
        out.push(self.scaler.resize(&whole, tile, tile)?);
        Ok([rows, columns])
    }
}

impl ImageRule for Idefics3 {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let mut all = Vec::new();
        let tiles = self.cut(picture, &mut all)?;
        let layout = ImageLayout {
            original: [picture.height(), picture.width()],
            frame: [self.tile; 2],
            tiles,
            frames: all.len(),
            ..ImageLayout::default()
        };
        let mask = ArrayD::from_elem(IxDyn(&[all.len(), self.tile, self.tile]), true);
        let arrays = vec![(PIXEL_VALUES, frames(&all, &self.levels)?), (PIXEL_ATTENTION_MASK, Array::Bool(mask))];
        Ok((arrays, layout))
    }
}

/// (width, height) with the longer edge at `edge`. The other edge is rounded down, then up to an even number. Both are
/// at most `MAX_EDGE`.
fn longest_edge_size(width: usize, height: usize, edge: usize) -> (usize, usize) {
    let aspect = width as f64 / height as f64;
    let (mut w, mut h) = if width >= height {
        let h = (edge as f64 / aspect) as usize;
        (edge, h + h % 2)
    } else {
        let w = (edge as f64 * aspect) as usize;
        (w + w % 2, edge)
    };
    (w, h) = (w.max(1), h.max(1));
    let aspect = w as f64 / h as f64;
    if w >= h && w > MAX_EDGE {
        (w, h) = (MAX_EDGE, (MAX_EDGE as f64 / aspect) as usize);
    } else if h > w && h > MAX_EDGE {
        (w, h) = ((MAX_EDGE as f64 * aspect) as usize, MAX_EDGE);
    }
    (w.max(1), h.max(1))
}

/// (width, height) rounded up to multiples of `tile`, the longer edge first.
fn tiled_size(width: usize, height: usize, tile: usize) -> (usize, usize) {
    let aspect = width as f64 / height as f64;
    let up = |edge: usize| edge.div_ceil(tile).max(1) * tile;
    if width >= height {
        let width = up(width);
        (width, up((width as f64 / aspect) as usize))
    } else {
        let height = up(height);
        (up((height as f64 * aspect) as usize), height)
    }
}
