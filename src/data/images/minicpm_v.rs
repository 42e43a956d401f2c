//! MiniCPM-V 4.6 and 4.7: a view of the whole picture, then slices on a grid that fits the picture's aspect.
//!
//! Output: `pixel_values` `[1, 3, patch, L]` with the patches of all frames side by side, where L is the sum of
//! `width * height / patch` over the frames; `target_sizes` `[frames, 2]` with the rows and columns of patches.
//!
//! Source: `MiniCPMV4_6ImageProcessor` of transformers 5.24.

use ndarray::{ArrayD, IxDyn};

use crate::base::{Error, Result};
use crate::prompt::{Array, PIXEL_VALUES, TARGET_SIZES};

use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::rule::{HALVES, ImageLayout, ImageRule, Processed, floats};
use super::settings::ProcessorSettings;

/// Upper limit of `max_slice_nums` in a config.
const MAX_SLICES: usize = 256;

#[derive(Debug)]
pub(super) struct MiniCpmV {
    slices: Option<usize>,
    resolution: usize,
    patch: usize,
    /// Edge, in patches, of the square that becomes one feature.
    merge: usize,
    scaler: Scaler,
    levels: Levels,
}

impl MiniCpmV {
    pub fn new(settings: &mut ProcessorSettings) -> Result<Self> {
        let slice = settings.bool("slice_mode", true)?;
        let slice = settings.tiles(slice);
        let most = settings.size("max_slice_nums", 9)?;
        let mode = settings.text("downsample_mode", "16x")?;
        let merge = match mode.as_str() {
            "16x" => 4,
            "4x" => 2,
            _ => return Err(settings.contradiction(format!("`downsample_mode` is `{mode}`, expected 16x or 4x"))),
        };
        if most > MAX_SLICES || !settings.bool("do_resize", true)? {
            return Err(settings
                .contradiction(format!("`max_slice_nums` is {most}, expected at most {MAX_SLICES}, and `do_resize`")));
        }
        // `use_image_id` changes the text around a picture, not its pixels.
        settings.take("use_image_id");
        settings.take("size");
        let (mean, std) = HALVES;
        Ok(MiniCpmV {
            slices: slice.then_some(most),
            resolution: settings.size("scale_resolution", 448)?,
            patch: settings.size("patch_size", 14)?,
            merge,
            scaler: settings.scaler(Filter::Bicubic)?,
            levels: settings.levels(mean, std)?,
        })
    }

    /// (width, height) in multiples of `patch * merge`. The area is about `resolution * resolution` if the picture is
    /// larger than that or `enlarge` is true; otherwise the edges are only rounded.
    fn best_size(&self, width: f64, height: f64, enlarge: bool) -> (usize, usize) {
        let (mut width, mut height) = (width, height);
        if height * width > (self.resolution * self.resolution) as f64 || enlarge {
            let aspect = width / height;
            height = (self.resolution as f64 / aspect.sqrt()).trunc();
            width = (height * aspect).trunc();
        }
        let unit = self.patch * self.merge;
        (whole(width, unit), whole(height, unit))
    }

    /// Rows and columns of the slices; `None` for a small picture, or without slices.
    fn grid(&self, picture: &Picture) -> Option<(usize, usize)> {
        let most = self.slices?;
        let (width, height) = (picture.width() as f64, picture.height() as f64);
        let ratio = width * height / (self.resolution * self.resolution) as f64;
        let multiple = (ratio.ceil() as usize).min(most);
        if multiple <= 1 {
            return None;
        }
        let log_ratio = (width / height).ln();
        let (mut best, mut least) = ((1, 1), f64::INFINITY);
        for count in [multiple - 1, multiple, multiple + 1] {
            if count == 1 || count > most {
                continue;
            }
            for rows in (1..=count).filter(|rows| count.is_multiple_of(*rows)) {
                let error = (log_ratio - ((count / rows) as f64 / rows as f64).ln()).abs();
                if error < least {
                    (best, least) = ((rows, count / rows), error);
                } else if error == least && rows > best.0 {
                    best = (rows, count / rows);
                }
            }
        }
        Some(best)
    }
}

/// Rounds to the nearest multiple of `unit`, ties to even, and to at least one `unit`.
fn whole(edge: f64, unit: usize) -> usize {
    ((edge / unit as f64).round_ties_even() as usize * unit).max(unit)
}

impl ImageRule for MiniCpmV {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let (width, height) = (picture.width(), picture.height());
        let grid = self.grid(picture);
        let (w, h) = self.best_size(width as f64, height as f64, grid.is_none());
        let mut all = vec![self.scaler.resize(picture, w, h)?];
        if let Some((rows, columns)) = grid {
            let (w, h) = (whole(width as f64, columns) / columns, whole(height as f64, rows) / rows);
            let (w, h) = self.best_size(w as f64, h as f64, true);
            all.extend(self.scaler.resize(picture, w * columns, h * rows)?.tiles(w, h)?);
        }
        let patches = |frame: &Picture| [frame.height() / self.patch, frame.width() / self.patch];
        let features = |frame: Option<&Picture>| {
            frame.map(patches).map_or(0, |[rows, columns]| rows * columns / (self.merge * self.merge))
        };
        let layout = ImageLayout {
            original: [height, width],
            frame: [h, w],
            tiles: grid.map_or([0, 0], |(rows, columns)| [rows, columns]),
            frames: all.len(),
            features: [1, features(all.first())],
            tile_features: features(all.get(1)),
        };
        let mut planes = Vec::new();
        let mut length = 0;
        for frame in &all {
            let mut data = Vec::with_capacity(frame.width() * frame.height() * 3);
            self.levels.append_planes(frame, &mut data);
            length += frame.width() * frame.height() / self.patch;
            planes.push(data);
        }
        let mut data = Vec::with_capacity(3 * self.patch * length);
        for (channel, line) in (0..3).flat_map(|channel| (0..self.patch).map(move |line| (channel, line))) {
            for (frame, planes) in all.iter().zip(&planes) {
                let (width, height) = (frame.width(), frame.height());
                for row in (line..height).step_by(self.patch) {
                    let start = (channel * height + row) * width;
                    data.extend_from_slice(planes.get(start..start + width).unwrap_or(&[]));
                }
            }
        }
        let sizes: Vec<i64> = all.iter().flat_map(patches).map(|edge| edge as i64).collect();
        let sizes = ArrayD::from_shape_vec(IxDyn(&[all.len(), 2]), sizes);
        let sizes = sizes.map_err(|e| Error::invalid("picture", e.to_string()))?;
        let pixels = floats(&[1, 3, self.patch, length], data)?;
        Ok((vec![(PIXEL_VALUES, pixels), (TARGET_SIZES, Array::Int(sizes))], layout))
    }
}
