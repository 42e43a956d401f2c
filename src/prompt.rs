//! Prompts as arrays: token ids and, for each picture, the inputs of the vision encoder. Processors create prompts;
//! sessions run them.

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::{ArrayD, Axis, concatenate};

use crate::base::{Error, Result, Sha256Digest, sha256_bytes};

mod given;

pub use given::{GivenRow, TensorBatch};

/// Pixels: tiles `[N, C, H, W]`, patches `[P, D]`, or tiles of patches `[N, P, D]`.
pub const PIXEL_VALUES: &str = "pixel_values";
/// True at real pixels or patches, false at padding: `[N, H, W]` or `[N, P]`.
pub const PIXEL_ATTENTION_MASK: &str = "pixel_attention_mask";
/// Number of patches in time, height and width: `[1, 3]`.
pub const IMAGE_GRID_THW: &str = "image_grid_thw";
/// Number of patches in height and width: `[1, 2]`.
pub const IMAGE_GRID_HWS: &str = "image_grid_hws";
/// Height and width in pixels, before or after resizing, depending on the family: `[1, 2]`.
pub const IMAGE_SIZES: &str = "image_sizes";
/// Number of patches in height and width, for each tile of patches: `[N, 2]`.
pub const SPATIAL_SHAPES: &str = "spatial_shapes";
/// Column and row of each patch, -1 at padding: `[1, P, 2]`.
pub const PIXEL_POSITION_IDS: &str = "pixel_position_ids";
/// Number of patches in height and width, for each slice: `[N, 2]`.
pub const TARGET_SIZES: &str = "target_sizes";
/// True at real patches: `[N, 1, P]` or `[N, P]`.
pub const PATCH_ATTENTION_MASK: &str = "patch_attention_mask";

/// An array with the element type of its processor; a graph's input may need another type.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    /// Pixels and other real numbers.
    Float(ArrayD<f32>),
    /// Ids, positions and sizes.
    Int(ArrayD<i64>),
    /// Masks.
    Bool(ArrayD<bool>),
}

impl Array {
    /// Axis lengths.
    pub fn shape(&self) -> &[usize] {
        match self {
            Array::Float(array) => array.shape(),
            Array::Int(array) => array.shape(),
            Array::Bool(array) => array.shape(),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// True when there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements, if the array has floats.
    pub fn floats(&self) -> Option<&ArrayD<f32>> {
        match self {
            Array::Float(array) => Some(array),
            _ => None,
        }
    }

    /// The elements, if the array has integers.
    pub fn ints(&self) -> Option<&ArrayD<i64>> {
        match self {
            Array::Int(array) => Some(array),
            _ => None,
        }
    }

    /// Several arrays, concatenated along their first axis.
    ///
    /// Errors: `Error::Invalid` when the list is empty, or when element types or other axes differ.
    pub fn joined(arrays: &[&Array]) -> Result<Array> {
        macro_rules! join {
            ($kind:ident) => {{
                let views: Option<Vec<_>> = arrays
                    .iter()
                    .map(|array| match array {
                        Array::$kind(array) => Some(array.view()),
                        _ => None,
                    })
                    .collect();
                views.and_then(|views| concatenate(Axis(0), &views).ok()).map(Array::$kind)
            }};
        }
        let joined = match arrays.first() {
            Some(Array::Float(_)) => join!(Float),
            Some(Array::Int(_)) => join!(Int),
            Some(Array::Bool(_)) => join!(Bool),
            None => None,
        };
        let shapes: Vec<&[usize]> = arrays.iter().map(|array| array.shape()).collect();
        joined.ok_or_else(|| Error::invalid("arrays of pictures", format!("of shapes {shapes:?} cannot be joined")))
    }

    fn append_bytes(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.shape().iter().flat_map(|&size| (size as u64).to_le_bytes()));
        match self {
            Array::Float(array) => bytes.extend(array.iter().flat_map(|x| x.to_le_bytes())),
            Array::Int(array) => bytes.extend(array.iter().flat_map(|x| x.to_le_bytes())),
            Array::Bool(array) => bytes.extend(array.iter().map(|&x| u8::from(x))),
        }
    }
}

/// One picture as arrays for the vision encoder, with the names that Hugging Face's processors use. The first axis of
/// each array counts the picture's tiles or patches, or is 1, so that the arrays of several pictures can be
/// concatenated along it.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageArrays {
    key: Sha256Digest,
    arrays: BTreeMap<String, Array>,
}

impl ImageArrays {
    /// A picture with these arrays.
    ///
    /// Errors: `Error::Invalid` when the pixels are missing or an array is empty.
    pub fn new(arrays: impl IntoIterator<Item = (&'static str, Array)>) -> Result<Self> {
        let arrays: BTreeMap<String, Array> =
            arrays.into_iter().map(|(name, array)| (name.to_string(), array)).collect();
        if !arrays.contains_key(PIXEL_VALUES) {
            return Err(Error::invalid("picture", format!("has no array `{PIXEL_VALUES}`")));
        }
        Self::of_arrays(arrays)
    }

    /// A picture, or several in one, with arrays of any names.
    ///
    /// Errors: `Error::Invalid` when an array is empty.
    pub fn of_arrays(arrays: BTreeMap<String, Array>) -> Result<Self> {
        if let Some((name, array)) = arrays.iter().find(|(_, array)| array.is_empty()) {
            return Err(Error::invalid("picture", format!("array `{name}` of shape {:?} is empty", array.shape())));
        }
        let mut bytes = Vec::with_capacity(arrays.values().map(|array| array.len() * 4 + 64).sum());
        for (name, array) in &arrays {
            bytes.extend(name.as_bytes());
            array.append_bytes(&mut bytes);
        }
        Ok(ImageArrays { key: sha256_bytes(&bytes), arrays })
    }

    /// Digest of the arrays: pictures with equal keys have equal arrays.
    pub fn key(&self) -> &Sha256Digest {
        &self.key
    }

    /// An array by its name.
    pub fn get(&self, name: &str) -> Option<&Array> {
        self.arrays.get(name)
    }

    /// All arrays, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Array)> {
        self.arrays.iter().map(|(name, array)| (name.as_str(), array))
    }

    /// The pixels.
    ///
    /// Errors: `Error::Invalid` when they are not floats.
    pub fn pixel_values(&self) -> Result<&ArrayD<f32>> {
        let found = self.get(PIXEL_VALUES).and_then(Array::floats);
        found.ok_or_else(|| Error::invalid("picture", format!("`{PIXEL_VALUES}` holds no floats")))
    }

    /// Number of patches in time, height and width, for a picture divided into patches on a grid.
    pub fn grid_thw(&self) -> Option<[i64; 3]> {
        let grid = self.get(IMAGE_GRID_THW)?.ints()?;
        grid.iter().copied().collect::<Vec<_>>().try_into().ok()
    }
}

/// A tokenised question with its pictures.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prompt {
    /// Token ids, with one image token per row of image features.
    pub input_ids: Vec<i64>,
    /// Pictures in the order of their tokens.
    pub pictures: Vec<Arc<ImageArrays>>,
    /// Number of tokens before the first answer; `None` when the prompt has no answer.
    pub question: Option<usize>,
    /// Inputs from another program; then `pictures` is empty.
    pub given: Option<GivenRow>,
}

#[cfg(test)]
mod tests {
    use ndarray::{ArrayD, IxDyn};

    use super::*;

    fn pixels(shape: &[usize], value: f32) -> Array {
        Array::Float(ArrayD::from_elem(IxDyn(shape), value))
    }

    #[test]
    fn the_key_of_a_picture_depends_on_every_array() {
        let grid = |n: i64| Array::Int(ArrayD::from_elem(IxDyn(&[1, 3]), n));
        let of = |value: f32, n: i64| {
            let arrays = [(PIXEL_VALUES, pixels(&[2, 3], value)), (IMAGE_GRID_THW, grid(n))];
            ImageArrays::new(arrays).unwrap()
        };
        assert_eq!(of(0.5, 1).key(), of(0.5, 1).key());
        assert_ne!(of(0.5, 1).key(), of(0.5, 2).key());
        assert_ne!(of(0.5, 1).key(), of(0.25, 1).key());
        assert_eq!(of(0.5, 2).grid_thw(), Some([2, 2, 2]));
    }

    #[test]
    fn pictures_without_pixels_are_refused() {
        let refused = |name, array| ImageArrays::new([(name, array)]).unwrap_err().to_string();
        assert_eq!(refused(IMAGE_GRID_THW, pixels(&[1], 0.0)), "picture: has no array `pixel_values`");
        let error = refused(PIXEL_VALUES, pixels(&[0, 3], 0.0));
        assert_eq!(error, "picture: array `pixel_values` of shape [0, 3] is empty");
    }

    #[test]
    fn arrays_join_along_their_first_axis() {
        let (a, b) = (pixels(&[1, 2], 1.0), pixels(&[2, 2], 2.0));
        let joined = Array::joined(&[&a, &b]).unwrap();
        assert_eq!(joined.shape(), [3, 2]);
        assert_eq!(joined.floats().unwrap().iter().copied().collect::<Vec<_>>(), [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
        let refused = |arrays: &[&Array]| Array::joined(arrays).unwrap_err().to_string();
        let wide = refused(&[&a, &pixels(&[1, 3], 0.0)]);
        assert_eq!(wide, "arrays of pictures: of shapes [[1, 2], [1, 3]] cannot be joined");
        assert_eq!(refused(&[]), "arrays of pictures: of shapes [] cannot be joined");
    }
}
