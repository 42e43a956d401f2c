//! Qwen2-VL to Qwen3.5, GLM-4.1V to GLM-4.6V and GLM-OCR, PaddleOCR-VL: the picture keeps its aspect, both edges become
//! multiples of `patch * merge`, and each patch becomes one row.
//!
//! Output: `pixel_values` `[patches, channels * frames * patch * patch]` (`[patches, channels * frames, patch, patch]`
//! for PaddleOCR-VL), with the frames of one temporal patch; `image_grid_thw` `[1, 3]`.
//!
//! Source: `Qwen2VLImageProcessor`, `Glm4vImageProcessor`, `PaddleOCRVLImageProcessor` and `Qwen3VLVideoProcessor` of
//! transformers 5.24.

use crate::base::{Error, Result};
use crate::prompt::{IMAGE_GRID_THW, PIXEL_VALUES};

use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::rule::{Arrays, CLIP, HALVES, ImageLayout, ImageRule, Processed, VideoLayout, floats, int_row};
use super::settings::ProcessorSettings;

/// Upper limit of `temporal_patch_size`, which is the number of copies of a still picture.
const MAX_FRAMES: usize = 16;
/// Maximum ratio of the longer edge to the shorter edge.
const MAX_ASPECT: f64 = 200.0;

#[derive(Debug)]
pub(super) struct Patches {
    kind: PatchRule,
    resize: bool,
    min_pixels: usize,
    max_pixels: usize,
    patch: usize,
    frames: usize,
    merge: usize,
    scaler: Scaler,
    levels: Levels,
    /// Maximum number of features of a video frame; `None` for no limit.
    frame_cap: Option<usize>,
}

/// Defaults of a class.
struct Defaults {
    /// Minimum and maximum number of pixels.
    pixels: (usize, usize),
    frames: usize,
    patch: usize,
    levels: ([f64; 3], [f64; 3]),
}

/// Differences between the families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PatchRule {
    /// The patches that are merged into one feature are adjacent in the output.
    Qwen2Vl,
    /// As Qwen2-VL, but a picture smaller than one unit is enlarged first, and the limits refer to the pixels of all
    /// frames of a temporal patch.
    Glm4v,
    /// The patches are in row-major order, and each keeps its axes. A picture smaller than one unit is enlarged first,
    /// one edge after the other.
    PaddleOcrVl,
    /// Frames of a video: sizes as GLM-4.1V, with limits on the pixels of all frames together.
    Qwen3VlVideo,
}

impl Patches {
    pub fn qwen2_vl(settings: &mut ProcessorSettings) -> Result<Self> {
        Self::new(settings, PatchRule::Qwen2Vl, (56 * 56, 28 * 28 * 1280), 2)
    }

    pub fn glm4v(settings: &mut ProcessorSettings) -> Result<Self> {
        Self::new(settings, PatchRule::Glm4v, (112 * 112, 28 * 28 * 15000), 2)
    }

    pub fn paddleocr_vl(settings: &mut ProcessorSettings) -> Result<Self> {
        Self::new(settings, PatchRule::PaddleOcrVl, (384 * 384, 1536 * 1536), 1)
    }

    /// Errors: as the methods of [`ProcessorSettings`].
    pub fn qwen3_vl_video(settings: &mut ProcessorSettings) -> Result<Self> {
        // The caller passes the frames, so nothing is sampled here.
        const SAMPLING: &[&str] = &[
            "fps",
            "num_frames",
            "min_frames",
            "max_frames",
            "do_sample_frames",
            "max_duration",
            "max_image_size",
            "return_metadata",
            "video_metadata",
            "do_convert_rgb",
        ];
        SAMPLING.iter().for_each(|key| drop(settings.take(key)));
        let capped = settings.bool("cap_pixels_per_frame", false)?;
        let cap = settings.size("max_video_tokens", 768)?;
        let defaults = Defaults { pixels: (128 * 32 * 32, 768 * 32 * 32), frames: 2, patch: 16, levels: HALVES };
        let video = Self::with_defaults(settings, PatchRule::Qwen3VlVideo, defaults)?;
        Ok(Patches { frame_cap: capped.then_some(cap), ..video })
    }

    /// Splits a video into moments of `temporal_patch_size` frames each. The last frame is repeated to complete the
    /// last moment. Returns the arrays of each moment, and the layout of the video.
    ///
    /// Errors: `Error::Invalid` without frames, for frames of different sizes, or for fewer frames than one moment has.
    pub fn video(&self, frames: &[Picture], times: &[f64]) -> Result<(Vec<Arrays>, VideoLayout)> {
        let (Some(first), Some(last)) = (frames.first(), times.last()) else {
            return Err(
                Error::invalid("video", "has no frames").remedy("give the frames of the video with `--video-frame`")
            );
        };
        if frames.len() < self.frames {
            return Err(Error::invalid(
                "video",
                format!("has {} frames, expected at least {}", frames.len(), self.frames),
            )
            .remedy("give more frames"));
        }
        if frames.iter().any(|frame| (frame.width(), frame.height()) != (first.width(), first.height())) {
            return Err(
                Error::invalid("video", "has frames of different sizes").remedy("resize the frames to one size")
            );
        }
        let mut scaled = frames.iter().map(|frame| self.scaled(frame, frames.len())).collect::<Result<Vec<_>>>()?;
        let mut times = times.to_vec();
        while let Some(end) = scaled.last().filter(|_| !scaled.len().is_multiple_of(self.frames)) {
            scaled.push(end.clone());
            times.push(*last);
        }
        let mut moments = Vec::new();
        let mut features = 0;
        for moment in scaled.chunks_exact(self.frames) {
            let (arrays, grid) = self.lay_out(&moment.iter().collect::<Vec<_>>())?;
            features = grid[0] * grid[1];
            moments.push(arrays);
        }
        let middle = |moment: &[f64]| (moment.first().unwrap_or(last) + moment.last().unwrap_or(last)) / 2.0;
        Ok((moments, VideoLayout { times: times.chunks_exact(self.frames).map(middle).collect(), features }))
    }

    fn new(settings: &mut ProcessorSettings, kind: PatchRule, pixels: (usize, usize), frames: usize) -> Result<Self> {
        Self::with_defaults(settings, kind, Defaults { pixels, frames, patch: 14, levels: CLIP })
    }

    fn with_defaults(settings: &mut ProcessorSettings, kind: PatchRule, defaults: Defaults) -> Result<Self> {
        let (least, most) = defaults.pixels;
        let size = settings.edges("size", &["shortest_edge", "longest_edge", "min_pixels", "max_pixels"])?;
        let size = size.unwrap_or_else(|| vec![None; 4]);
        let edge = |place: usize| size.get(place).copied().flatten();
        let min_pixels = settings.pixels("min_pixels")?.or(edge(0)).or(edge(2)).unwrap_or(least);
        let max_pixels = settings.pixels("max_pixels")?.or(edge(1)).or(edge(3)).unwrap_or(most);
        if min_pixels > max_pixels || min_pixels == 0 {
            return Err(Error::invalid(
                "image processor's config",
                format!("min_pixels {min_pixels} is 0 or above max_pixels {max_pixels}"),
            )
            .remedy("set `min_pixels` to at least 1 and at most `max_pixels`"));
        }
        let frames = settings.size("temporal_patch_size", defaults.frames)?;
        if frames > MAX_FRAMES {
            return Err(Error::invalid("`temporal_patch_size`", format!("is {frames}, expected at most {MAX_FRAMES}")));
        }
        settings.bool("default_to_square", false)?;
        let (mean, std) = defaults.levels;
        Ok(Patches {
            kind,
            resize: settings.bool("do_resize", true)?,
            min_pixels,
            max_pixels,
            patch: settings.size("patch_size", defaults.patch)?,
            frames,
            merge: settings.size("merge_size", 2)?,
            scaler: settings.scaler(Filter::Bicubic)?,
            levels: settings.levels(mean, std)?,
            frame_cap: None,
        })
    }

    /// (width, height) in multiples of `unit`, with an area within the limits and an aspect close to the picture's.
    /// GLM-4.1V and Qwen3-VL count the pixels of all `frames` frames.
    ///
    /// Errors: `Error::Invalid` for an aspect above `MAX_ASPECT`.
    fn size(&self, picture: &Picture, unit: usize, frames: usize) -> Result<(usize, usize)> {
        let (mut w, mut h, u) = (picture.width() as f64, picture.height() as f64, unit as f64);
        match self.kind {
            PatchRule::Qwen2Vl => {}
            PatchRule::Glm4v | PatchRule::Qwen3VlVideo if w < u || h < u => {
                let grow = (u / h).max(u / w);
                (w, h) = ((w * grow).trunc(), (h * grow).trunc());
            }
            PatchRule::Glm4v | PatchRule::Qwen3VlVideo => {}
            PatchRule::PaddleOcrVl => {
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
            )
            .remedy("crop the picture"));
        }
        let (frames, whole) = match self.kind {
            PatchRule::Qwen2Vl | PatchRule::PaddleOcrVl => (1.0, 1.0),
            PatchRule::Glm4v | PatchRule::Qwen3VlVideo => {
                let patch = self.frames as f64;
                (frames as f64, (frames as f64 / patch).round_ties_even() * patch)
            }
        };
        // Python rounds halves to even.
        let round = |edge: f64| (edge / u).round_ties_even() * u;
        let (mut new_w, mut new_h) = (round(w), round(h));
        let least = self.min_pixels as f64;
        let most = match self.frame_cap {
            None => self.max_pixels as f64,
            Some(cap) => {
                let even = (cap * unit * unit).min(self.max_pixels / (frames as usize).max(1)) as f64;
                even.max((least * 1.05).trunc()) * frames
            }
        };
        if whole * new_w * new_h > most {
            let shrink = (frames * h * w / most).sqrt();
            (new_h, new_w) = (u.max((h / shrink / u).floor() * u), u.max((w / shrink / u).floor() * u));
        } else if whole * new_w * new_h < least {
            let grow = (least / (frames * h * w)).sqrt();
            (new_h, new_w) = ((h * grow / u).ceil() * u, (w * grow / u).ceil() * u);
        }
        Ok((new_w as usize, new_h as usize))
    }

    /// The corners of the patches as (left, top), in output order.
    fn corners(&self, rows: usize, columns: usize) -> Vec<(usize, usize)> {
        let place = |row: usize, column: usize| (column * self.patch, row * self.patch);
        let merge = if self.kind == PatchRule::PaddleOcrVl { 1 } else { self.merge };
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

impl Patches {
    fn scaled(&self, picture: &Picture, frames: usize) -> Result<Picture> {
        let unit = self.patch * self.merge;
        let scaled = if self.resize {
            let (width, height) = self.size(picture, unit, frames)?;
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
        Ok(scaled)
    }

    /// Lays out the patches of the frames of one temporal patch, which have one size. Returns the arrays, and the rows
    /// and columns of features.
    fn lay_out(&self, frames: &[&Picture]) -> Result<(Arrays, [usize; 2])> {
        let (width, height) = frames.first().map_or((0, 0), |frame| (frame.width(), frame.height()));
        let (rows, columns, patch) = (height / self.patch, width / self.patch, self.patch);
        let mut planes = vec![Vec::with_capacity(width * height * 3); frames.len()];
        for (frame, planes) in frames.iter().zip(&mut planes) {
            self.levels.append_planes(frame, planes);
        }
        let mut data = Vec::with_capacity(width * height * 3 * frames.len());
        for (left, top) in self.corners(rows, columns) {
            for channel in 0..3 {
                for plane in planes.iter().filter_map(|planes| planes.chunks_exact(width * height).nth(channel)) {
                    for y in top..top + patch {
                        data.extend_from_slice(plane.get(y * width + left..y * width + left + patch).unwrap_or(&[]));
                    }
                }
            }
        }
        let channels = 3 * frames.len();
        let shape = match self.kind {
            PatchRule::PaddleOcrVl => vec![rows * columns, channels, patch, patch],
            _ => vec![rows * columns, channels * patch * patch],
        };
        let grid = int_row(&[1, rows as i64, columns as i64]);
        let arrays = vec![(PIXEL_VALUES, floats(&shape, data)?), (IMAGE_GRID_THW, grid)];
        Ok((arrays, [rows / self.merge, columns / self.merge]))
    }
}

impl ImageRule for Patches {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let scaled = self.scaled(picture, self.frames)?;
        let (arrays, features) = self.lay_out(&vec![&scaled; self.frames])?;
        Ok((arrays, ImageLayout { features, ..ImageLayout::whole(picture, &scaled) }))
    }
}
