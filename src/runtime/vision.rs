//! The vision encoder: pictures to image features, each picture once.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use crate::base::{Error, Result, Sha256Digest};
use crate::ir::DataType;
use crate::prompt::{Array, ImageArrays, PIXEL_ATTENTION_MASK, PIXEL_VALUES};

use super::session::{Port, Session};
use super::tensor::Tensor;

/// Tiles that go through the encoder in one run.
const TILES_PER_RUN: usize = 32;

/// What a picture becomes: one row per image token.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    pub hidden_size: usize,
    /// `[tokens, hidden_size]` in row-major order.
    pub data: Vec<f32>,
}

impl Features {
    /// Number of image tokens.
    pub fn tokens(&self) -> usize {
        self.data.len().checked_div(self.hidden_size).unwrap_or(0)
    }
}

/// Features of pictures seen before, shared by all models whose vision encoders have the same bytes.
#[derive(Debug)]
pub struct FeatureCache {
    limit_bytes: usize,
    state: Mutex<CacheState>,
}

#[derive(Debug, Default)]
struct CacheState {
    features: HashMap<(Sha256Digest, Sha256Digest), Arc<Features>>,
    order: VecDeque<(Sha256Digest, Sha256Digest)>,
    bytes: usize,
}

impl FeatureCache {
    /// A cache that forgets the oldest features beyond `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Arc<Self> {
        Arc::new(FeatureCache { limit_bytes, state: Mutex::default() })
    }

    fn get(&self, encoder: &str, picture: &str) -> Option<Arc<Features>> {
        let state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        state.features.get(&(encoder.to_string(), picture.to_string())).cloned()
    }

    fn put(&self, encoder: &str, picture: &str, features: &Arc<Features>) {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let key = (encoder.to_string(), picture.to_string());
        if state.features.insert(key.clone(), Arc::clone(features)).is_none() {
            state.order.push_back(key);
            state.bytes += features.data.len() * size_of::<f32>();
        }
        while state.bytes > self.limit_bytes {
            let Some(oldest) = state.order.pop_front() else { break };
            if let Some(gone) = state.features.remove(&oldest) {
                state.bytes -= gone.data.len() * size_of::<f32>();
            }
        }
    }
}

/// A vision encoder graph with every input and output understood.
#[derive(Debug)]
pub struct VisionEncoder {
    session: Session,
    digest: Sha256Digest,
    output: String,
    cache: Arc<FeatureCache>,
}

impl VisionEncoder {
    /// `digest` is over the encoder's files.
    ///
    /// Errors: `Error::Unsupported` naming an input or output that has no known meaning.
    pub fn new(session: Session, digest: Sha256Digest, cache: Arc<FeatureCache>) -> Result<Self> {
        for port in session.inputs() {
            let rank = port.shape.len();
            let known = match port.name.as_str() {
                "pixel_values" => matches!(rank, 2 | 4 | 5),
                "pixel_attention_mask" => matches!(rank, 3 | 4),
                "image_grid_thw" => rank == 2,
                _ => false,
            };
            if !known {
                let problem = format!("input `{}` of rank {rank} has no known meaning", port.name);
                return Err(Error::unsupported(session.subject(), problem));
            }
        }
        if session.input("pixel_values").is_none() {
            return Err(Error::unsupported(session.subject(), "has no input `pixel_values`"));
        }
        let output = match session.outputs() {
            [only] => only.name.clone(),
            many => {
                let names: Vec<&str> = many.iter().map(|port| port.name.as_str()).collect();
                let problem = format!(
                    "gives {names:?}; one output of image features is understood, and dropping the others would be a guess"
                );
                return Err(Error::unsupported(session.subject(), problem));
            }
        };
        Ok(VisionEncoder { session, digest, output, cache })
    }

    /// The session behind it.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Features of each picture, from the cache where they are known. Tiles of several pictures share a run.
    ///
    /// Errors: `Error::Invalid` when a picture does not fit the graph's inputs; `Error::Engine` when the run fails.
    pub fn encode(&mut self, pictures: &[&ImageArrays]) -> Result<Vec<Arc<Features>>> {
        let mut found: HashMap<&str, Arc<Features>> = HashMap::new();
        let mut missing: Vec<&ImageArrays> = Vec::new();
        for picture in pictures {
            if found.contains_key(picture.key().as_str()) || missing.iter().any(|other| other.key() == picture.key()) {
                continue;
            }
            match self.cache.get(&self.digest, picture.key()) {
                Some(features) => drop(found.insert(picture.key(), features)),
                None => missing.push(picture),
            }
        }
        for group in runs(&missing) {
            for (picture, features) in group.iter().zip(self.run(group)?) {
                let features = Arc::new(features);
                self.cache.put(&self.digest, picture.key(), &features);
                found.insert(picture.key(), features);
            }
        }
        pictures
            .iter()
            .map(|picture| found.get(picture.key().as_str()).cloned())
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::invalid(self.session.subject(), "a picture was left out"))
    }

    /// Features of the pictures without looking into or filling the cache.
    ///
    /// Errors: as `encode`.
    pub fn encode_uncached(&mut self, picture: &ImageArrays) -> Result<Features> {
        let mut features = self.run(&[picture])?;
        features.pop().ok_or_else(|| Error::invalid(self.session.subject(), "gave no features"))
    }

    /// One run over pictures of equal tile size.
    fn run(&mut self, pictures: &[&ImageArrays]) -> Result<Vec<Features>> {
        let Some(&first) = pictures.first() else { return Ok(Vec::new()) };
        let mut feeds = Vec::new();
        for port in self.session.inputs() {
            feeds.push((port.name.clone(), self.feed(port, pictures)?));
        }
        let refuse = |problem: String| Error::invalid(self.session.subject(), problem);
        if self.session.input("pixel_attention_mask").is_none() && pictures.iter().any(|picture| is_padded(picture)) {
            return Err(refuse("takes no `pixel_attention_mask`, but a picture is padded".into()));
        }
        if self.session.input("image_grid_thw").is_some() && first.grid_thw().is_none() {
            return Err(refuse("takes `image_grid_thw`, but the picture has no grid".into()));
        }
        let borrowed: Vec<(&str, &Tensor)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let outputs = self.session.run(&borrowed, None)?;
        let tensor = outputs.get(&self.output)?;
        let shape = tensor.shape();
        let data = tensor.to_f32()?;
        let hidden_size = shape.last().copied().unwrap_or(0);
        let rows = data.len().checked_div(hidden_size).unwrap_or(0);
        let tiles: usize = pictures.iter().map(|picture| tile_count(picture)).sum();
        if rows == 0 || rows % tiles.max(1) != 0 {
            let problem = format!("gave {rows} rows of features for {tiles} tiles (shape {shape:?})");
            return Err(Error::invalid(self.session.subject(), problem));
        }
        let per_tile = rows / tiles.max(1) * hidden_size;
        let mut rest = &*data;
        let mut features = Vec::with_capacity(pictures.len());
        for picture in pictures {
            let (own, others) = rest.split_at(per_tile * tile_count(picture));
            features.push(Features { hidden_size, data: own.to_vec() });
            rest = others;
        }
        Ok(features)
    }

    fn feed(&self, port: &Port, pictures: &[&ImageArrays]) -> Result<Tensor> {
        match port.name.as_str() {
            "pixel_values" => {
                let mut data = Vec::new();
                for picture in pictures {
                    data.extend(picture.pixel_values()?.iter().copied());
                }
                let shape = self.shape(port, pictures, &tile_shape(pictures[0]))?;
                Tensor::from_f32(port.dtype, &shape, data)
            }
            "pixel_attention_mask" => {
                let tile = tile_shape(pictures[0]);
                let (height, width) = match tile[..] {
                    [_, height, width] => (height, width),
                    _ => {
                        return Err(Error::invalid(
                            self.session.subject(),
                            "takes a pixel mask, but the picture has no tiles",
                        ));
                    }
                };
                let mut data: Vec<i64> = Vec::new();
                for picture in pictures {
                    let count = tile_count(picture) * height * width;
                    match picture.get(PIXEL_ATTENTION_MASK) {
                        Some(Array::Bool(mask)) if mask.len() == count => {
                            data.extend(mask.iter().map(|&real| i64::from(real)));
                        }
                        Some(mask) => {
                            let problem = format!("pixel mask of shape {:?} does not fit its tiles", mask.shape());
                            return Err(Error::invalid("picture", problem));
                        }
                        None => data.resize(data.len() + count, 1),
                    }
                }
                let shape = self.shape(port, pictures, &[height, width])?;
                Tensor::from_i64(port.dtype, &shape, data)
            }
            _ => {
                let grids: Vec<i64> = pictures.iter().filter_map(|picture| picture.grid_thw()).flatten().collect();
                Tensor::from_i64(DataType::Int64, &[grids.len() / 3, 3], grids)
            }
        }
    }

    /// The shape that the port wants: patches as they are, else tiles first, with a batch axis of 1 before them where its rank has room for one.
    fn shape(&self, port: &Port, pictures: &[&ImageArrays], tile: &[usize]) -> Result<Vec<usize>> {
        let tiles: usize = pictures.iter().map(|picture| tile_count(picture)).sum();
        let mut shape = match tile.len() {
            1 => vec![pixel_shape(pictures[0])[0]],
            _ => vec![tiles],
        };
        shape.extend_from_slice(tile);
        if port.shape.len() == shape.len() + 1 {
            shape.insert(0, 1);
        }
        if port.shape.len() != shape.len() {
            let problem = format!("input `{}` has rank {}, the picture gives {shape:?}", port.name, port.shape.len());
            return Err(Error::invalid(self.session.subject(), problem));
        }
        Ok(shape)
    }
}

/// Pictures in groups of equal tile size, at most [`TILES_PER_RUN`] tiles each; patches go one picture at a time.
fn runs<'a, 'b>(pictures: &'b [&'a ImageArrays]) -> Vec<&'b [&'a ImageArrays]> {
    let mut groups = Vec::new();
    let mut start = 0;
    while start < pictures.len() {
        let first = pictures[start];
        let mut tiles = tile_count(first);
        let mut end = start + 1;
        while end < pictures.len() {
            let next = pictures[end];
            tiles += tile_count(next);
            let alone = pixel_shape(first).len() < 4 || tile_shape(next) != tile_shape(first);
            if alone || tiles > TILES_PER_RUN {
                break;
            }
            end += 1;
        }
        groups.push(&pictures[start..end]);
        start = end;
    }
    groups
}

/// Tiles in a picture: the axis before channels; all patches of a picture count as one.
fn tile_count(picture: &ImageArrays) -> usize {
    let shape = pixel_shape(picture);
    match shape.len() {
        4 => shape[0],
        5 => shape[0] * shape[1],
        _ => 1,
    }
}

/// Axes of one tile, `[C, H, W]`, or `[D]` of one patch.
fn tile_shape(picture: &ImageArrays) -> Vec<usize> {
    let shape = pixel_shape(picture);
    match shape.len() {
        4 => shape[1..].to_vec(),
        5 => shape[2..].to_vec(),
        _ => shape.get(1..).unwrap_or(&[]).to_vec(),
    }
}

fn pixel_shape(picture: &ImageArrays) -> &[usize] {
    picture.get(PIXEL_VALUES).map_or(&[], Array::shape)
}

fn is_padded(picture: &ImageArrays) -> bool {
    matches!(picture.get(PIXEL_ATTENTION_MASK), Some(Array::Bool(mask)) if mask.iter().any(|&real| !real))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(value: f32) -> Arc<Features> {
        Arc::new(Features { hidden_size: 2, data: vec![value; 4] })
    }

    #[test]
    fn the_cache_tells_encoders_apart_and_forgets_the_oldest() {
        let cache = FeatureCache::new(32);
        cache.put("a", "x", &features(1.0));
        cache.put("b", "x", &features(2.0));
        assert_eq!(cache.get("a", "x"), Some(features(1.0)));
        assert_eq!(cache.get("b", "x"), Some(features(2.0)));
        cache.put("a", "y", &features(3.0));
        assert_eq!(cache.get("a", "x"), None);
        assert_eq!(cache.get("b", "x"), Some(features(2.0)));
    }

    #[test]
    fn pictures_of_one_tile_size_share_a_run() {
        let picture = |shape: &[usize]| {
            let pixels = Array::Float(ndarray::ArrayD::zeros(shape));
            ImageArrays::new([(PIXEL_VALUES, pixels)]).expect("a picture")
        };
        let pictures =
            [[2, 3, 8, 8], [1, 3, 8, 8], [1, 3, 4, 8], [31, 3, 4, 8], [1, 3, 4, 8]].map(|shape| picture(&shape));
        let borrowed: Vec<&ImageArrays> = pictures.iter().collect();
        let sizes: Vec<usize> = runs(&borrowed).iter().map(|group| group.len()).collect();
        assert_eq!(sizes, [2, 2, 1]);
    }
}
