//! Qwen2-VL and Qwen2.5-VL: the picture keeps its aspect, both edges become whole patches, and the patches are laid
//! out flat in the order in which the vision tower merges them.
//!
//! Source: the Pillow-based processor of Hugging Face transformers.

use crate::base::{Error, Result};
use crate::prompt::{IMAGE_GRID_THW, PIXEL_VALUES};

use super::image_processor::{ImageInputs, ImageLayout, ImageProcessor, Levels, Settings, floats, int_row};
use super::picture::Picture;
use super::resample::{Filter, resize};

/// The most times that a still picture is repeated in time.
const MAX_FRAMES: usize = 16;

#[derive(Debug)]
pub(super) struct Qwen2Vl {
    resize: bool,
    min_pixels: usize,
    max_pixels: usize,
    patch: usize,
    frames: usize,
    merge: usize,
    filter: Filter,
    levels: Levels,
}

impl Qwen2Vl {
    pub fn new(settings: &mut Settings) -> Result<Self> {
        let size = settings.edges("size", &["shortest_edge", "longest_edge", "min_pixels", "max_pixels"])?;
        let size = size.unwrap_or_else(|| vec![None; 4]);
        let edge = |place: usize| size.get(place).copied().flatten();
        let min_pixels = settings.pixels("min_pixels")?.or(edge(0)).or(edge(2)).unwrap_or(56 * 56);
        let max_pixels = settings.pixels("max_pixels")?.or(edge(1)).or(edge(3)).unwrap_or(28 * 28 * 1280);
        if min_pixels > max_pixels {
            return Err(Error::invalid(
                "image processor's config",
                format!("min_pixels {min_pixels} is above max_pixels {max_pixels}"),
            ));
        }
        if !settings.bool("do_convert_rgb", true)? {
            return Err(Error::unsupported(
                "`do_convert_rgb` in the image processor's config",
                "is false, expected true",
            ));
        }
        let frames = settings.size("temporal_patch_size", 2)?;
        if frames > MAX_FRAMES {
            return Err(Error::invalid("`temporal_patch_size`", format!("is {frames}, expected at most {MAX_FRAMES}")));
        }
        Ok(Qwen2Vl {
            resize: settings.bool("do_resize", true)?,
            min_pixels,
            max_pixels,
            patch: settings.size("patch_size", 14)?,
            frames,
            merge: settings.size("merge_size", 2)?,
            filter: settings.resample(Filter::Bicubic)?,
            levels: settings.levels([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])?,
        })
    }

    /// Appends the patches of one picture; returns its grid (rows, columns).
    fn patches(&self, picture: &Picture, out: &mut Vec<f32>) -> Result<(usize, usize)> {
        let unit = self.patch * self.merge;
        let scaled = if self.resize {
            let (width, height) =
                smart_size(picture.width(), picture.height(), unit, self.min_pixels, self.max_pixels)?;
            resize(picture, width, height, self.filter)?
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
        let (rows, columns, merge, patch) = (height / self.patch, width / self.patch, self.merge, self.patch);
        for block_row in 0..rows / merge {
            for block_column in 0..columns / merge {
                for row in 0..merge {
                    for column in 0..merge {
                        let top = (block_row * merge + row) * patch;
                        let left = (block_column * merge + column) * patch;
                        for plane in planes.chunks_exact(width * height) {
                            for _ in 0..self.frames {
                                for y in top..top + patch {
                                    out.extend_from_slice(
                                        plane.get(y * width + left..y * width + left + patch).unwrap_or(&[]),
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
        Ok((rows, columns))
    }
}

impl ImageProcessor for Qwen2Vl {
    fn process(&self, pictures: &[Picture]) -> Result<ImageInputs> {
        let mut inputs = ImageInputs::default();
        let width = 3 * self.frames * self.patch * self.patch;
        for picture in pictures {
            let mut data = Vec::new();
            let (rows, columns) = self.patches(picture, &mut data)?;
            let pixels = floats(&[rows * columns, width], data)?;
            let grid = int_row(&[1, rows as i64, columns as i64]);
            let layout = ImageLayout::Run { features: rows * columns / (self.merge * self.merge) };
            inputs.push([(PIXEL_VALUES, pixels), (IMAGE_GRID_THW, grid)], layout)?;
        }
        Ok(inputs)
    }
}

/// (width, height) in multiples of `unit`, with an area within the bounds and the aspect kept as well as that allows.
fn smart_size(
    width: usize,
    height: usize,
    unit: usize,
    min_pixels: usize,
    max_pixels: usize,
) -> Result<(usize, usize)> {
    let (w, h, u) = (width as f64, height as f64, unit as f64);
    if w.max(h) / w.min(h) > 200.0 {
        return Err(Error::invalid(
            "picture",
            format!("is {width} x {height} pixels, expected an aspect of at most 200"),
        ));
    }
    // Python rounds halves to even.
    let round = |edge: f64| (edge / u).round_ties_even() * u;
    let (mut new_w, mut new_h) = (round(w), round(h));
    if new_w * new_h > max_pixels as f64 {
        let shrink = (h * w / max_pixels as f64).sqrt();
        (new_h, new_w) = (u.max((h / shrink / u).floor() * u), u.max((w / shrink / u).floor() * u));
    } else if new_w * new_h < min_pixels as f64 {
        let grow = (min_pixels as f64 / (h * w)).sqrt();
        (new_h, new_w) = ((h * grow / u).ceil() * u, (w * grow / u).ceil() * u);
    }
    Ok((new_w as usize, new_h as usize))
}
