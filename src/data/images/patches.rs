//! The picture keeps its aspect, both edges become whole patches, and the patches are laid out flat. Qwen2-VL to Qwen3.5,
//! GLM-4.1V to GLM-4.6V and GLM-OCR, PaddleOCR-VL.
//!
//! Source: `Qwen2VLImageProcessor`, `Glm4vImageProcessor` and `PaddleOCRVLImageProcessor` of transformers 5.24.

use crate::base::{Error, Result};
use crate::prompt::{IMAGE_GRID_THW, PIXEL_VALUES};

use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::settings::Settings;
use super::{CLIP, ImageLayout, Processed, Rule, floats, int_row};

/// The most times that a still picture is repeated in time.
const MAX_FRAMES: usize = 16;
/// The longest that a picture may be, in its shorter edge.
const MAX_ASPECT: f64 = 200.0;

#[derive(Debug)]
pub(super) struct Patches {
    kind: Kind,
    resize: bool,
    min_pixels: usize,
    max_pixels: usize,
    patch: usize,
    frames: usize,
    merge: usize,
    scaler: Scaler,
    levels: Levels,
}

/// What the families do differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Patches that are merged come one behind the other.
    Qwen2Vl,
    /// As Qwen2-VL; small pictures are enlarged first, and pixels are counted over the frames of a patch.
    Glm4v,
    /// Patches are small pictures in rows from the top; small pictures are enlarged first, one edge after the other.
    PaddleOcrVl,
}

impl Patches {
    pub fn qwen2_vl(settings: &mut Settings) -> Result<Self> {
        Self::new(settings, Kind::Qwen2Vl, (56 * 56, 28 * 28 * 1280), 2)
    }

    pub fn glm4v(settings: &mut Settings) -> Result<Self> {
        Self::new(settings, Kind::Glm4v, (112 * 112, 28 * 28 * 15000), 2)
    }

    pub fn paddleocr_vl(settings: &mut Settings) -> Result<Self> {
        Self::new(settings, Kind::PaddleOcrVl, (384 * 384, 1536 * 1536), 1)
    }

    fn new(settings: &mut Settings, kind: Kind, (least, most): (usize, usize), frames: usize) -> Result<Self> {
        let size = settings.edges("size", &["shortest_edge", "longest_edge", "min_pixels", "max_pixels"])?;
        let size = size.unwrap_or_else(|| vec![None; 4]);
        let edge = |place: usize| size.get(place).copied().flatten();
        let min_pixels = settings.pixels("min_pixels")?.or(edge(0)).or(edge(2)).unwrap_or(least);
        let max_pixels = settings.pixels("max_pixels")?.or(edge(1)).or(edge(3)).unwrap_or(most);
        if min_pixels > max_pixels || min_pixels == 0 {
            return Err(Error::invalid(
                "image processor's config",
                format!("min_pixels {min_pixels} is 0 or above max_pixels {max_pixels}"),
            ));
        }
        let frames = settings.size("temporal_patch_size", frames)?;
        if frames > MAX_FRAMES {
            return Err(Error::invalid("`temporal_patch_size`", format!("is {frames}, expected at most {MAX_FRAMES}")));
        }
        settings.bool("default_to_square", false)?;
        let (mean, std) = CLIP;
        Ok(Patches {
            kind,
            resize: settings.bool("do_resize", true)?,
            min_pixels,
            max_pixels,
            patch: settings.size("patch_size", 14)?,
            frames,
            merge: settings.size("merge_size", 2)?,
            scaler: settings.scaler(Filter::Bicubic)?,
            levels: settings.levels(mean, std)?,
        })
    }

    /// (width, height) in multiples of `unit`, with an area within the bounds and the aspect kept as well as that allows.
    fn size(&self, picture: &Picture, unit: usize) -> Result<(usize, usize)> {
        let (mut w, mut h, u) = (picture.width() as f64, picture.height() as f64, unit as f64);
        match self.kind {
            Kind::Qwen2Vl => {}
            Kind::Glm4v if w < u || h < u => {
                let grow = (u / h).max(u / w);
                (w, h) = ((w * grow).trunc(), (h * grow).trunc());
            }
            Kind::Glm4v => {}
            Kind::PaddleOcrVl => {
                if h < u {
                    (w, h) = ((w * u / h).round_ties_even(), u);
                }
                if w < u {
                    (w, h) = (u, (h * u / w).round_ties_even());
                }
            }
        }
        if w.max(h) / w.min(h) > MAX_ASPECT {
            return Err(Error::invalid(
                "picture",
                format!(
                    "is {} x {} pixels, expected an aspect of at most {MAX_ASPECT}",
                    picture.width(),
                    picture.height()
                ),
            ));
        }
        let frames = if self.kind == Kind::Glm4v { self.frames as f64 } else { 1.0 };
        // Python rounds halves to even.
        let round = |edge: f64| (edge / u).round_ties_even() * u;
        let (mut new_w, mut new_h) = (round(w), round(h));
        let (least, most) = (self.min_pixels as f64, self.max_pixels as f64);
        if frames * new_w * new_h > most {
            let shrink = (frames * h * w / most).sqrt();
            (new_h, new_w) = (u.max((h / shrink / u).floor() * u), u.max((w / shrink / u).floor() * u));
        } else if frames * new_w * new_h < least {
            let grow = (least / (frames * h * w)).sqrt();
            (new_h, new_w) = ((h * grow / u).ceil() * u, (w * grow / u).ceil() * u);
        }
        Ok((new_w as usize, new_h as usize))
    }

    /// The corners of the patches as (left, top), in the order in which they are laid out.
    fn corners(&self, rows: usize, columns: usize) -> Vec<(usize, usize)> {
        let place = |row: usize, column: usize| (column * self.patch, row * self.patch);
        let merge = if self.kind == Kind::PaddleOcrVl { 1 } else { self.merge };
        let mut corners = Vec::with_capacity(rows * columns);
        if merge == 1 {
            corners.extend((0..rows).flat_map(|row| (0..columns).map(move |column| place(row, column))));
            return corners;
        }
        for block_row in 0..rows / merge {
            for block_column in 0..columns / merge {
                for inner in 0..merge * merge {
                    corners.push(place(block_row * merge + inner / merge, block_column * merge + inner % merge));
                }
            }
        }
        corners
    }
}

impl Rule for Patches {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let unit = self.patch * self.merge;
        let scaled = if self.resize {
            let (width, height) = self.size(picture, unit)?;
            self.scaler.resize(picture, width, height)?
        } else {
            picture.clone()
        };
        let (width, height) = (scaled.width(), scaled.height());
        if !width.is_multiple_of(unit) || !height.is_multiple_of(unit) {
            return Err(Error::invalid(
                "picture",
                format!("is {width} x {height} pixels, expected multiples of {unit}"),
            ));
        }
        let mut planes = Vec::with_capacity(width * height * 3);
        self.levels.append_planes(&scaled, &mut planes);
        let (rows, columns, patch) = (height / self.patch, width / self.patch, self.patch);
        let mut data = Vec::with_capacity(width * height * 3 * self.frames);
        for (left, top) in self.corners(rows, columns) {
            for plane in planes.chunks_exact(width * height) {
                for _ in 0..self.frames {
                    for y in top..top + patch {
                        data.extend_from_slice(plane.get(y * width + left..y * width + left + patch).unwrap_or(&[]));
                    }
                }
            }
        }
        let channels = 3 * self.frames;
        let shape = match self.kind {
            Kind::PaddleOcrVl => vec![rows * columns, channels, patch, patch],
            _ => vec![rows * columns, channels * patch * patch],
        };
        let mut layout = ImageLayout::whole(picture, &scaled);
        layout.features = [rows / self.merge, columns / self.merge];
        let grid = int_row(&[1, rows as i64, columns as i64]);
        Ok((vec![(PIXEL_VALUES, floats(&shape, data)?), (IMAGE_GRID_THW, grid)], layout))
    }
}
