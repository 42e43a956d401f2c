//! Gemma 3: a square view of the whole picture. With pan and scan, a long picture also has crops along its longer edge.
//!
//! Output: `pixel_values` `[1 + crops, 3, height, width]`.
//!
//! Source: `Gemma3ImageProcessor` of transformers 5.24.

use crate::base::Result;
use crate::prompt::PIXEL_VALUES;

use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::rule::{HALVES, ImageLayout, ImageRule, Processed, frames};
use super::settings::ProcessorSettings;

#[derive(Debug)]
pub(super) struct Gemma3 {
    size: Option<[usize; 2]>,
    pan_and_scan: Option<PanAndScan>,
    scaler: Scaler,
    levels: Levels,
}

#[derive(Debug)]
struct PanAndScan {
    min_crop: usize,
    max_crops: usize,
    min_ratio: f64,
}

impl Gemma3 {
    pub fn new(settings: &mut ProcessorSettings) -> Result<Self> {
        let scan = settings.bool("do_pan_and_scan", false)?;
        let scan = settings.tiles(scan);
        let pan_and_scan = PanAndScan {
            min_crop: settings.size("pan_and_scan_min_crop_size", 256)?,
            max_crops: settings.size("pan_and_scan_max_num_crops", 4)?,
            min_ratio: settings.f64("pan_and_scan_min_ratio_to_activate", 1.2)?,
        };
        settings.bool("default_to_square", true)?;
        let resize = settings.bool("do_resize", true)?;
        let size = settings.rectangle("size", [224, 224])?;
        let (mean, std) = HALVES;
        Ok(Gemma3 {
            size: resize.then_some(size),
            pan_and_scan: scan.then_some(pan_and_scan),
            scaler: settings.scaler(Filter::Bilinear)?,
            levels: settings.levels(mean, std)?,
        })
    }
}

impl ImageRule for Gemma3 {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let mut views = vec![picture.clone()];
        let mut tiles = [0, 0];
        if let Some((rows, columns)) = self.pan_and_scan.as_ref().and_then(|scan| scan.grid(picture)) {
            let (width, height) = (picture.width().div_ceil(columns), picture.height().div_ceil(rows));
            for place in 0..rows * columns {
                let (row, column) = (place / columns, place % columns);
                views.push(picture.crop(column * width, row * height, width, height)?);
            }
            tiles = [rows, columns];
        }
        if let Some([height, width]) = self.size {
            views = views.iter().map(|view| self.scaler.resize(view, width, height)).collect::<Result<_>>()?;
        }
        let frame = views.first().map_or([0, 0], |view| [view.height(), view.width()]);
        let layout = ImageLayout {
            original: [picture.height(), picture.width()],
            frame,
            tiles,
            frames: views.len(),
            ..ImageLayout::default()
        };
        Ok((vec![(PIXEL_VALUES, frames(&views, &self.levels)?)], layout))
    }
}

impl PanAndScan {
    /// Rows and columns of the crops, one of which is 1; `None` for a picture that is not long enough.
    fn grid(&self, picture: &Picture) -> Option<(usize, usize)> {
        let (width, height) = (picture.width(), picture.height());
        let (long, short) = (width.max(height), width.min(height));
        if (long as f64 / short as f64) < self.min_ratio {
            return None;
        }
        let crops = (long as f64 / short as f64 + 0.5).floor() as usize;
        let crops = crops.min(long / self.min_crop).max(2).min(self.max_crops);
        if long.div_ceil(crops).min(short) < self.min_crop {
            return None;
        }
        Some(if width >= height { (1, crops) } else { (crops, 1) })
    }
}
