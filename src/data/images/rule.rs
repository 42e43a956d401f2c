//! The interface of the rules that compute pixel values, their layouts, and helpers for arrays.

use ndarray::{ArrayD, IxDyn};

use crate::base::{Error, Result};
use crate::prompt::Array;

use super::levels::Levels;
use super::picture::Picture;

/// Means and standard deviations of CLIP's training pictures, by channel.
pub(super) const CLIP: ([f64; 3], [f64; 3]) =
    ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]);
/// Means and standard deviations that map values of 0 to 1 to values of -1 to 1.
pub(super) const HALVES: ([f64; 3], [f64; 3]) = ([0.5; 3], [0.5; 3]);

/// Layout of a video, which is split into moments of a few frames each.
#[derive(Clone, Debug, PartialEq)]
pub struct VideoLayout {
    /// Middle of each moment in seconds.
    pub times: Vec<f64>,
    /// Number of features of one moment.
    pub features: usize,
}

/// Layout of a processed picture, on which its placeholder tokens depend. Pairs are height and width, or rows and
/// columns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageLayout {
    /// Size of the upright picture before processing, in pixels.
    pub original: [usize; 2],
    /// Size of one frame in pixels: a tile, or the scaled picture.
    pub frame: [usize; 2],
    /// Grid of tiles; 0 x 0, or 1 x 1 in some processors, for a picture that is not cut.
    pub tiles: [usize; 2],
    /// Number of tiles and views of the whole picture together.
    pub frames: usize,
    /// Grid of features of the whole view if the image processor determines it, else 0 x 0.
    pub features: [usize; 2],
    /// Number of features of one tile if the image processor determines it, else 0.
    pub tile_features: usize,
}

impl ImageLayout {
    /// Layout of a picture that is scaled and not cut.
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

/// Arrays and layout of one picture.
pub(super) type Processed = (Arrays, ImageLayout);

/// Computes the arrays of a picture. Each kind of image processor has one rule.
pub(super) trait ImageRule: std::fmt::Debug + Send + Sync {
    /// Processes one picture of a conversation with `count` pictures.
    ///
    /// Errors: `Error::Invalid` for a picture that the rule does not accept.
    fn process(&self, picture: &Picture, count: usize) -> Result<Processed>;
}

/// An array of floats in the given shape.
///
/// Errors: `Error::Invalid` when `data` does not match the shape.
pub(super) fn floats(shape: &[usize], data: Vec<f32>) -> Result<Array> {
    let array = ArrayD::from_shape_vec(IxDyn(shape), data);
    array.map(Array::Float).map_err(|e| Error::invalid("pixel_values", e.to_string()))
}

/// Views of a picture, all of one size, as `[N, 3, H, W]`.
///
/// Errors: `Error::Invalid` when the sizes differ.
pub(super) fn frames(frames: &[Picture], levels: &Levels) -> Result<Array> {
    let (height, width) = frames.first().map_or((0, 0), |frame| (frame.height(), frame.width()));
    let mut data = Vec::with_capacity(frames.len() * 3 * height * width);
    for frame in frames {
        if (frame.height(), frame.width()) != (height, width) {
            let found = format!("{}x{}", frame.width(), frame.height());
            return Err(Error::invalid("views of a picture", format!("are {width}x{height} and {found}")));
        }
        levels.append_planes(frame, &mut data);
    }
    floats(&[frames.len(), 3, height, width], data)
}

/// One row of integers, `[1, N]`, such as the grid or the size of a picture.
pub(super) fn int_row(values: &[i64]) -> Array {
    Array::Int(ArrayD::from_shape_fn(IxDyn(&[1, values.len()]), |place| values[place[1]]))
}
