//! What every way to make pixel values gives, and the arrays that it is made of.

use ndarray::{ArrayD, IxDyn};

use crate::base::{Error, Result};
use crate::prompt::Array;

use super::levels::Levels;
use super::picture::Picture;

/// Means and deviations of the pictures that CLIP was trained on.
pub(super) const CLIP: ([f64; 3], [f64; 3]) =
    ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]);
/// Levels from -1 to 1.
pub(super) const HALVES: ([f64; 3], [f64; 3]) = ([0.5; 3], [0.5; 3]);

/// How a video became moments of some frames each.
#[derive(Clone, Debug, PartialEq)]
pub struct VideoLayout {
    /// The middle of each moment in seconds.
    pub times: Vec<f64>,
    /// Features of one moment.
    pub features: usize,
}

/// How a picture was cut up: what its place in the text depends on. Pairs are height and width, or rows and columns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageLayout {
    /// The picture as it came, upright, in pixels.
    pub original: [usize; 2],
    /// One frame in pixels: a tile, or the scaled picture.
    pub frame: [usize; 2],
    /// The grid of tiles; 0 x 0 when the picture was not cut up.
    pub tiles: [usize; 2],
    /// Tiles and views of the whole together.
    pub frames: usize,
    /// The grid of features of the whole view, where the image processor settles it; else 0 x 0.
    pub features: [usize; 2],
    /// Features of one tile, where the image processor settles them; else 0.
    pub tile_features: usize,
}

impl ImageLayout {
    /// A picture that was scaled and not cut up.
    pub(super) fn whole(original: &Picture, frame: &Picture) -> Self {
        ImageLayout {
            original: [original.height(), original.width()],
            frame: [frame.height(), frame.width()],
            frames: 1,
            ..ImageLayout::default()
        }
    }
}

/// Arrays of one picture by the names of the vision encoder's inputs.
pub(super) type Arrays = Vec<(&'static str, Array)>;

/// Arrays of one picture, and how it was cut up.
pub(super) type Processed = (Arrays, ImageLayout);

/// One way to make pixel values.
pub(super) trait Rule: std::fmt::Debug + Send + Sync {
    /// One picture of a conversation with `count` pictures.
    ///
    /// Errors: `Error::Invalid` for a picture that the rule cannot take.
    fn process(&self, picture: &Picture, count: usize) -> Result<Processed>;
}

/// Floats in the given shape.
///
/// Errors: `Error::Invalid` when the data does not fill it.
pub(super) fn floats(shape: &[usize], data: Vec<f32>) -> Result<Array> {
    let array = ArrayD::from_shape_vec(IxDyn(shape), data);
    array.map(Array::Float).map_err(|e| Error::invalid("pixel_values", e.to_string()))
}

/// Frames of one size, `[N, 3, H, W]`.
pub(super) fn frames(frames: &[Picture], levels: &Levels) -> Result<Array> {
    let (height, width) = frames.first().map_or((0, 0), |frame| (frame.height(), frame.width()));
    let mut data = Vec::with_capacity(frames.len() * 3 * height * width);
    for frame in frames {
        levels.append_planes(frame, &mut data);
    }
    floats(&[frames.len(), 3, height, width], data)
}

/// One row of integers, `[1, N]`: what describes a picture as a whole, such as its grid or its size.
pub(super) fn int_row(values: &[i64]) -> Array {
    Array::Int(ArrayD::from_shape_fn(IxDyn(&[1, values.len()]), |place| values[place[1]]))
}
