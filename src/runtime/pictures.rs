//! Arrays of pictures in the form of a graph's inputs.

use ndarray::{ArrayD, Axis, IxDyn};

use crate::base::{Error, Result};
use crate::prompt::{Array, IMAGE_GRID_HWS, ImageArrays, PIXEL_ATTENTION_MASK, PIXEL_VALUES};

use super::port::Port;

/// The array `name` of all pictures, concatenated; without pictures an empty array.
///
/// If the input has one axis more, an axis of size 1 is added in front. A missing mask means no padding. Grids of rows
/// and columns are taken from `image_grid_thw`.
///
/// Errors: `Error::Invalid` when a picture lacks the array, or its axes differ from the input's.
pub fn array<'a>(pictures: impl IntoIterator<Item = &'a ImageArrays>, name: &str, port: &Port) -> Result<Array> {
    let arrays = pictures.into_iter().map(|picture| one(picture, name, port)).collect::<Result<Vec<Array>>>()?;
    if arrays.is_empty() {
        return Ok(nothing(port));
    }
    let joined = Array::joined(&arrays.iter().collect::<Vec<_>>())?;
    let rank = joined.shape().len();
    let array = match joined {
        joined if rank == port.rank() => joined,
        Array::Float(array) if rank + 1 == port.rank() => Array::Float(array.insert_axis(Axis(0))),
        Array::Int(array) if rank + 1 == port.rank() => Array::Int(array.insert_axis(Axis(0))),
        Array::Bool(array) if rank + 1 == port.rank() => Array::Bool(array.insert_axis(Axis(0))),
        joined => return Err(unfit(name, port, joined.shape())),
    };
    // The first axes count pictures and tiles.
    let edges = port.rank().saturating_sub(2).max(1)..port.rank();
    let fits = |axis: usize| port.fixed_size(axis).is_none_or(|size| array.shape().get(axis) == Some(&size));
    if edges.into_iter().all(fits) { Ok(array) } else { Err(unfit(name, port, array.shape())) }
}

fn unfit(name: &str, port: &Port, shape: &[usize]) -> Error {
    Error::invalid("pictures", format!("input {} got `{name}` of shape {shape:?}", port.described())).remedy(
        "leave `--image-size`, `--min-pixels` and `--max-pixels` out, or check that the processor's files and the graph \
         belong to one model",
    )
}

fn one(picture: &ImageArrays, name: &str, port: &Port) -> Result<Array> {
    if let Some(array) = picture.get(name) {
        return Ok(array.clone());
    }
    let made = match name {
        PIXEL_ATTENTION_MASK => {
            let shape = match *picture.pixel_values()?.shape() {
                [tiles, _, height, width] => vec![tiles, height, width],
                [tiles, patches, _] => vec![tiles, patches],
                _ => Vec::new(),
            };
            (!shape.is_empty()).then(|| Array::Bool(ArrayD::from_elem(IxDyn(&shape), true)))
        }
        IMAGE_GRID_HWS => picture.grid_thw().map(|[_, height, width]| {
            Array::Int(ArrayD::from_shape_fn(IxDyn(&[1, 2]), |at| if at[1] == 0 { height } else { width }))
        }),
        _ => None,
    };
    made.ok_or_else(|| {
        let known: Vec<&str> = picture.iter().map(|(name, _)| name).collect();
        Error::invalid(
            format!("input {}", port.described()),
            format!("takes `{name}`, but the model's image processor gives {}", known.join(", ")),
        )
        .remedy("check that the processor's files and the graph belong to one model")
    })
}

/// The value of an input for a prompt without pictures.
fn nothing(port: &Port) -> Array {
    let empty = usize::from(port.rank() > 4);
    let shape: Vec<usize> =
        (0..port.rank()).map(|axis| if axis == empty { 0 } else { port.fixed_size(axis).unwrap_or(1) }).collect();
    if port.dtype.is_float() {
        Array::Float(ArrayD::zeros(IxDyn(&shape)))
    } else {
        Array::Int(ArrayD::zeros(IxDyn(&shape)))
    }
}

/// Number of tiles of a picture; each tile gives the same number of feature rows. Other pictures (patches on a grid,
/// pictures with sizes) count as one, because each needs a run of its own.
pub fn tile_count(picture: &ImageArrays) -> usize {
    match *picture.pixel_values().map_or(&[][..], ArrayD::shape) {
        [tiles, _, _, _] if is_plain(picture) => tiles,
        _ => 1,
    }
}

/// True when the picture has only pixels and, optionally, a mask.
fn is_plain(picture: &ImageArrays) -> bool {
    picture.iter().all(|(name, _)| name == PIXEL_VALUES || name == PIXEL_ATTENTION_MASK)
}

/// True when two pictures can share a run: plain tiles of one size.
pub fn share_a_run(a: &ImageArrays, b: &ImageArrays) -> bool {
    let tile = |picture: &ImageArrays| match *picture.pixel_values().map_or(&[][..], ArrayD::shape) {
        [_, channels, height, width] => Some([channels, height, width]),
        _ => None,
    };
    tile(a).is_some() && tile(a) == tile(b) && is_plain(a) && is_plain(b)
}

/// True when a picture has padded pixels.
pub fn is_padded(picture: &ImageArrays) -> bool {
    matches!(picture.get(PIXEL_ATTENTION_MASK), Some(Array::Bool(mask)) if mask.iter().any(|&real| !real))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{DataType, Dim};
    use crate::prompt::IMAGE_GRID_THW;

    fn port(name: &str, dtype: DataType, shape: &[i64]) -> Port {
        let dim = |&size: &i64| if size < 0 { Dim::Unknown } else { Dim::Known(size) };
        Port { name: name.into(), dtype, shape: shape.iter().map(dim).collect() }
    }

    fn picture(shape: &[usize], grid: Option<[i64; 3]>) -> ImageArrays {
        let pixels = (PIXEL_VALUES, Array::Float(ArrayD::from_elem(IxDyn(shape), 0.5)));
        let grid = grid
            .map(|grid| (IMAGE_GRID_THW, Array::Int(ArrayD::from_shape_vec(IxDyn(&[1, 3]), grid.to_vec()).unwrap())));
        ImageArrays::new([pixels].into_iter().chain(grid)).unwrap()
    }

    #[test]
    fn picture_arrays_take_the_rank_of_the_graph_input() {
        let pictures = [picture(&[2, 3, 4, 4], None), picture(&[1, 3, 4, 4], None)];
        let plain = array(&pictures, PIXEL_VALUES, &port("pixel_values", DataType::Float, &[-1, 3, 4, 4])).unwrap();
        assert_eq!(plain.shape(), [3, 3, 4, 4]);
        let deep = port("pixel_values", DataType::Float, &[-1, -1, 3, 4, 4]);
        assert_eq!(array(&pictures, PIXEL_VALUES, &deep).unwrap().shape(), [1, 3, 3, 4, 4]);
        let mask = array(&pictures, PIXEL_ATTENTION_MASK, &port("m", DataType::Bool, &[-1, -1, -1, -1])).unwrap();
        assert_eq!(mask.shape(), [1, 3, 4, 4]);
        let refused = |shape: &[i64]| {
            array(&pictures, PIXEL_VALUES, &port("pixel_values", DataType::Float, shape)).unwrap_err().to_string()
        };
        assert!(refused(&[-1, -1]).contains("of shape [3, 3, 4, 4]"));
        let other = refused(&[-1, 3, 4, 8]);
        assert!(other.contains("[?, 3, 4, 8]") && other.contains("`--image-size`"), "{other}");
    }

    #[test]
    fn grids_without_time_are_sliced_from_grids_with_time() {
        let pictures = [picture(&[8, 6], Some([1, 2, 4]))];
        let found = array(&pictures, IMAGE_GRID_HWS, &port("image_grid_hws", DataType::Int64, &[-1, 2])).unwrap();
        assert_eq!(found.ints().unwrap().iter().copied().collect::<Vec<_>>(), [2, 4]);
        let error = array(&pictures, "image_sizes", &port("image_sizes", DataType::Int64, &[-1, 2])).unwrap_err();
        assert!(error.to_string().contains("gives image_grid_thw, pixel_values"), "{error}");
    }

    #[test]
    fn no_pictures_give_an_array_without_elements() {
        let none: [ImageArrays; 0] = [];
        let of = |shape: &[i64]| array(&none, PIXEL_VALUES, &port("pixel_values", DataType::Float, shape)).unwrap();
        assert_eq!(of(&[-1, 3, 8, 8]).shape(), [0, 3, 8, 8]);
        assert_eq!(of(&[1, -1, 3, 8, 8]).shape(), [1, 0, 3, 8, 8]);
    }

    #[test]
    fn only_tiles_of_one_size_share_a_run() {
        let tiles = |count: usize| picture(&[count, 3, 8, 8], None);
        assert!(share_a_run(&tiles(2), &tiles(1)));
        assert!(!share_a_run(&tiles(2), &picture(&[1, 3, 4, 8], None)));
        let patches = picture(&[8, 6], Some([1, 2, 4]));
        assert!(!share_a_run(&patches, &patches));
        // Patches can have the shape of tiles.
        let square = picture(&[8, 3, 14, 14], Some([1, 2, 4]));
        assert_eq!((tile_count(&tiles(2)), tile_count(&patches), tile_count(&square)), (2, 1, 1));
    }
}
