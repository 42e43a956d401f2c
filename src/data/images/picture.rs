//! Decodes pictures to 8-bit RGB.

use std::io::Cursor;

use image::metadata::Orientation;
use image::{DynamicImage, ExtendedColorType, ImageDecoder, ImageReader, Limits, RgbImage};

use crate::base::{Error, Result};

use super::super::guard::guarded;
use super::super::sample::ImageBytes;
use super::jpeg;

/// Maximum number of pixels of a decoded or resized picture.
const MAX_PIXELS: usize = 100_000_000;
/// Maximum number of bytes that a decoder may allocate.
const MAX_DECODER_BYTES: u64 = 1 << 30;

/// Treatment of transparent pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transparency {
    /// The picture is composited over white, as the image processors of transformers 5 do under `do_convert_rgb`.
    OnWhite,
    /// The alpha channel is dropped, as in Pillow's `convert("RGB")`.
    Dropped,
}

/// An 8-bit RGB picture in row-major order, from the top left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

impl Picture {
    /// A picture from `[height, width, 3]` bytes.
    ///
    /// Errors: `Error::Invalid` unless `rgb` has `width * height * 3` bytes, and 1 to 100 million pixels.
    pub fn new(width: usize, height: usize, rgb: Vec<u8>) -> Result<Self> {
        Self::check_size(width, height)?;
        if rgb.len() != width * height * 3 {
            return Err(Error::invalid("picture", format!("has {} bytes, expected {width} x {height} x 3", rgb.len())));
        }
        Ok(Picture { width, height, rgb })
    }

    pub(super) fn check_size(width: usize, height: usize) -> Result<()> {
        let pixels = width.checked_mul(height).filter(|pixels| (1..=MAX_PIXELS).contains(pixels));
        pixels.map(|_| ()).ok_or_else(|| {
            Error::invalid("picture", format!("is {width} x {height} pixels, expected 1 to {MAX_PIXELS} in all"))
                .remedy("resize the picture")
        })
    }

    /// Width in pixels, at least 1.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels, at least 1.
    pub fn height(&self) -> usize {
        self.height
    }

    /// `[height, width, 3]` in row-major order, red first.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Decodes the first frame and applies its EXIF orientation. JPEG and PNG are equal to Pillow's bit for bit.
    ///
    /// Errors: as [`ImageBytes::read`]; `Error::Invalid` names the picture when it does not decode, is truncated, has
    /// more than 100 million pixels, or holds floating-point samples or CMYK samples outside a JPEG.
    pub fn decode(image: &ImageBytes, transparency: Transparency) -> Result<Self> {
        let bytes = image.read()?;
        guarded(|| decode(&bytes, transparency)).and_then(|picture| picture).map_err(|problem| {
            Error::invalid(&image.subject, problem).remedy("expected a PNG, JPEG, WebP, GIF, BMP or TIFF picture")
        })
    }

    /// The rectangle of `width` x `height` at (`left`, `top`), clipped to the picture.
    pub(super) fn crop(&self, left: usize, top: usize, width: usize, height: usize) -> Result<Self> {
        let right = left.saturating_add(width).min(self.width);
        let bottom = top.saturating_add(height).min(self.height);
        let rows =
            (top..bottom).filter_map(|y| self.rgb.get((y * self.width + left) * 3..(y * self.width + right) * 3));
        Picture::new(right.saturating_sub(left), bottom.saturating_sub(top), rows.flatten().copied().collect())
    }

    /// The picture on a canvas of `width` x `height` in one colour, with its corner at (`left`, `top`). The corner may
    /// be outside the canvas; parts outside are cut off.
    pub(super) fn on_canvas(
        &self,
        left: isize,
        top: isize,
        width: usize,
        height: usize,
        colour: [u8; 3],
    ) -> Result<Self> {
        Picture::check_size(width, height)?;
        let mut rgb = colour.repeat(width * height);
        let (skip, shift) = (left.min(0).unsigned_abs(), left.max(0).unsigned_abs());
        let shown = self.width.saturating_sub(skip).min(width.saturating_sub(shift));
        for (y, row) in rgb.chunks_exact_mut(width * 3).enumerate() {
            let source = (y as isize - top).try_into().ok().filter(|source: &usize| *source < self.height);
            let pixels = source.map(|source| (source * self.width + skip) * 3).and_then(|start| {
                let end = start + shown * 3;
                self.rgb.get(start..end)
            });
            if let (Some(pixels), Some(place)) = (pixels, row.get_mut(shift * 3..(shift + shown) * 3)) {
                place.copy_from_slice(pixels);
            }
        }
        Ok(Picture { width, height, rgb })
    }

    /// The picture in the centre of a square of its longer edge. An odd pixel of padding is at the right or the bottom.
    pub(super) fn in_square(&self, colour: [u8; 3]) -> Result<Self> {
        let edge = self.width.max(self.height);
        if self.width == self.height {
            return Ok(self.clone());
        }
        let (left, top) = ((edge - self.width) / 2, (edge - self.height) / 2);
        self.on_canvas(left as isize, top as isize, edge, edge, colour)
    }

    /// Tiles of `width` x `height`, row by row. The picture must be a whole number of tiles.
    pub(super) fn tiles(&self, width: usize, height: usize) -> Result<Vec<Self>> {
        let mut tiles = Vec::new();
        for row in 0..self.height / height {
            for column in 0..self.width / width {
                tiles.push(self.crop(column * width, row * height, width, height)?);
            }
        }
        Ok(tiles)
    }
}

fn decode(bytes: &[u8], transparency: Transparency) -> Result<Picture, String> {
    let (orientation, image) =
        if jpeg::is_jpeg(bytes) { (jpeg::orientation(bytes), decode_jpeg(bytes)?) } else { decode_other(bytes)? };
    let mut image = image;
    image.apply_orientation(orientation);
    let (width, height) = (image.width() as usize, image.height() as usize);
    let rgb = to_rgb(image, transparency)?;
    Picture::new(width, height, rgb).map_err(|e| e.to_string())
}

fn decode_jpeg(bytes: &[u8]) -> Result<DynamicImage, String> {
    let check = |width, height| Picture::check_size(width, height).map_err(|e| e.to_string());
    let decoded = jpeg::decode(bytes, check).map_err(|problem| format!("does not decode: it {problem}"))?;
    let (width, height) = (decoded.width as u32, decoded.height as u32);
    let image = RgbImage::from_raw(width, height, decoded.rgb).ok_or("does not decode: its size is wrong")?;
    Ok(DynamicImage::ImageRgb8(image))
}

fn decode_other(bytes: &[u8]) -> Result<(Orientation, DynamicImage), String> {
    let failed = |e: image::ImageError| format!("does not decode: {e}");
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| e.to_string())?;
    let mut decoder = reader.into_decoder().map_err(failed)?;
    let (width, height) = decoder.dimensions();
    Picture::check_size(width as usize, height as usize).map_err(|e| e.to_string())?;
    if matches!(decoder.original_color_type(), ExtendedColorType::Cmyk8 | ExtendedColorType::Cmyk16) {
        return Err("holds CMYK samples outside a JPEG, which are not supported".into());
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    decoder.set_limits(limits).map_err(failed)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    Ok((orientation, DynamicImage::from_decoder(decoder).map_err(failed)?))
}

/// Converts to RGB as Pillow does: 16-bit colour samples keep their high byte, 16-bit grey samples without alpha are
/// clamped to 255.
fn to_rgb(image: DynamicImage, transparency: Transparency) -> Result<Vec<u8>, String> {
    let high = |sample: &u16| (sample >> 8) as u8;
    let opaque = |pixel| match transparency {
        Transparency::OnWhite => on_white(pixel),
        Transparency::Dropped => [pixel[0], pixel[1], pixel[2]],
    };
    Ok(match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageLuma8(image) => image.as_raw().iter().flat_map(|&y| [y; 3]).collect(),
        DynamicImage::ImageLumaA8(image) => {
            image.as_raw().chunks_exact(2).flat_map(|p| opaque([p[0], p[0], p[0], p[1]])).collect()
        }
        DynamicImage::ImageRgba8(image) => {
            image.as_raw().chunks_exact(4).flat_map(|p| opaque([p[0], p[1], p[2], p[3]])).collect()
        }
        DynamicImage::ImageRgb16(image) => image.as_raw().iter().map(high).collect(),
        DynamicImage::ImageLuma16(image) => image.as_raw().iter().flat_map(|&y| [y.min(255) as u8; 3]).collect(),
        DynamicImage::ImageLumaA16(image) => {
            let pixels = image.as_raw().chunks_exact(2);
            pixels.flat_map(|p| opaque([high(&p[0]), high(&p[0]), high(&p[0]), high(&p[1])])).collect()
        }
        DynamicImage::ImageRgba16(image) => {
            let pixels = image.as_raw().chunks_exact(4);
            pixels.flat_map(|p| opaque([high(&p[0]), high(&p[1]), high(&p[2]), high(&p[3])])).collect()
        }
        _ => return Err("holds floating-point samples, which are not supported".into()),
    })
}

/// Pillow's `alpha_composite` over opaque white, with 7 extra bits of precision and rounded divisions by 255.
fn on_white([red, green, blue, alpha]: [u8; 4]) -> [u8; 3] {
    const BITS: u32 = 7;
    if alpha == 0 {
        return [255; 3];
    }
    let source = u32::from(alpha) * 255 * 255 * (1 << BITS) / (255 * 255);
    let white = 255 * (1 << BITS) - source;
    [red, green, blue].map(|channel| {
        let sum = u32::from(channel) * source + 255 * white + (0x80 << BITS);
        ((((sum >> 8) + sum) >> 8) >> BITS) as u8
    })
}
