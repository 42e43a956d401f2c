//! Inputs made up for measuring and checking: token ids, a picture, pixel values.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::base::{Error, Result};
use crate::bundle::ModelConfig;
use crate::data::{ImageBytes, Part, Processor};
use crate::ir::{DataType, Dim};
use crate::prompt::Prompt;
use crate::runtime::{Decoder, Port, Session, Tensor, VlmSession};

use super::agreement::PROMPT_TOKENS;

const GIVE_INPUTS: &str = "give inputs of your own with `verify --inputs`";
/// The input of an embedding component that takes the vision encoder's output.
const IMAGE_FEATURES: &str = "image_features";
/// Side of the made-up picture, in pixels.
const PICTURE_SIDE: u32 = 512;

/// Token ids spread over the vocabulary; `avoid` (the image token) is not among them.
pub fn token_ids(count: usize, vocabulary: usize, avoid: Option<i64>) -> Vec<i64> {
    let vocabulary = vocabulary.max(2) as i64;
    (0..count as i64)
        .map(|number| {
            let id = (number * 37 + 11) % vocabulary;
            if Some(id) == avoid { (id + 1) % vocabulary } else { id }
        })
        .collect()
}

/// Embeddings of made-up tokens by the model's own embedding component, `[count, hidden]`, and the hidden size.
///
/// Errors: as `VlmSession::embed_tokens`.
pub fn embeddings(vlm: &mut VlmSession, count: usize) -> Result<(Vec<f32>, usize)> {
    let ids = token_ids(count, vlm.decoder().vocabulary().unwrap_or(256), vlm.settings().image_token_id);
    vlm.embed_tokens(&ids)
}

/// Noise in place of embeddings, for a decoder without an embedding component.
///
/// Errors: `Error::Unsupported` when the graph leaves the hidden size open.
pub fn noise_embeddings(decoder: &Decoder, count: usize) -> Result<(Vec<f32>, usize)> {
    let hidden = decoder.hidden_size().ok_or_else(|| {
        Error::unsupported(decoder.session().subject(), "leaves the width of `inputs_embeds` open")
            .remedy("give the model's whole folder")
    })?;
    Ok((noise(count * hidden), hidden))
}

/// A picture of coloured noise with a question, encoded by the model's own processor.
///
/// Errors: as `Processor::encode_question`.
pub fn picture_prompt(processor: &Processor) -> Result<Prompt> {
    let image = ImageBytes::held("the made-up picture", noise_bitmap(PICTURE_SIDE, PICTURE_SIDE));
    let parts = [Part::Image(0), Part::Text("What is in the image?".into())];
    Ok(processor.encode_question("the made-up question", &parts, &[image])?.into_prompt())
}

/// Pixel values and masks of one tile for a vision encoder's inputs.
///
/// Errors: `Error::Unsupported` when the graph leaves the tile's size open or has an input that is no picture.
pub fn pixel_feeds(subject: &str, inputs: &[Port]) -> Result<Vec<(String, Tensor)>> {
    let mut feeds = Vec::new();
    for port in inputs {
        let lead = match (port.name.as_str(), port.shape.len()) {
            ("pixel_values", rank @ (4 | 5)) => rank - 3,
            ("pixel_attention_mask", rank @ (3 | 4)) => rank - 2,
            _ => {
                return Err(
                    Error::unsupported(subject, format!("input `{}` cannot be made up", port.name)).remedy(GIVE_INPUTS)
                );
            }
        };
        let mut shape = Vec::with_capacity(port.shape.len());
        for (axis, dim) in port.shape.iter().enumerate() {
            shape.push(match dim {
                Dim::Known(size) if *size > 0 => *size as usize,
                _ if axis < lead => 1,
                _ => {
                    return Err(Error::unsupported(
                        subject,
                        format!("axis {axis} of input `{}` has no fixed size", port.name),
                    )
                    .remedy(GIVE_INPUTS));
                }
            });
        }
        let count =
            shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim)).filter(|&count| count < 1 << 28);
        let count = count.ok_or_else(|| {
            Error::unsupported(subject, format!("input `{}` is of shape {shape:?}", port.name)).remedy(GIVE_INPUTS)
        })?;
        let tensor = match port.dtype {
            DataType::Bool | DataType::Int64 | DataType::Int32 => Tensor::from_i64(port.dtype, &shape, vec![1; count])?,
            dtype => Tensor::from_f32(dtype, &shape, noise(count))?,
        };
        feeds.push((port.name.clone(), tensor));
    }
    Ok(feeds)
}

/// Token ids for an embedding component, and image features where it takes them: one row for the one image token among the
/// ids, or none where that token is not known. Features of sounds have no rows.
///
/// Errors: `Error::Unsupported` naming another input, or a width that is open.
pub fn embedding_feeds(session: &Session, config: Option<&ModelConfig>) -> Result<Vec<(String, Tensor)>> {
    let vocabulary = config.and_then(|config| config.vocab_size).unwrap_or(16);
    let image_token = config.and_then(|config| config.image_token_id);
    let mut ids = token_ids(PROMPT_TOKENS, vocabulary, image_token);
    let image_token = image_token.filter(|_| session.input(IMAGE_FEATURES).is_some());
    if let (Some(token), Some(last)) = (image_token, ids.last_mut()) {
        *last = token;
    }
    let mut feeds = Vec::new();
    for port in session.inputs() {
        let unsupported = |problem: String| Error::unsupported(session.subject(), problem).remedy(GIVE_INPUTS);
        let rows = usize::from(port.name == IMAGE_FEATURES && image_token.is_some());
        let tensor = match (port.name.as_str(), port.shape.len()) {
            ("input_ids", _) => Tensor::from_i64(port.dtype, &[1, ids.len()], ids.clone())?,
            (IMAGE_FEATURES | "audio_features", rank @ (2 | 3)) if port.dtype.is_float() => {
                let width = port.fixed_size(rank - 1).or_else(|| config?.hidden_size);
                let width = width.ok_or_else(|| unsupported(format!("leaves the width of `{}` open", port.name)))?;
                let mut shape = vec![1; rank - 2];
                shape.extend([rows, width]);
                match rows {
                    0 => Tensor::empty(port.dtype, &shape)?,
                    _ => Tensor::from_f32(port.dtype, &shape, noise(rows * width))?,
                }
            }
            _ => return Err(unsupported(format!("input `{}` of {} cannot be made up", port.name, port.dtype))),
        };
        feeds.push((port.name.clone(), tensor));
    }
    Ok(feeds)
}

fn noise(count: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A BMP file, 24 bits per pixel, without compression.
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

    #[test]
    fn ids_stay_in_the_vocabulary_and_avoid_the_image_token() {
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

    #[test]
    fn open_tile_sizes_are_refused() {
        let port = |shape: Vec<Dim>| Port { name: "pixel_values".into(), dtype: DataType::Float, shape };
        let open = [Dim::Unknown, Dim::Known(3), Dim::Symbol("h".into()), Dim::Known(8)];
        assert!(pixel_feeds("x", &[port(open.to_vec())]).is_err());
        let fixed = [Dim::Symbol("n".into()), Dim::Known(3), Dim::Known(4), Dim::Known(8)];
        let feeds = pixel_feeds("x", &[port(fixed.to_vec())]).expect("feeds");
        assert_eq!(feeds[0].1.shape(), [1, 3, 4, 8]);
    }
}
