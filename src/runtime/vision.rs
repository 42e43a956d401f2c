//! The vision encoder: computes image features from pictures.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::base::{Error, Result, Sha256Digest};
use crate::prompt::{ImageArrays, PIXEL_ATTENTION_MASK, PIXEL_VALUES};

use super::features::{FeatureCache, Features};
use super::inputs::{Input, InputKind, output_kind, unknown};
use super::pictures::{array, is_padded, share_a_run, tile_count};
use super::port::Port;
use super::projector::Projector;
use super::session::{Outputs, Session};
use super::tensor::TensorValue;

/// Largest number of tiles in one run of the encoder.
const TILES_PER_RUN: usize = 32;

/// A vision encoder graph whose outputs all have a known meaning.
#[derive(Debug)]
pub struct VisionEncoder {
    session: Session,
    inputs: Vec<Input>,
    output: String,
    deepstack: Deepstack,
    projector: Option<Projector>,
    keeps_unprojected: bool,
    digest: Sha256Digest,
    cache: Arc<FeatureCache>,
}

/// The outputs with DeepStack features.
#[derive(Clone, Debug, PartialEq)]
enum Deepstack {
    /// One output per level with its number, ascending; empty for encoders without.
    Levels(Vec<(usize, String)>),
    /// One output with all levels; the level is the first axis.
    Stacked(String),
}

impl VisionEncoder {
    /// `digest` is over the encoder's files and those of its projector.
    ///
    /// Inputs without a known meaning take ready tensors only.
    ///
    /// Errors: `Error::Unsupported` naming an input of another component, or an output without a known meaning.
    pub fn new(session: Session, digest: Sha256Digest, cache: Arc<FeatureCache>) -> Result<Self> {
        let inputs = Input::all_or_given(session.inputs());
        if let Some(input) = inputs.iter().find(|input| !matches!(input.kind(), InputKind::Image(_) | InputKind::Given))
        {
            let problem = format!("input {} is not an input of a vision encoder", input.port.described());
            return Err(Error::unsupported(session.subject(), problem)
                .remedy("export the vision encoder alone, with the arrays of the model's image processor as inputs"));
        }
        if session.input(PIXEL_VALUES).is_none() && !inputs.iter().any(|input| input.kind() == InputKind::Given) {
            return Err(Error::unsupported(session.subject(), format!("has no input `{PIXEL_VALUES}`"))
                .remedy("export the vision encoder with `pixel_values` as its input"));
        }
        let (output, deepstack) = outputs(session.subject(), session.outputs())?;
        let (projector, keeps_unprojected) = (None, false);
        Ok(VisionEncoder { session, inputs, output, deepstack, projector, keeps_unprojected, digest, cache })
    }

    /// Adds a projector: a graph that projects the features to the decoder's width.
    ///
    /// Errors: `Error::Unsupported` unless that graph has one input and one output.
    pub fn with_projector(mut self, session: Session) -> Result<Self> {
        self.projector = Some(Projector::new(session)?);
        Ok(self)
    }

    /// Keeps what the projector reads, in [`Features::unprojected`]. Without a projector nothing changes.
    pub fn keep_unprojected(&mut self) {
        if self.projector.is_some() && !self.keeps_unprojected {
            self.keeps_unprojected = true;
            // The cache has features of the same encoder without them.
            self.digest.push_str(" unprojected");
        }
    }

    /// The session that runs the graph.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Returns the session.
    pub fn into_session(self) -> Session {
        self.session
    }

    /// Time inside all runs so far, the projector's included.
    pub fn elapsed(&self) -> Duration {
        let projector = self.projector.as_ref().map_or(Duration::ZERO, Projector::elapsed);
        self.session.elapsed() + projector
    }

    /// The graph's inputs.
    pub fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    /// Features of each picture, from the cache if it has them. Tiles of several pictures share a run.
    ///
    /// Errors: `Error::Invalid` when a picture does not match the graph's inputs; `Error::Engine` when the run fails.
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

    /// All inputs for pictures that can share a run.
    ///
    /// Errors: `Error::Invalid` when a picture lacks data for an input.
    pub fn feeds(&self, pictures: &[&ImageArrays]) -> Result<Vec<(String, TensorValue)>> {
        let mut feeds = Vec::with_capacity(self.inputs.len());
        for input in &self.inputs {
            let array = match (input.kind(), pictures) {
                (InputKind::Image(name), _) => array(pictures.iter().copied(), name, &input.port)?,
                (_, [only]) => {
                    only.get(&input.port.name).cloned().ok_or_else(|| unknown(self.session.subject(), &input.port))?
                }
                _ => return Err(unknown(self.session.subject(), &input.port)),
            };
            feeds.push((input.port.name.clone(), TensorValue::from_array(input.port.dtype, array)?));
        }
        Ok(feeds)
    }

    /// One run over pictures that can share it.
    fn run(&mut self, pictures: &[&ImageArrays]) -> Result<Vec<Features>> {
        let takes_mask = self.inputs.iter().any(|input| input.kind() == InputKind::Image(PIXEL_ATTENTION_MASK));
        if !takes_mask && pictures.iter().any(|picture| is_padded(picture)) {
            let problem = format!("takes no `{PIXEL_ATTENTION_MASK}`, but a picture is padded");
            return Err(
                Error::invalid(self.session.subject(), problem).remedy("export the vision encoder with this input")
            );
        }
        let feeds = self.feeds(pictures)?;
        let feeds: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let wanted: Vec<&str> = std::iter::once(self.output.as_str()).chain(self.deepstack.names()).collect();
        let outputs = self.session.run(&feeds, Some(&wanted))?;
        let shares = Shares::of(pictures);
        let subject = self.session.subject();
        let projected = match &mut self.projector {
            Some(projector) => Some(projector.run(outputs.get(&self.output)?)?),
            None => None,
        };
        let mut unprojected = match self.projector.as_ref().filter(|_| self.keeps_unprojected) {
            Some(projector) => {
                let before = outputs.get(&self.output)?;
                let (_, own) = shares.split(subject, before.shape(), &before.to_f32()?)?;
                let all = shares.0.iter().sum();
                let tiles = shares.0.iter().map(|&tiles| (tiles, all));
                own.into_iter()
                    .zip(tiles)
                    .map(|(data, tiles)| projector.unprojected(&before.shape(), tiles, data))
                    .collect()
            }
            None => Vec::new(),
        }
        .into_iter();
        let main = projected.as_ref().map_or_else(|| outputs.get(&self.output), Ok)?;
        let (hidden_size, data) = shares.split(subject, main.shape(), &main.to_f32()?)?;
        let levels = self.deepstack.levels(subject, &outputs, &shares, hidden_size)?;
        Ok(data
            .into_iter()
            .enumerate()
            .map(|(picture, data)| {
                let deepstack = levels.iter().map(|level| level[picture].clone()).collect();
                let unprojected = unprojected.next().map(Arc::new);
                Features { hidden_size, data, deepstack, levels: self.deepstack.numbers(levels.len()), unprojected }
            })
            .collect())
    }
}

/// Number of tiles per picture. The rows of an output are divided among the pictures of a run in these proportions.
struct Shares(Vec<usize>);

impl Shares {
    fn of(pictures: &[&ImageArrays]) -> Self {
        Shares(pictures.iter().map(|picture| tile_count(picture)).collect())
    }

    /// The width of an output's rows, and the rows of each picture; every tile has equally many.
    fn split(&self, subject: &str, shape: Vec<usize>, data: &[f32]) -> Result<(usize, Vec<Vec<f32>>)> {
        let width = shape.last().copied().unwrap_or(0);
        let rows = data.len().checked_div(width).unwrap_or(0);
        let tiles: usize = self.0.iter().sum();
        if rows == 0 || tiles == 0 || rows % tiles != 0 {
            let problem = format!("gave {rows} rows of features for {tiles} tiles (shape {shape:?})");
            return Err(Error::invalid(subject, problem));
        }
        let mut rest = data;
        let own = self.0.iter().map(|tiles_of_one| {
            let (own, others) = rest.split_at(rows / tiles * tiles_of_one * width);
            rest = others;
            own.to_vec()
        });
        let own = own.collect();
        Ok((width, own))
    }
}

impl Deepstack {
    fn names(&self) -> impl Iterator<Item = &str> {
        let (levels, stacked) = match self {
            Deepstack::Levels(names) => (&names[..], None),
            Deepstack::Stacked(name) => (&[][..], Some(name)),
        };
        levels.iter().map(|(_, name)| name).chain(stacked).map(String::as_str)
    }

    /// The numbers of `count` levels.
    fn numbers(&self, count: usize) -> Vec<usize> {
        match self {
            Deepstack::Levels(names) => names.iter().map(|(number, _)| *number).collect(),
            Deepstack::Stacked(_) => (0..count).collect(),
        }
    }

    /// The rows of each picture, by level.
    fn levels(
        &self,
        subject: &str,
        outputs: &Outputs,
        shares: &Shares,
        hidden_size: usize,
    ) -> Result<Vec<Vec<Vec<f32>>>> {
        let split = |shape: Vec<usize>, data: &[f32]| {
            let (width, rows) = shares.split(subject, shape, data)?;
            match width == hidden_size {
                true => Ok(rows),
                false => {
                    let problem = format!("its DeepStack features are {width} wide, its image features {hidden_size}");
                    Err(Error::invalid(subject, problem))
                }
            }
        };
        match self {
            Deepstack::Levels(names) => {
                let level = |(_, name): &(usize, String)| {
                    let tensor = outputs.get(name)?;
                    split(tensor.shape(), &tensor.to_f32()?)
                };
                names.iter().map(level).collect()
            }
            Deepstack::Stacked(name) => {
                let tensor = outputs.get(name)?;
                let shape = tensor.shape();
                let data = tensor.to_f32()?;
                let count = shape.first().copied().unwrap_or(0);
                let each = data.len().checked_div(count).unwrap_or(0);
                data.chunks_exact(each.max(1)).map(|level| split(shape[1..].to_vec(), level)).collect()
            }
        }
    }
}

/// Finds the output with image features and those with DeepStack features.
fn outputs(subject: &str, ports: &[Port]) -> Result<(String, Deepstack)> {
    let mut levels: Vec<(Option<usize>, &Port)> = Vec::new();
    let mut others: Vec<&Port> = Vec::new();
    for port in ports {
        match output_kind(port) {
            Some((InputKind::Deepstack, number)) => levels.push((number, port)),
            _ => others.push(port),
        }
    }
    levels.sort_by_key(|(number, _)| *number);
    let deepstack = match &levels[..] {
        [(None, only)] if only.rank() > 2 => Deepstack::Stacked(only.name.clone()),
        levels => {
            let named = |(number, port): &(Option<usize>, &Port)| (number.unwrap_or(0), port.name.clone());
            Deepstack::Levels(levels.iter().map(named).collect())
        }
    };
    // Runtimes find the features by this name and ignore the other outputs.
    if let Some(features) = others.iter().find(|port| port.name == "image_features") {
        return Ok((features.name.clone(), deepstack));
    }
    match others[..] {
        [only] => Ok((only.name.clone(), deepstack)),
        _ => {
            let names: Vec<String> = others.iter().map(|port| port.described()).collect();
            let problem = format!(
                "gives {} besides DeepStack features; one output of image features is known",
                if names.is_empty() { "nothing".to_string() } else { names.join(" and ") }
            );
            Err(Error::unsupported(subject, problem)
                .remedy("remove the outputs that the decoder does not read, or name DeepStack features `deepstack_features_0` and so on"))
        }
    }
}

/// Divides pictures into groups that share a run, with at most [`TILES_PER_RUN`] tiles each.
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
            if !share_a_run(first, next) || tiles > TILES_PER_RUN {
                break;
            }
            end += 1;
        }
        groups.push(&pictures[start..end]);
        start = end;
    }
    groups
}

#[cfg(test)]
mod tests {
    use ndarray::ArrayD;

    use super::*;
    use crate::ir::{DataType, Dim};
    use crate::prompt::Array;

    #[test]
    fn pictures_of_one_tile_size_share_a_run() {
        let picture = |shape: &[usize]| {
            let pixels = Array::Float(ArrayD::zeros(shape));
            ImageArrays::new([(PIXEL_VALUES, pixels)]).expect("a picture")
        };
        let shapes = [[2, 3, 8, 8], [1, 3, 8, 8], [1, 3, 4, 8], [31, 3, 4, 8], [1, 3, 4, 8]];
        let pictures = shapes.map(|shape| picture(&shape));
        let borrowed: Vec<&ImageArrays> = pictures.iter().collect();
        let sizes: Vec<usize> = runs(&borrowed).iter().map(|group| group.len()).collect();
        assert_eq!(sizes, [2, 2, 1]);
    }

    #[test]
    fn vision_outputs_are_recognised_by_name() {
        let port = |name: &str, rank: usize| Port {
            name: name.into(),
            dtype: DataType::Float,
            shape: vec![Dim::Unknown; rank],
        };
        let levels = ["deepstack_features_2", "image_features", "deepstack_features_0"].map(|name| port(name, 2));
        let (output, deepstack) = outputs("tower", &levels).expect("outputs");
        let names = [0, 2].map(|level| (level, format!("deepstack_features_{level}"))).to_vec();
        assert_eq!((output.as_str(), deepstack), ("image_features", Deepstack::Levels(names)));
        let stacked = outputs("tower", &[port("pooled_embeds", 2), port("deepstack_features", 3)]).expect("outputs");
        assert_eq!(stacked.1, Deepstack::Stacked("deepstack_features".into()));
        let error = outputs("tower", &[port("a", 2), port("b", 2)]).expect_err("two").to_string();
        assert!(error.contains("`a` (float32 [?, ?])") && error.contains("deepstack_features_0"), "{error}");
    }

    #[test]
    fn feature_rows_are_divided_by_tile_count() {
        let data: Vec<f32> = (0..12).map(|n| n as f32).collect();
        let (width, own) = Shares(vec![1, 2]).split("tower", vec![3, 2, 2], &data).expect("rows");
        assert_eq!((width, own[0].len(), own[1].len()), (2, 4, 8));
        let error = Shares(vec![5]).split("tower", vec![3, 2, 2], &data).expect_err("five tiles").to_string();
        assert_eq!(error, "tower: gave 6 rows of features for 5 tiles (shape [3, 2, 2])");
    }
}
