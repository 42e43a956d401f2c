//! Where training samples come from: conversations, tokenised and with their pictures processed, one after the other.

use std::sync::Arc;

use ndarray::Axis;

use crate::base::{Error, Result, Sha256Digest, sha256_bytes};
use crate::data::{Dataset, Encoded, ImageInputs, Processor};
use crate::runtime::{Picture, Prompt};

/// A tokenised training sample with its pictures.
#[derive(Clone, Debug)]
pub struct Sample {
    pub id: String,
    pub prompt: Prompt,
    /// True for each token of an answer, its end token included; as long as the prompt's ids.
    pub answer_mask: Vec<bool>,
}

/// A data set to train on; read only when what the frozen part gives for it is not on disk yet.
pub trait Source {
    /// Digest of everything that decides the samples.
    fn digest(&self) -> Result<Sha256Digest>;
    /// Number of samples.
    fn count(&self) -> u64;
    /// The samples in a fixed order.
    fn samples(&self) -> Result<Box<dyn Iterator<Item = Result<Sample>> + '_>>;
}

/// Conversations of a data set, in ascending order of `indices`.
pub struct Conversations<'a> {
    pub processor: &'a Processor,
    pub dataset: &'a Dataset,
    pub indices: &'a [usize],
}

impl Source for Conversations<'_> {
    fn digest(&self) -> Result<Sha256Digest> {
        crate::base::sha256_json(&(self.dataset.digest()?, self.indices))
    }

    fn count(&self) -> u64 {
        self.indices.len() as u64
    }

    fn samples(&self) -> Result<Box<dyn Iterator<Item = Result<Sample>> + '_>> {
        let samples = self.dataset.read(self.indices)?;
        Ok(Box::new(samples.map(|sample| Sample::new(self.processor.encode_conversation(&sample?)?))))
    }
}

impl Sample {
    /// Takes an encoded conversation apart into what the runtime reads.
    ///
    /// Errors: `Error::Invalid` when the patches of several pictures do not add up.
    pub fn new(encoded: Encoded) -> Result<Self> {
        let pictures = match encoded.images {
            Some(images) => pictures(&encoded.id, images)?,
            None => Vec::new(),
        };
        let prompt = Prompt { input_ids: encoded.input_ids, pictures };
        Ok(Sample { id: encoded.id, prompt, answer_mask: encoded.answer_mask })
    }
}

/// Pictures as the encoder takes them: tiles all together, patches by picture, for each has a grid of its own.
fn pictures(id: &str, images: ImageInputs) -> Result<Vec<Arc<Picture>>> {
    let mask = images.pixel_attention_mask.map(|mask| mask.into_dyn());
    let Some(grids) = images.image_grid_thw else {
        let key = pixel_key(&images.pixel_values, None);
        return Ok(vec![Arc::new(Picture {
            key,
            pixel_values: images.pixel_values,
            pixel_attention_mask: mask,
            image_grid_thw: None,
        })]);
    };
    let mut start = 0usize;
    let total = images.pixel_values.len_of(Axis(0));
    let mut pictures = Vec::with_capacity(grids.nrows());
    for grid in grids.rows() {
        let grid: Vec<i64> = grid.to_vec();
        let count = grid.iter().try_fold(1usize, |product, &size| product.checked_mul(usize::try_from(size).ok()?));
        let end = count.and_then(|count| start.checked_add(count)).filter(|&end| end <= total);
        let (Some(end), [frames, height, width]) = (end, grid.as_slice()) else {
            return Err(Error::invalid(
                format!("sample `{id}`"),
                format!("a grid of {grid:?} patches does not fit {total} patches"),
            ));
        };
        let pixels = images.pixel_values.slice_axis(Axis(0), ndarray::Slice::from(start..end)).to_owned();
        let grid = [*frames, *height, *width];
        let key = pixel_key(&pixels, Some(grid));
        pictures.push(Arc::new(Picture {
            key,
            pixel_values: pixels,
            pixel_attention_mask: None,
            image_grid_thw: Some(grid),
        }));
        start = end;
    }
    Ok(pictures)
}

fn pixel_key(pixels: &ndarray::ArrayD<f32>, grid: Option<[i64; 3]>) -> Sha256Digest {
    let shape = pixels.shape().iter().flat_map(|size| (*size as u64).to_le_bytes());
    let grid = grid.into_iter().flatten().flat_map(i64::to_le_bytes);
    let bytes: Vec<u8> = shape.chain(grid).chain(pixels.iter().flat_map(|pixel| pixel.to_le_bytes())).collect();
    sha256_bytes(&bytes)
}
