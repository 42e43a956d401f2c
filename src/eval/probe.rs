//! Synthetic inputs for measurements and checks: token ids, a picture, pixel values.

use ndarray::{ArrayD, IxDyn};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::base::{Error, Result};
use crate::data::{ImageBytes, MessagePart, Processor};
use crate::prompt::{
    Array, IMAGE_GRID_HWS, IMAGE_GRID_THW, IMAGE_SIZES, ImageArrays, PATCH_ATTENTION_MASK, PIXEL_ATTENTION_MASK,
    PIXEL_POSITION_IDS, PIXEL_VALUES, Prompt, SPATIAL_SHAPES, TARGET_SIZES,
};
use crate::runtime::{Decoder, Embedded, Input, InputKind};

const GIVE_INPUTS: &str = "give inputs of your own with `verify --inputs`";
/// Side of the synthetic picture, in pixels.
const PICTURE_SIDE: u32 = 512;

/// Token ids spread over the vocabulary, except `avoid` (the image token).
pub fn token_ids(count: usize, vocabulary: usize, avoid: Option<i64>) -> Vec<i64> {
    let vocabulary = vocabulary.max(2) as i64;
    (0..count as i64)
        .map(|number| {
            let id = (number * 37 + 11) % vocabulary;
            if Some(id) == avoid { (id + 1) % vocabulary } else { id }
        })
        .collect()
}

/// A text of these ids with positions from `first` on and noise in place of embeddings, for a decoder without an
/// embedding component.
///
/// Errors: `Error::Unsupported` when the graph does not fix a width.
pub fn noise_text(decoder: &Decoder, ids: &[i64], first: i64) -> Result<Embedded> {
    let open = |what: &str| {
        Error::unsupported(decoder.session().subject(), format!("does not fix the width of `{what}`"))
            .remedy("give the model's whole folder")
    };
    let hidden_size = match decoder.takes_embeds() {
        true => decoder.hidden_size().ok_or_else(|| open("inputs_embeds"))?,
        false => 0,
    };
    let mut text = Embedded::text(ids, hidden_size, noise(ids.len() * hidden_size), first, decoder.position_rows());
    if decoder.takes(InputKind::PerLayerInputs) {
        let width = decoder.per_layer_width().ok_or_else(|| open("per_layer_inputs"))?;
        text.side.per_layer = noise(ids.len() * width);
    }
    Ok(text)
}

/// A picture of coloured noise with a question, encoded by the model's own processor.
///
/// Errors: as `Processor::encode_question`.
pub fn picture_prompt(processor: &Processor) -> Result<Prompt> {
    let image = ImageBytes::held("the made-up picture", noise_bitmap(PICTURE_SIDE, PICTURE_SIDE));
    let parts = [MessagePart::Image(0), MessagePart::Text("What is in the image?".into())];
    Ok(processor.encode_question("the made-up question", &parts, &[image])?.into_prompt())
}

/// A synthetic picture for a vision encoder's inputs: one tile, or patches on a grid.
///
/// Errors: `Error::Unsupported` when the graph does not fix the size of a tile or patch.
pub fn noise_picture(subject: &str, inputs: &[Input]) -> Result<ImageArrays> {
    let port = inputs.iter().find(|input| input.kind() == InputKind::Image(PIXEL_VALUES)).map(|input| &input.port);
    let port = port.ok_or_else(|| {
        Error::unsupported(subject, format!("has no input `{PIXEL_VALUES}`")).remedy("give inputs with `--inputs`")
    })?;
    let rank = port.rank();
    let size = |axis: usize| {
        let problem = || format!("axis {axis} of input {} has no fixed size", port.described());
        let size = port.fixed_size(axis).filter(|&size| size > 0);
        size.ok_or_else(|| Error::unsupported(subject, problem()).remedy(GIVE_INPUTS))
    };
    let on_a_grid = inputs.iter().any(|input| input.kind() == InputKind::Image(IMAGE_GRID_THW));
    // The last axes are those of a tile `[C, H, W]` or a patch `[D]`; the graph may leave the number of patches open.
    let (shape, grid) = match rank {
        4 if on_a_grid => {
            let patches = port.fixed_size(0).filter(|&size| size > 0).unwrap_or(64);
            (vec![patches, size(1)?, size(2)?, size(3)?], grid_of(patches))
        }
        4 | 5 => (vec![1, size(rank - 3)?, size(rank - 2)?, size(rank - 1)?], [0, 0]),
        _ => {
            let patches = port.fixed_size(rank - 2).filter(|&size| size > 0).unwrap_or(64);
            let mut shape = vec![patches, size(rank - 1)?];
            if rank == 3 {
                shape.insert(0, 1);
            }
            let by_position = inputs.iter().any(|input| input.kind() == InputKind::Image(PIXEL_POSITION_IDS));
            (shape, if by_position { nearest_square(patches) } else { grid_of(patches) })
        }
    };
    let count = shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim)).filter(|&count| count < 1 << 28);
    let count = count.ok_or_else(|| {
        Error::unsupported(subject, format!("input {} is too large", port.described()))
            .remedy("give inputs with `--inputs`")
    })?;
    let ints = |shape: &[usize], values: Vec<i64>| {
        ArrayD::from_shape_vec(IxDyn(shape), values).map(Array::Int).map_err(|e| Error::invalid(subject, e.to_string()))
    };
    let [rows, columns] = grid.map(|size| size as i64);
    let mut arrays = vec![(
        PIXEL_VALUES,
        Array::Float(
            ArrayD::from_shape_vec(IxDyn(&shape), noise(count)).map_err(|e| Error::invalid(subject, e.to_string()))?,
        ),
    )];
    for input in inputs {
        let InputKind::Image(name) = input.kind() else { continue };
        let array = match name {
            IMAGE_GRID_THW => ints(&[1, 3], vec![1, rows, columns])?,
            IMAGE_GRID_HWS | SPATIAL_SHAPES | TARGET_SIZES => ints(&[1, 2], vec![rows, columns])?,
            IMAGE_SIZES => ints(&[1, 2], shape[shape.len() - 2..].iter().map(|&size| size as i64).collect())?,
            PIXEL_POSITION_IDS => {
                let places = (0..rows * columns).flat_map(|at| [at % columns, at / columns]).collect();
                ints(&[1, (rows * columns) as usize, 2], places)?
            }
            PATCH_ATTENTION_MASK => Array::Bool(ArrayD::from_elem(IxDyn(&[1, 1, shape[shape.len() - 2]]), true)),
            PIXEL_ATTENTION_MASK | PIXEL_VALUES => continue,
            other => {
                let problem = format!("input `{other}` cannot be made up");
                return Err(Error::unsupported(subject, problem).remedy(GIVE_INPUTS));
            }
        };
        arrays.push((name, array));
    }
    ImageArrays::new(arrays)
}

/// Rows and columns of a grid with this number of patches, as square as possible in steps of two.
fn grid_of(patches: usize) -> [usize; 2] {
    let rows = (1..=patches / 2)
        .map(|half| 2 * half)
        .take_while(|rows| rows * rows <= patches)
        .filter(|rows| patches.is_multiple_of(2 * rows))
        .last();
    let rows = rows.unwrap_or(1);
    [rows, patches / rows]
}

/// Rows and columns of a grid with this number of patches, as square as possible.
fn nearest_square(patches: usize) -> [usize; 2] {
    let rows = (1..=patches.isqrt()).rev().find(|&rows| patches.is_multiple_of(rows)).unwrap_or(1);
    [rows, patches / rows]
}

/// Pseudo-random numbers between -1 and 1.
pub fn noise(count: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// An uncompressed BMP file with 24 bits per pixel.
fn noise_bitmap(width: u32, height: u32) -> Vec<u8> {
    const HEADERS: u32 = 54;
    let row = (width * 3).next_multiple_of(4);
    let size = HEADERS + row * height;
    let mut bytes = Vec::with_capacity(size as usize);
    bytes.extend(b"BM");
    for field in [size, 0, HEADERS, 40, width, height] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend([1, 0, 24, 0]);
    bytes.extend([0; 24]);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    bytes.resize_with(size as usize, || rng.random());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{DataType, Dim};
    use crate::runtime::Port;

    #[test]
    fn token_ids_stay_in_the_vocabulary_and_avoid_the_image_token() {
        let ids = token_ids(100, 50, Some(11));
        assert!(ids.iter().all(|id| (0..50).contains(id) && *id != 11), "{ids:?}");
    }

    #[test]
    fn the_bitmap_decodes_to_its_size() {
        let bytes = noise_bitmap(5, 3);
        let picture =
            crate::data::Picture::decode(&ImageBytes::held("noise", bytes), crate::data::Transparency::Dropped)
                .expect("a picture");
        assert_eq!((picture.width(), picture.height()), (5, 3));
    }

    fn picture(ports: &[(&str, &[i64])]) -> Result<ImageArrays> {
        let dim = |&size: &i64| if size < 0 { Dim::Unknown } else { Dim::Known(size) };
        let port = |(name, shape): &(&str, &[i64])| Port {
            name: name.to_string(),
            dtype: DataType::Float,
            shape: shape.iter().map(dim).collect(),
        };
        let ports: Vec<Port> = ports.iter().map(port).collect();
        noise_picture("x", &Input::all("x", &ports)?)
    }

    #[test]
    fn tiles_of_undeclared_size_are_refused() {
        let error = picture(&[("pixel_values", &[-1, 3, -1, 8])]).expect_err("a free size");
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("axis 2 of input `pixel_values`"), "{error}");
        let found = picture(&[("pixel_values", &[-1, 3, 4, 8]), ("image_sizes", &[-1, 2])]).expect("a picture");
        assert_eq!(found.pixel_values().expect("pixels").shape(), [1, 3, 4, 8]);
        assert_eq!(found.get("image_sizes").and_then(Array::ints).expect("sizes").as_slice(), Some(&[4, 8][..]));
    }

    #[test]
    fn patches_are_placed_on_a_grid() {
        let found = picture(&[("pixel_values", &[64, 6]), ("grid_thw", &[-1, 3])]).expect("a picture");
        assert_eq!(found.grid_thw(), Some([1, 8, 8]));
        // The position table has one row for each step along a side of the picture, not one for each patch.
        let found =
            picture(&[("pixel_values", &[-1, 630, 6]), ("pixel_position_ids", &[-1, 630, 2])]).expect("a picture");
        let places = found.get("pixel_position_ids").and_then(Array::ints).expect("places");
        assert_eq!(places.iter().max(), Some(&29));
        let found = picture(&[("pixel_values", &[-1, 24, 6]), ("spatial_shapes", &[-1, 2])]).expect("a picture");
        assert_eq!(found.pixel_values().expect("pixels").shape(), [1, 24, 6]);
        assert_eq!(found.get("spatial_shapes").and_then(Array::ints).expect("grid").as_slice(), Some(&[4, 6][..]));
    }
}
