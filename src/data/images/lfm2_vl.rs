//! LFM2-VL: a large picture is cut into tiles and a small view of the whole picture follows; any other picture is only
//! resized. Each frame becomes patches, padded to the same number P.
//!
//! Output: `pixel_values` `[frames, P, 3 * patch * patch]`; `pixel_attention_mask` `[frames, P]`, false at padding;
//! `spatial_shapes` `[frames, 2]` with the rows and columns of patches.
//!
//! Source: `Lfm2VlImageProcessor` of transformers 5.24, which exists only for torchvision.

use ndarray::{ArrayD, IxDyn};

use crate::base::{Error, Result};
use crate::prompt::{Array, PIXEL_ATTENTION_MASK, PIXEL_VALUES, SPATIAL_SHAPES};

use super::grid;
use super::levels::Levels;
use super::picture::Picture;
use super::resample::{Filter, Scaler};
use super::rule::{HALVES, ImageLayout, ImageRule, Processed, floats};
use super::settings::ProcessorSettings;

/// Upper limit of `max_tiles` in a config.
const MAX_TILES: usize = 256;

#[derive(Debug)]
pub(super) struct Lfm2Vl {
    split: bool,
    min_tiles: usize,
    max_tiles: usize,
    thumbnail: bool,
    min_tokens: usize,
    max_tokens: usize,
    patch: usize,
    downsample: usize,
    tile: usize,
    tolerance: f64,
    scaler: Scaler,
    levels: Levels,
}

impl Lfm2Vl {
    pub fn new(settings: &mut ProcessorSettings) -> Result<Self> {
        let split = settings.bool("do_image_splitting", true)?;
        // The class ignores the value of `do_resize`, and computes its sizes from the numbers of tokens.
        settings.bool("do_resize", true)?;
        settings.take("size");
        settings.take("max_num_patches");
        let (mean, std) = HALVES;
        let rule = Lfm2Vl {
            split: settings.tiles(split),
            min_tiles: settings.size("min_tiles", 2)?,
            max_tiles: settings.size("max_tiles", 10)?,
            thumbnail: settings.bool("use_thumbnail", true)?,
            min_tokens: settings.size("min_image_tokens", 64)?,
            max_tokens: settings.size("max_image_tokens", 256)?,
            patch: settings.size("encoder_patch_size", 16)?,
            downsample: settings.size("downsample_factor", 2)?,
            tile: settings.size("tile_size", 512)?,
            tolerance: settings.f64("max_pixels_tolerance", 2.0)?,
            scaler: settings.scaler(Filter::Bilinear)?,
            levels: settings.levels(mean, std)?,
        };
        if !settings.bool("do_pad", true)? {
            return Err(settings.contradiction("`do_pad` is false, expected true"));
        }
        if rule.min_tiles > rule.max_tiles || rule.max_tiles > MAX_TILES || rule.min_tokens > rule.max_tokens {
            return Err(settings.contradiction(format!(
                "expected `min_tiles` {} up to `max_tiles` {} of at most {MAX_TILES}, and `min_image_tokens` {} up to \
                 `max_image_tokens` {}",
                rule.min_tiles, rule.max_tiles, rule.min_tokens, rule.max_tokens
            )));
        }
        if !rule.tile.is_multiple_of(rule.patch) {
            return Err(settings.contradiction(format!(
                "`tile_size` {} is not a multiple of `encoder_patch_size` {}",
                rule.tile, rule.patch
            )));
        }
        Ok(rule)
    }

    /// Edge of the square that becomes one token, in pixels.
    fn unit(&self) -> usize {
        self.patch * self.downsample
    }

    /// True for a picture with more tokens than the limit and its tolerance allow for one view.
    fn is_large(&self, picture: &Picture) -> bool {
        let unit = self.unit() as f64;
        let round = |edge: usize| ((edge as f64 / unit).round_ties_even() * unit).max(self.patch as f64);
        let most = (self.max_tokens * self.unit() * self.unit()) as f64 * self.tolerance;
        round(picture.width()) * round(picture.height()) > most
    }

    /// (width, height) of the view of the whole picture.
    fn whole_size(&self, picture: &Picture) -> (usize, usize) {
        let (w, h, u) = (picture.width() as f64, picture.height() as f64, self.unit() as f64);
        let round = |edge: f64| u.max((edge / u).round_ties_even() * u);
        let (mut new_w, mut new_h) = (round(w), round(h));
        let (least, most) = (self.min_tokens as f64 * u * u, self.max_tokens as f64 * u * u);
        if new_w * new_h > most {
            let shrink = (h * w / most).sqrt();
            (new_w, new_h) = (u.max((w / shrink / u).floor() * u), u.max((h / shrink / u).floor() * u));
        } else if new_w * new_h < least {
            let grow = (least / (h * w)).sqrt();
            (new_w, new_h) = ((w * grow / u).ceil() * u, (h * grow / u).ceil() * u);
        }
        (new_w as usize, new_h as usize)
    }

    /// Number of patches to which every frame is padded.
    fn padded_patches(&self) -> usize {
        let tile = if self.split { (self.tile / self.patch).pow(2) } else { 0 };
        (self.max_tokens * self.downsample.pow(2)).max(tile)
    }
}

impl ImageRule for Lfm2Vl {
    fn process(&self, picture: &Picture, _: usize) -> Result<Processed> {
        let (width, height) = self.whole_size(picture);
        let split = self.split && (self.min_tiles, self.max_tiles) != (1, 1) && self.is_large(picture);
        let original = [picture.height(), picture.width()];
        let mut frames = Vec::new();
        let mut layout = ImageLayout { original, frame: [height, width], tiles: [1, 1], ..ImageLayout::default() };
        if split {
            let [rows, columns] = grid::nearest(original, [self.tile; 2], self.min_tiles, self.max_tiles);
            let canvas = self.scaler.resize(picture, columns * self.tile, rows * self.tile)?;
            frames = canvas.tiles(self.tile, self.tile)?;
            (layout.tiles, layout.frame) = ([rows, columns], [self.tile; 2]);
        }
        if !split || (self.thumbnail && frames.len() > 1) {
            frames.push(self.scaler.resize(picture, width, height)?);
            layout.features = [height, width].map(|edge| (edge / self.patch).div_ceil(self.downsample));
        }
        layout.frames = frames.len();
        layout.tile_features = (self.tile / self.patch).div_ceil(self.downsample).pow(2);
        let (padded, numbers) = (self.padded_patches(), 3 * self.patch * self.patch);
        let patches = |frame: &Picture| (frame.height() / self.patch) * (frame.width() / self.patch);
        if let Some(most) = frames.iter().map(patches).max().filter(|most| *most > padded) {
            return Err(Error::invalid("picture", format!("makes {most} patches, expected at most {padded}"))
                .remedy("lower `--max-pixels`"));
        }
        let mut data = Vec::with_capacity(frames.len() * padded * numbers);
        let mut real = Vec::with_capacity(frames.len() * padded);
        let mut shapes = Vec::new();
        for (place, frame) in frames.iter().enumerate() {
            self.levels.append_patches(frame, self.patch, &mut data);
            let shape = [frame.height() / self.patch, frame.width() / self.patch];
            real.extend((0..padded).map(|patch| patch < shape[0] * shape[1]));
            data.resize((place + 1) * padded * numbers, 0.0);
            shapes.extend(shape.map(|edge| edge as i64));
        }
        let of = |columns: usize| IxDyn(&[frames.len(), columns]);
        let mask = ArrayD::from_shape_fn(of(padded), |place| real[place[0] * padded + place[1]]);
        let shapes = ArrayD::from_shape_fn(of(2), |place| shapes[place[0] * 2 + place[1]]);
        let arrays = vec![
            (PIXEL_VALUES, floats(&[frames.len(), padded, numbers], data)?),
            (PIXEL_ATTENTION_MASK, Array::Bool(mask)),
            (SPATIAL_SHAPES, Array::Int(shapes)),
        ];
        Ok((arrays, layout))
    }
}
