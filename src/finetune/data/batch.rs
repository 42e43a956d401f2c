//! Batches: rows of the frozen part's output as tensors, padded on the right to the longest sample of the batch.

use std::collections::BTreeMap;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::base::{Error, Result};
use crate::runtime::{Embedded, SideValues, Step};

use super::connector_rows::{ConnectorBatch, ConnectorRows};
use super::example::{Example, running_sum};
use super::feeds::{Feed, Feeds};
use super::rows::{RowDtype, RowsFile};
use crate::finetune::cut::{ConnectorInput, SideWidths};
use crate::finetune::error::torch_error;
use crate::finetune::loss::TopK;
use crate::ir::ValueId;

/// Samples with the frozen part's output and the dense model's targets.
#[derive(Debug)]
pub struct TrainingSet {
    pub examples: Vec<Example>,
    /// First row of each example.
    starts: Vec<u64>,
    /// First answer row of each example.
    answer_starts: Vec<u64>,
    /// Residual stream at the layer where passes begin, one row per token; None when rows are computed on demand.
    stream: Option<Stream>,
    /// Batches read the stream targets after these layers; None for all.
    wanted: Option<Range<usize>>,
    /// The loaded samples, when rows are computed on demand.
    window: Option<Window>,
    /// Side values, one row per token, with their widths.
    side: Option<(SideWidths, RowsFile)>,
    /// Features that the connector in training reads.
    connector: Option<ConnectorRows>,
    targets: Targets,
}

/// Residual stream before one layer.
#[derive(Debug)]
pub struct Stream {
    pub rows: RowsFile,
    /// The layer that reads it, counted from the first trained one.
    pub before: usize,
}

/// Loaded samples with their rows.
#[derive(Debug)]
struct Window {
    set: Box<TrainingSet>,
    /// Index in `set` of each loaded sample.
    places: BTreeMap<usize, usize>,
}

/// Outputs of the dense model for the same samples.
#[derive(Debug, Default)]
pub struct Targets {
    /// Residual stream at the compared points.
    pub streams: Vec<StreamTarget>,
    /// One row per answer token: `K` log-probabilities, then their `K` token ids.
    pub answers: Option<RowsFile>,
}

/// The dense model's residual stream at one point, one row per token.
#[derive(Debug)]
pub struct StreamTarget {
    pub rows: RowsFile,
    /// Point of the student's stream that it is compared with, counted in layers from the first trained one.
    pub point: usize,
}

/// A batch in host memory or on a device: `B` samples, `T` tokens in the longest, `D` the hidden size, `N` answer tokens, `M` tokens
/// without padding.
#[derive(Debug)]
pub struct TrainingBatch {
    /// f32 or bf16 `[B, T, D]` as the rows are stored, 0 at padding. Passes begin with `Student::entering` of it.
    pub hidden: Tensor,
    /// Inputs of the graph besides the stream: masks, positions and side values.
    pub inputs: Vec<(ValueId, Feed)>,
    /// i64 `[N]`: indices into `[B * T]` of the positions that predict an answer token.
    pub answer_rows: Tensor,
    /// i64 `[N]`: answer token ids.
    pub targets: Tensor,
    pub answer_tokens: u64,
    /// i64 `[M]`: indices into `[B * T]` of tokens that are not padding.
    pub real_rows: Tensor,
    /// Features of the pictures for a connector in training; `None` without pictures.
    pub connector: Option<ConnectorBatch>,
    /// The dense model's residual stream by point, `[M, D]` each.
    pub streams: BTreeMap<usize, Tensor>,
    pub top_k: Option<TopK>,
}

impl TrainingSet {
    /// Pairs examples with their rows, which are in the same order.
    pub fn new(examples: Vec<Example>, hidden: RowsFile, side: Option<(SideWidths, RowsFile)>) -> Self {
        let answer_starts = running_sum(examples.iter().map(|example| example.answers));
        let starts = running_sum(examples.iter().map(|example| example.length));
        let stream = Some(Stream { rows: hidden, before: 0 });
        let (wanted, window, connector, targets) = (None, None, None, Targets::default());
        TrainingSet { examples, starts, answer_starts, stream, wanted, window, side, connector, targets }
    }

    /// Adds the features that the connector in training reads, which are in the order of the examples.
    pub fn with_connector(self, rows: Option<(ConnectorInput, RowsFile)>) -> Self {
        let connector = rows.map(|(input, rows)| ConnectorRows::new(input, rows, &self.examples));
        TrainingSet { connector, ..self }
    }

    /// A set whose rows are loaded on demand with [`TrainingSet::put`].
    pub fn of_windows(examples: Vec<Example>) -> Self {
        TrainingSet {
            examples,
            starts: Vec::new(),
            answer_starts: Vec::new(),
            stream: None,
            wanted: None,
            window: None,
            side: None,
            connector: None,
            targets: Targets::default(),
        }
    }

    /// Sets the dense model's outputs for all samples, which are in the order of the examples.
    pub fn set_targets(&mut self, targets: Targets) {
        self.starts = running_sum(self.examples.iter().map(|example| example.length));
        self.answer_starts = running_sum(self.examples.iter().map(|example| example.answers));
        self.targets = targets;
    }

    /// Type of the stored stream's numbers; `None` when rows are computed on demand.
    pub fn stream_element(&self) -> Option<RowDtype> {
        self.stream.as_ref().map(|stream| stream.rows.element())
    }

    /// True when the rows of these samples are available for batches.
    pub fn holds(&self, samples: &[usize]) -> bool {
        let within = |window: &Window| samples.iter().all(|sample| window.places.contains_key(sample));
        self.stream.is_some() || self.window.as_ref().is_some_and(within)
    }

    /// Replaces the loaded rows by those of `samples`. Examples of `set` are matched by their index in the source.
    ///
    /// Errors: `Error::Invalid` when a sample is not in `set`.
    pub fn put(&mut self, samples: &[usize], set: TrainingSet) -> Result<()> {
        let by_number: BTreeMap<u64, usize> =
            set.examples.iter().enumerate().map(|(place, example)| (example.number, place)).collect();
        let places = samples.iter().map(|&sample| {
            let Example { id, number, .. } = &self.examples[sample];
            let place = by_number.get(number).copied();
            let problem = "was read before and is not there now";
            Ok((sample, place.ok_or_else(|| Error::invalid(format!("sample `{id}`"), problem))?))
        });
        self.window = Some(Window { places: places.collect::<Result<_>>()?, set: Box::new(set) });
        Ok(())
    }

    /// Width of the residual stream; 0 when no rows are available.
    pub fn hidden_size(&self) -> usize {
        match (&self.stream, &self.window) {
            (Some(stream), _) => stream.rows.width(),
            (None, Some(window)) => window.set.hidden_size(),
            (None, None) => 0,
        }
    }

    /// The layer where passes begin, counted from the first trained one.
    pub fn begins_before(&self) -> usize {
        self.stream.as_ref().map_or(0, |stream| stream.before)
    }

    /// Replaces the stream where passes begin and returns the previous one. Batches then read all targets again.
    pub fn begin_at(&mut self, stream: Stream) -> Option<Stream> {
        self.wanted = None;
        self.stream.replace(stream)
    }

    /// Limits the stream targets of batches to those after these layers; None for all.
    pub fn want(&mut self, layers: Option<Range<usize>>) {
        self.wanted = layers;
    }

    /// Length of each sample in tokens.
    pub fn lengths(&self) -> Vec<usize> {
        self.examples.iter().map(|example| example.length).collect()
    }

    /// The batch of these samples in host memory, with the graph inputs `feeds` and the targets that
    /// [`TrainingSet::want`] selects.
    ///
    /// Errors: `Error::Io` when rows cannot be read; `Error::Invalid` when rows are not loaded, or samples lack data for an
    /// input; `Error::Engine` when LibTorch cannot create the tensors.
    pub fn batch(&self, samples: &[usize], feeds: &Feeds) -> Result<TrainingBatch> {
        self.batch_with(samples, feeds, self.wanted.clone(), true)
    }

    /// The batch of these samples, with the dense model's stream after the layers `wanted` (None for all), and with its
    /// answer distributions if `answers` is true. Other targets are not read.
    ///
    /// Errors: as [`TrainingSet::batch`].
    pub fn batch_with(
        &self,
        samples: &[usize],
        feeds: &Feeds,
        wanted: Option<Range<usize>>,
        answers: bool,
    ) -> Result<TrainingBatch> {
        if let Some(window) = &self.window {
            let place = |sample: &usize| window.places.get(sample).copied();
            let places: Option<Vec<usize>> = samples.iter().map(place).collect();
            let places = places.ok_or_else(|| Error::invalid("a batch", "has a sample whose rows are not at hand"))?;
            let mut batch = window.set.batch_with(&places, feeds, wanted.clone(), answers)?;
            // The dense model's outputs for all samples are on disk where the other rows alone are computed.
            batch.streams.extend(self.streams(samples, wanted.as_ref())?);
            if answers && batch.top_k.is_none() {
                batch.top_k = self.top_k(samples)?;
            }
            return Ok(batch);
        }
        let stream = self.stream.as_ref().ok_or_else(|| Error::invalid("a batch", "has no rows at hand"))?;
        let time = samples.iter().map(|&sample| self.examples[sample].length).max().unwrap_or(0);
        let (rows, width) = (samples.len(), stream.rows.width());
        let element = stream.rows.element();
        let stride = time * width * element.size();
        let mut hidden = Vec::with_capacity(rows * stride);
        let mut answer_rows = Vec::new();
        let mut targets = Vec::new();
        let mut real_rows = Vec::new();
        for (row, &sample) in samples.iter().enumerate() {
            let example = &self.examples[sample];
            stream.rows.read(self.starts[sample], example.length, &mut hidden)?;
            hidden.resize((row + 1) * stride, 0);
            answer_rows.extend(example.detail().positions.iter().map(|&at| (row * time) as i64 + i64::from(at)));
            targets.extend_from_slice(&example.detail().targets);
            let first = (row * time) as i64;
            real_rows.extend(first..first + example.length as i64);
        }
        let inputs = feeds.of(&self.step(samples)?, width)?;
        let streams = self.streams(samples, wanted.as_ref())?;
        let top_k = if answers { self.top_k(samples)? } else { None };
        let connector = match &self.connector {
            Some(rows) if stream.before == 0 => rows.batch(&self.examples, samples, time)?,
            _ => None,
        };
        let make = move || -> Result<TrainingBatch, tch::TchError> {
            let (b, t) = (rows as i64, time as i64);
            Ok(TrainingBatch {
                hidden: Tensor::f_from_data_size(&hidden, &[b, t, width as i64], element.kind())?,
                inputs,
                answer_rows: Tensor::f_from_slice(&answer_rows)?,
                answer_tokens: targets.len() as u64,
                targets: Tensor::f_from_slice(&targets)?,
                real_rows: Tensor::f_from_slice(&real_rows)?,
                connector,
                streams,
                top_k,
            })
        };
        make().map_err(torch_error("a batch"))
    }

    fn streams(&self, samples: &[usize], wanted: Option<&Range<usize>>) -> Result<BTreeMap<usize, Tensor>> {
        let wanted = |point: usize| wanted.is_none_or(|layers| layers.contains(&(point - 1)));
        let mut streams = BTreeMap::new();
        for StreamTarget { rows, point } in self.targets.streams.iter().filter(|target| wanted(target.point)) {
            let mut bytes = Vec::new();
            for &sample in samples {
                rows.read(self.starts[sample], self.examples[sample].length, &mut bytes)?;
            }
            streams.insert(*point, matrix(&bytes, rows).map_err(torch_error("the dense model's stream"))?);
        }
        Ok(streams)
    }

    fn top_k(&self, samples: &[usize]) -> Result<Option<TopK>> {
        let Some(rows) = &self.targets.answers else { return Ok(None) };
        let mut bytes = Vec::new();
        for &sample in samples {
            rows.read(self.answer_starts[sample], self.examples[sample].answers, &mut bytes)?;
        }
        let k = rows.width() as i64 / 2;
        let tensors = || -> Result<TopK, tch::TchError> {
            let all = matrix(&bytes, rows)?;
            // Each in one piece: a copy of a part of rows to a GPU would wait for a copy on the host.
            let (log_probs, tokens) = (all.f_narrow(1, 0, k)?.f_contiguous()?, all.f_narrow(1, k, k)?);
            Ok(TopK { log_probs, tokens: tokens.f_to_kind(Kind::Int64)? })
        };
        tensors().map(Some).map_err(torch_error("the dense model's answers"))
    }

    /// Source of the graph's inputs. Padding is on the right, and position ids continue through it.
    fn step(&self, samples: &[usize]) -> Result<Step> {
        let planes = samples.iter().map(|&sample| self.examples[sample].detail().rotary.len()).max().unwrap_or(0);
        let mut prompts = Vec::with_capacity(samples.len());
        for &sample in samples {
            let example = &self.examples[sample];
            let mut positions = example.position_rows();
            if positions.len() < planes {
                positions = positions.into_iter().cycle().take(planes).collect();
            }
            let (image, types) = (example.image_mask(), example.detail().types.clone());
            prompts.push(match &self.side {
                Some((widths, rows)) => {
                    let mut bytes = Vec::new();
                    rows.read(self.starts[sample], example.length, &mut bytes)?;
                    let numbers: Vec<f32> =
                        bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
                    widths.prompt(&numbers, positions, image, types)
                }
                None => Embedded {
                    positions,
                    side: SideValues { image, types, ..SideValues::default() },
                    ..Embedded::default()
                },
            });
        }
        Step::padded_right(&prompts.iter().collect::<Vec<_>>())
    }
}

impl TrainingBatch {
    /// Rows of the padded stream: `B * T`.
    pub fn places(&self) -> i64 {
        self.hidden.size().iter().take(2).product()
    }

    /// The batch in pinned host memory, so that a copy to the GPU can be asynchronous.
    ///
    /// Errors: `Error::Engine` when LibTorch has no GPU.
    pub fn pinned(self) -> Result<TrainingBatch> {
        self.moved(crate::torch::pinned)
    }

    /// The batch on `device`. A copy from pinned memory is asynchronous.
    ///
    /// Errors: `Error::Engine` when LibTorch has no such device.
    pub fn to(self, device: Device) -> Result<TrainingBatch> {
        self.moved(|tensor| {
            let copy = || tensor.f_to_device_(device, tensor.f_kind()?, true, false);
            copy().map_err(torch_error("a batch"))
        })
    }

    fn moved(self, place: impl Fn(&Tensor) -> Result<Tensor>) -> Result<TrainingBatch> {
        let streams = self.streams.iter().map(|(point, stream)| Ok((*point, place(stream)?)));
        let streams = streams.collect::<Result<_>>()?;
        let top_k = match &self.top_k {
            Some(TopK { log_probs, tokens }) => Some(TopK { log_probs: place(log_probs)?, tokens: place(tokens)? }),
            None => None,
        };
        let inputs = self.inputs.into_iter().map(|(id, feed)| Ok((id, feed.moved(&place)?)));
        let inputs = inputs.collect::<Result<_>>()?;
        let connector = self.connector.as_ref();
        let connector = connector.map(|ConnectorBatch { features, places }| {
            Ok::<_, Error>(ConnectorBatch { features: place(features)?, places: place(places)? })
        });
        Ok(TrainingBatch {
            hidden: place(&self.hidden)?,
            inputs,
            answer_rows: place(&self.answer_rows)?,
            targets: place(&self.targets)?,
            answer_tokens: self.answer_tokens,
            real_rows: place(&self.real_rows)?,
            connector: connector.transpose()?,
            streams,
            top_k,
        })
    }
}

/// Rows of little-endian bf16 numbers as a matrix `[rows, width]`.
///
/// Errors: `Error::Engine` when LibTorch cannot create it.
pub fn bf16_matrix(bytes: &[u8], width: usize) -> Result<Tensor> {
    let count = bytes.len() / (2 * width).max(1);
    let matrix = Tensor::f_from_data_size(bytes, &[count as i64, width as i64], Kind::BFloat16);
    matrix.map_err(torch_error("the dense model's stream"))
}

/// Bytes of `rows` as a matrix `[rows, width]`.
fn matrix(bytes: &[u8], rows: &RowsFile) -> Result<Tensor, tch::TchError> {
    let (width, kind) = (rows.width(), rows.element().kind());
    let count = bytes.len() / (width * kind.elt_size_in_bytes()).max(1);
    Tensor::f_from_data_size(bytes, &[count as i64, width as i64], kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finetune::cut::SideInputs;
    use crate::finetune::data::rows::RowsWriter;
    use crate::runtime::Input;

    fn training_set(folder: &std::path::Path) -> TrainingSet {
        let ids = [5i64, 6, 7, 8];
        let long = Example::new("a".into(), &ids, &[false, false, true, true]).unwrap();
        let short = Example::new("b".into(), &ids[..2], &[true, true]).unwrap();
        let mut writer = RowsWriter::create(&folder.join("rows"), RowDtype::F32).unwrap();
        writer.push(&(1..=12).map(|n| n as f32).collect::<Vec<_>>(), 6).unwrap();
        TrainingSet::new(vec![long, short], writer.finish().unwrap(), None)
    }

    #[test]
    fn an_answer_token_is_predicted_at_the_position_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let examples = training_set(folder.path()).examples;
        assert_eq!((&examples[0].detail().positions, &examples[0].detail().targets), (&vec![1, 2], &vec![7, 8]));
        assert_eq!((&examples[1].detail().positions, &examples[1].detail().targets), (&vec![0], &vec![6]));
        let error = Example::new("c".into(), &[1, 2], &[true]).unwrap_err().to_string();
        assert_eq!(error, "sample `c`: has 2 tokens and an answer mask of 1");
    }

    #[test]
    fn shorter_samples_are_padded_on_the_right() {
        let folder = tempfile::tempdir().unwrap();
        let batch = training_set(folder.path()).batch(&[1, 0], &Feeds::default()).unwrap();
        assert_eq!(batch.hidden.size(), [2, 4, 2]);
        let batch = batch.to(Device::Cpu).unwrap();
        let hidden: Vec<f32> = Vec::try_from(batch.hidden.flatten(0, -1)).unwrap();
        assert_eq!(hidden, [9.0, 10.0, 11.0, 12.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        let ints = |tensor: &Tensor| Vec::<i64>::try_from(tensor.flatten(0, -1)).unwrap();
        assert_eq!(batch.places(), 8);
        assert_eq!(ints(&batch.answer_rows), [0, 5, 6]);
        assert_eq!(ints(&batch.targets), [6, 7, 8]);
        assert_eq!(batch.answer_tokens, 3);
    }

    /// Pinning and moving keep every tensor of a batch, those of the graph's inputs too, each in one piece; without a GPU,
    /// pinning is an error and not a copy.
    #[test]
    fn a_moved_batch_has_the_same_tensors() {
        let folder = tempfile::tempdir().unwrap();
        let mut set = training_set(folder.path());
        let rows = |name: &str, element, width: usize, rows: usize| {
            let mut writer = RowsWriter::create(&folder.path().join(name), element).unwrap();
            writer.push(&(0..width * rows).map(|n| n as f32).collect::<Vec<_>>(), rows).unwrap();
            writer.finish().unwrap()
        };
        set.targets.streams.push(StreamTarget { rows: rows("streams", RowDtype::Bf16, 2, 6), point: 1 });
        set.targets.answers = Some(rows("answers", RowDtype::F32, 4, 3));
        set.side = Some((
            SideWidths { levels: 1, level_width: 2, ..SideWidths::default() },
            rows("side", RowDtype::F32, 2, 6),
        ));
        let image = SideValues { image: vec![false, true, true, false], ..SideValues::default() };
        set.examples[0].keep(None, &image);
        let feeds = Feeds::of_names(&["attention_mask", "position_ids", "deepstack_features_5", "use_cache_branch"]);
        let made = || set.batch(&[1, 0], &feeds).unwrap();
        let tensors = |batch: &TrainingBatch| {
            let TopK { log_probs, tokens } = batch.top_k.as_ref().unwrap();
            let all = [&batch.hidden, &batch.answer_rows, &batch.targets, &batch.real_rows, log_probs, tokens];
            let inputs = batch.inputs.iter().map(|(_, feed)| feed.tensor(Device::Cpu).unwrap());
            all.into_iter().chain(batch.streams.values()).map(Tensor::shallow_clone).chain(inputs).collect::<Vec<_>>()
        };
        let before = tensors(&made());
        assert_eq!(before.len(), 7 + 4);
        assert!(before.iter().all(Tensor::is_contiguous));
        let deepstack: Vec<f32> = Vec::try_from(before[9].flatten(0, -1)).unwrap();
        assert_eq!(deepstack, [2.0, 3.0, 4.0, 5.0]);
        let equal = |batch: &TrainingBatch| {
            assert!(before.iter().zip(tensors(batch)).all(|(a, b)| a.kind() == b.kind() && a.equal(&b)));
            assert_eq!((batch.places(), batch.answer_tokens), (8, 3));
        };
        equal(&made().to(Device::Cpu).unwrap());
        // Everything moves but the flag, which is read on the host.
        let places = std::cell::RefCell::new(Vec::new());
        let copied = made().moved(|tensor| {
            let copy = tensor.copy();
            places.borrow_mut().push(copy.data_ptr());
            Ok(copy)
        });
        let copied = copied.unwrap();
        equal(&copied);
        let found = tensors(&copied).iter().map(Tensor::data_ptr).collect::<Vec<_>>();
        let (flag, moved) = found.split_last().unwrap();
        assert!(moved.iter().all(|place| places.borrow().contains(place)) && !places.borrow().contains(flag));
        match crate::torch::cuda_device(0) {
            Ok(_) => equal(&made().pinned().unwrap()),
            Err(_) => assert!(matches!(made().pinned().unwrap_err(), Error::Engine { .. })),
        }
    }

    /// The fit of one layer reads the dense model's stream behind that layer, not behind all of them.
    #[test]
    fn targets_that_are_not_asked_for_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let mut set = training_set(folder.path());
        for point in [1, 3] {
            let mut writer = RowsWriter::create(&folder.path().join(point.to_string()), RowDtype::Bf16).unwrap();
            writer.push(&[point as f32; 12], 6).unwrap();
            set.targets.streams.push(StreamTarget { rows: writer.finish().unwrap(), point });
        }
        let points = |batch: TrainingBatch| batch.streams.into_keys().collect::<Vec<_>>();
        assert_eq!(points(set.batch(&[0, 1], &Feeds::default()).unwrap()), [1, 3]);
        let batch = set.batch_with(&[0, 1], &Feeds::default(), Some(2..3), false).unwrap();
        assert_eq!(batch.streams[&3].mean(Kind::Float).double_value(&[]), 3.0);
        assert_eq!(points(batch), [3]);
    }

    #[test]
    fn side_inputs_of_pictures_are_restored_unchanged() {
        let port = |level: usize| crate::runtime::Port {
            name: format!("deepstack_features_{level}"),
            dtype: crate::ir::DataType::Float,
            shape: vec![crate::ir::Dim::Unknown, crate::ir::Dim::Known(3)],
        };
        let deepstack = Input::all("graph", &[port(0), port(1)]).unwrap();
        let widths = SideWidths { embeddings: 2, levels: 2, level_width: 3, per_layer: 2 };
        let inputs = SideInputs { widths, deepstack, connector: None };
        let mut prompt = Embedded::text(&[5, 6, 7, 8], 2, (30..38).map(|n| n as f32).collect(), 0, 1);
        prompt.side.image = vec![false, true, true, false];
        prompt.side.types = vec![0, 1, 1, 0];
        prompt.side.deepstack = vec![(0..6).map(|n| n as f32).collect(), (6..12).map(|n| n as f32).collect()];
        prompt.side.per_layer = (20..28).map(|n| n as f32).collect();
        let rows = inputs.rows(&prompt).unwrap();
        assert_eq!(rows.len(), 4 * 10);
        let mut example = Example::new("a".into(), &[5, 6, 7, 8], &[false, false, false, true]).unwrap();
        example.keep(None, &prompt.side);
        assert_eq!(example.detail().image, [[1, 2]]);
        let found = widths.prompt(&rows, example.position_rows(), example.image_mask(), example.detail().types.clone());
        assert_eq!((&found.data, &found.positions, &found.side), (&prompt.data, &prompt.positions, &prompt.side));
        // The encoder's level numbers do not matter: levels are matched by order.
        prompt.side.levels = vec![5, 11];
        assert_eq!(inputs.rows(&prompt).unwrap(), rows);
        prompt.side.deepstack.pop();
        assert!(inputs.rows(&prompt).unwrap_err().to_string().contains("takes 2 levels"));
        let text = Embedded::text(&[5], 2, vec![1.0, 2.0], 0, 1);
        let inputs = SideInputs { widths: SideWidths { per_layer: 0, ..widths }, ..inputs };
        assert_eq!(inputs.rows(&text).unwrap(), [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }
}
