//! The dense model as teacher: its residual stream and its answer distributions, computed once in ONNX Runtime and
//! stored on disk.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::analysis::{Analysis, analyse, head_input};
use crate::base::{Cancel, Device, Error, Result, Sha256Digest, sha256_json, thread_count};
use crate::bundle::{Bundle, Role};
use crate::data::LeftOut;
use crate::finetune::loss;
use crate::finetune::plan::{LOGIT_BYTES, Point, points, session_bytes};
use crate::finetune::settings::Settings;
use crate::ir::{Dim, Model, ValueId, ValueType};
use crate::rewrite::extract;
use crate::runtime::{Decoder, FeatureCache, Runtime, Session, SessionOptions, TensorValue, VlmSession, headed};

use super::batch::{StreamTarget, Targets, TrainingSet};
use super::example::{Example, total_tokens};
use super::frozen_part::{self, LazySession, RowStore, each_round};
use super::rows::{RowDtype, RowsFile, RowsWriter};
use super::same::{fed_alike, same_computation};
use super::source::{Source, TrainingSample};

/// Element types of the stored streams and answer distributions.
const STREAMS: RowDtype = RowDtype::Bf16;
const ANSWERS: RowDtype = RowDtype::F32;

/// The dense model, and the correspondence of its layers to those of the pruned model.
pub struct Teacher<'a> {
    /// The model before pruning.
    pub bundle: &'a Bundle,
    /// Index in the dense model of each layer of the pruned model.
    pub kept: &'a [usize],
    /// Frozen layers that close a triplet, as indices in the pruned model.
    pub anchors: &'a [usize],
}

/// Inputs of a run of the dense model.
pub struct TeacherRequest<'a> {
    pub teacher: &'a Teacher<'a>,
    pub trained: &'a [usize],
    /// First trained layer, as an index in the pruned model.
    pub first: usize,
    pub source: &'a dyn Source,
    pub data_digest: &'a Sha256Digest,
    pub settings: &'a Settings,
    pub device: Device,
    /// The most bytes of a GPU that the dense model takes; `None` for no limit.
    pub memory_limit: Option<u64>,
    pub work: &'a Path,
    pub features: &'a Arc<FeatureCache>,
    /// True when the connector is trained, so that samples need the features before it.
    pub connector: bool,
}

/// The outputs to compute with the dense model, and their files.
pub struct TeacherTargets<'a> {
    request: TeacherRequest<'a>,
    /// SHA-256 of the dense model.
    pub digest: Sha256Digest,
    analysis: Analysis,
    points: Vec<Point>,
    /// Additional points that only a fit reads.
    fit_points: Vec<Point>,
    /// Files of the outputs.
    files: TargetFiles,
    vocabulary: Option<usize>,
    /// Input of the head when the head is position-wise, so that it runs at the answer positions only. None otherwise.
    head_input: Option<ValueId>,
}

/// Files of the dense model's outputs.
#[derive(Clone, Debug)]
pub struct TargetFiles {
    /// One file per point.
    streams: Vec<PathBuf>,
    /// File of the answer distributions, with the number of tokens stored per answer.
    answers: Option<(PathBuf, usize)>,
}

impl TargetFiles {
    /// Files of the same names in another folder.
    pub fn in_folder(&self, folder: &Path) -> Self {
        let there = |path: &PathBuf| folder.join(path.file_name().unwrap_or_default());
        let answers = self.answers.as_ref().map(|(path, k)| (there(path), *k));
        TargetFiles { streams: self.streams.iter().map(there).collect(), answers }
    }

    /// True when there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty() && self.answers.is_none()
    }

    fn exist(&self) -> bool {
        self.streams.iter().chain(self.answers.iter().map(|(path, _)| path)).all(|path| path.exists())
    }
}

/// The dense model during a run: its layers, and its head when that runs separately.
pub struct Running<'a> {
    body: LazySession<'a>,
    head: Option<Session>,
}

impl Running<'_> {
    /// Frees the model; the next use loads it again.
    pub fn release(&mut self) {
        self.body.release();
        self.head = None;
    }
}

/// Outputs of the dense model to store for one sample; empty when there is nothing to store.
struct SampleOutputs {
    streams: Vec<Vec<f32>>,
    /// Input of the head, or the logits, at each answer position.
    answers: Vec<f32>,
    frozen: Option<Vec<f32>>,
}

/// The pruned model's residual stream before its first trained layer, as a value of the dense model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frozen {
    /// The embeddings that enter the decoder.
    Embeddings,
    Value(ValueId),
}

/// The dense model's decoder with its analysis.
pub struct Dense {
    analysis: Analysis,
}

impl Dense {
    /// Loads and analyses the decoder.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` when it lacks a layer that the pruned model kept.
    pub fn open(teacher: &Teacher<'_>) -> Result<Self> {
        let path = teacher.bundle.path_of(teacher.bundle.require(Role::Decoder)?);
        let analysis = analyse(&headed(teacher.bundle, crate::onnx::load(&path)?)?)?;
        let layers = &analysis.map.layers;
        if teacher.kept.iter().any(|&layer| layer >= layers.len()) {
            let problem = format!("has {} layers, the pruned model kept layers {:?}", layers.len(), teacher.kept);
            return Err(Error::invalid(format!("teacher `{}`", path.display()), problem)
                .remedy("name the model that was pruned as teacher"));
        }
        Ok(Dense { analysis })
    }

    /// Points of the residual stream that a run compares.
    pub fn points(&self, teacher: &Teacher<'_>, trained: &[usize], first: usize, settings: &Settings) -> Vec<Point> {
        points(teacher.kept, teacher.anchors, trained, first, self.analysis.map.layers.len(), settings)
    }

    /// Bytes that ONNX Runtime holds of the decoder's weights.
    pub fn session_bytes(&self, on_gpu: bool) -> u64 {
        session_bytes(&self.analysis.model.graph, on_gpu)
    }
}

impl<'a> TeacherRequest<'a> {
    /// Determines the outputs to compute with the dense model and their files. `digest` is the SHA-256 of the dense
    /// model.
    ///
    /// Errors: `Error::Invalid` when the settings cannot be hashed.
    pub fn prepare(self, dense: Dense, digest: Sha256Digest) -> Result<TeacherTargets<'a>> {
        let all = dense.points(self.teacher, self.trained, self.first, self.settings);
        let by_terms = self.settings.clone().with(|s| s.fit.enabled = false);
        let points = dense.points(self.teacher, self.trained, self.first, &by_terms);
        let fit_points = all.into_iter().filter(|point| !points.contains(point)).collect();
        let Dense { analysis } = dense;
        let vocabulary = last_size(&analysis, analysis.map.result);
        let k = (self.settings.kd.top_k as usize).min(vocabulary.unwrap_or(usize::MAX));
        let max_tokens = self.settings.data.max_tokens;
        let file = |what: &str, key: Sha256Digest, element: RowDtype| {
            self.work.join(format!("{what}-{}.{}", &key[..16.min(key.len())], element.extension()))
        };
        let streams = points.iter().map(|point| {
            let key = sha256_json(&("stream", &digest, self.data_digest, max_tokens, point.dense))?;
            Ok(file("streams", key, STREAMS))
        });
        let streams = streams.collect::<Result<Vec<_>>>()?;
        let answers = self.settings.reads(loss::TeacherOutput::Logits).then(|| {
            let temperature = self.settings.kd.temperature;
            let key = sha256_json(&("answers", &digest, self.data_digest, max_tokens, temperature, k));
            key.map(|key| (file("answers", key, ANSWERS), k))
        });
        let files = TargetFiles { streams, answers: answers.transpose()? };
        let result = analysis.map.result;
        let head_input = Some(head_input(&analysis.model.graph, result)).filter(|&input| input != result);
        Ok(TeacherTargets { request: self, digest, analysis, points, fit_points, files, vocabulary, head_input })
    }
}

impl TeacherTargets<'_> {
    /// True when all files exist: an earlier run wrote them, or no loss term reads any output.
    pub fn files_exist(&self) -> bool {
        self.files.exist()
    }

    /// Files of the outputs.
    pub fn files(&self) -> &TargetFiles {
        &self.files
    }

    /// Compared points of the student's stream, counted in layers from the first trained one.
    pub fn student_points(&self) -> Vec<usize> {
        self.points.iter().map(|point| point.student - self.request.first).collect()
    }

    /// The dense model, to be loaded on first use. With `frozen`, its outputs include that stream.
    pub fn running(&self, frozen: Option<Frozen>) -> Running<'_> {
        let outputs = self.outputs(frozen).values;
        Running { body: LazySession::new(move || self.session(&outputs)), head: None }
    }

    /// Outputs of a run, each value once.
    fn outputs(&self, frozen: Option<Frozen>) -> Outputs {
        // Two points may compare the same value; a graph outputs it once.
        let mut values: Vec<ValueId> = Vec::new();
        let mut place_of = |id: ValueId| place_in(&mut values, id);
        let points = self.points.iter().map(|point| place_of(self.stream_before(point))).collect();
        let frozen = match frozen {
            Some(Frozen::Value(id)) => Some(place_of(id)),
            _ => None,
        };
        let answers =
            self.files.answers.is_some().then(|| place_of(self.head_input.unwrap_or(self.analysis.map.result)));
        Outputs { values, points, frozen, answers }
    }

    /// The pruned model's residual stream before its first trained layer, as a value of the dense model. None unless
    /// the pruned model was made from this dense model, keeps all layers before that one, and computes the stream with
    /// the same operators and weights, from the same components before the decoder. `prefix` computes the stream in the pruned model; None when the stream is the
    /// embeddings.
    ///
    /// Errors: `Error::Io` when a file cannot be read.
    pub fn frozen(&self, pruned: &Bundle, prefix: Option<&Model>) -> Result<Option<Frozen>> {
        let first = self.request.first;
        let keeps_all_before = self.request.teacher.kept.iter().take(first).copied().eq(0..first);
        let record = pruned.record()?;
        let parent = record.as_ref().and_then(|record| record.provenance.inputs.get("model"));
        if !keeps_all_before || parent != Some(&self.digest) {
            return Ok(None);
        }
        if !fed_alike(pruned, self.request.teacher.bundle)? {
            return Ok(None);
        }
        let Some(prefix) = prefix else { return Ok(Some(Frozen::Embeddings)) };
        let Some(layer) = self.analysis.map.layers.get(first) else { return Ok(None) };
        let own = extract(&self.analysis.model, &[], &[layer.input])?;
        Ok(same_computation(&own.graph, &prefix.graph).then_some(Frozen::Value(layer.input)))
    }

    /// Runs the dense model over the samples of `source` and writes its outputs to `files`. With `frozen`, also fills
    /// the store with that stream and returns its samples; `running` must come from [`TeacherTargets::running`] with the same
    /// `frozen`. An empty `task` shows no progress.
    ///
    /// Errors: those of the samples and runs; `Error::Interrupted`. Nothing is stored then.
    pub fn fill(
        &self,
        source: &dyn Source,
        files: &TargetFiles,
        frozen: Option<(Frozen, &RowStore)>,
        running: &mut Running<'_>,
        task: &str,
        cancel: &Cancel,
    ) -> Result<Option<(TrainingSet, LeftOut)>> {
        let settings = self.request.settings;
        let places = self.outputs(frozen.map(|(frozen, _)| frozen));
        let mut filling = frozen.map(|(_, store)| store.begin()).transpose()?;
        let writers = files.streams.iter().map(|path| RowsWriter::create(path, STREAMS));
        let mut streams = writers.collect::<Result<Vec<_>>>()?;
        let answers = files.answers.as_ref().map(|(path, k)| Ok((RowsWriter::create(path, ANSWERS)?, *k)));
        let mut answers = answers.transpose()?;
        let tokens_per_run = match (places.answers, self.head_input) {
            (Some(_), None) => self.logit_rows(),
            _ => usize::MAX,
        };
        let temperature = settings.kd.temperature;
        let max_tokens = settings.data.max_tokens as usize;
        let Running { body, head } = running;
        let left_out = each_round(source, task, body, max_tokens, cancel, &mut |round, model| {
            let kept = frozen_part::outputs(round, model, tokens_per_run, |sample, outputs| {
                let example = &sample.example;
                Ok(SampleOutputs {
                    streams: places.points.iter().map(|&place| outputs[place].to_vec()).collect(),
                    answers: places.answers.map_or(Vec::new(), |place| at_answers(outputs[place], example)),
                    frozen: places.frozen.map(|place| outputs[place].to_vec()),
                })
            })?;
            if let (Some((writer, k)), Some(place)) = (&mut answers, places.answers) {
                let rows: Vec<f32> = kept.iter().flat_map(|kept| &kept.answers).copied().collect();
                let count: usize = round.iter().map(|sample| sample.example.answers).sum();
                let distributions = match self.head_input {
                    Some(input) => {
                        let head = match &mut *head {
                            Some(head) => head,
                            empty => empty.insert(self.head(input, model, place)?),
                        };
                        self.likeliest_of(head, &rows, count, *k, temperature)?
                    }
                    None => likeliest(&rows, count, *k, temperature),
                };
                writer.push(&distributions, count)?;
            }
            for (kept, sample) in kept.into_iter().zip(round.drain(..)) {
                for (writer, stream) in streams.iter_mut().zip(&kept.streams) {
                    writer.push(stream, sample.example.length)?;
                }
                if let Some(filling) = &mut filling {
                    filling.push(kept.frozen.as_ref().unwrap_or(&sample.embedded.data), &sample)?;
                }
            }
            Ok(())
        })?;
        // The store is finished first: without samples, its error is clearer than those of the writers.
        let filled = filling.map(|filling| filling.finish(left_out)).transpose()?;
        for writer in streams.into_iter().chain(answers.map(|(writer, _)| writer)) {
            writer.finish()?;
        }
        Ok(filled)
    }

    /// Lets go of the pages of the dense model's file. They are read again when the model is loaded again.
    pub fn release(&self) {
        self.analysis.model.graph.body.initializers.iter().for_each(|(_, tensor)| tensor.release());
    }

    /// Limit on the rows of logits that one run computes.
    fn logit_rows(&self) -> usize {
        self.vocabulary.map_or(1, |vocabulary| (LOGIT_BYTES as usize / (4 * vocabulary.max(1))).max(1))
    }

    /// The head as a separate session. Its input is output number `place` of `body`.
    fn head(&self, input: ValueId, body: &VlmSession, place: usize) -> Result<Session> {
        let mut model = self.analysis.model.clone();
        let port = body.decoder().session().outputs().get(place);
        let port = port.ok_or_else(|| Error::invalid("the dense model's head", "reads what its layers do not give"))?;
        let shape = vec![Dim::Known(1), Dim::Unknown, port.shape.last().cloned().unwrap_or(Dim::Unknown)];
        model.graph.values[input.index()].ty = Some(ValueType::Tensor { dtype: port.dtype, shape: Some(shape) });
        let part = extract(&model, &[input], &[self.analysis.map.result])?;
        Runtime::new(self.request.device)?.session_of(&part, &self.options())
    }

    fn options(&self) -> SessionOptions {
        SessionOptions { memory_limit: self.request.memory_limit, ..SessionOptions::default() }
    }

    /// [`top_k`] of each of `count` rows of the head's input, `[count, 2 * k]`.
    fn likeliest_of(
        &self,
        head: &mut Session,
        rows: &[f32],
        count: usize,
        k: usize,
        temperature: f64,
    ) -> Result<Vec<f32>> {
        let width = rows.len() / count.max(1);
        let (name, dtype) = match head.inputs() {
            [port] => (port.name.clone(), port.dtype),
            ports => {
                let names: Vec<&str> = ports.iter().map(|port| port.name.as_str()).collect();
                return Err(Error::unsupported("the dense model's head", format!("reads {}", names.join(", "))));
            }
        };
        let mut found = Vec::with_capacity(2 * k * count);
        for rows in rows.chunks(width.max(1) * self.logit_rows()) {
            let count = rows.len() / width.max(1);
            let tensor = TensorValue::from_f32(dtype, &[1, count, width], rows.to_vec())?;
            let outputs = head.run(&[(&name, &tensor)], None)?;
            for (_, logits) in outputs.iter() {
                found.extend(likeliest(&logits.to_f32()?, count, k, temperature));
            }
        }
        Ok(found)
    }

    /// The dense model's stream at a point: the input of a layer, or the output of the last one.
    fn stream_before(&self, point: &Point) -> ValueId {
        let layers = &self.analysis.map.layers;
        layers.get(point.dense).map_or(layers[layers.len() - 1].output, |layer| layer.input)
    }

    /// The dense model, reduced to the nodes that compute `outputs`.
    fn session(&self, outputs: &[ValueId]) -> Result<VlmSession> {
        let TeacherRequest { teacher, device, features, .. } = &self.request;
        let part = extract(&self.analysis.model, &[], outputs)?;
        let runtime = Runtime::new(*device)?;
        let options = self.options();
        let head_dim = teacher.bundle.config().and_then(|config| config.head_size());
        let decoder = Decoder::prefill_only(runtime.session_of(&part, &options)?, head_dim)?;
        let mut session = VlmSession::with_decoder(&runtime, teacher.bundle, decoder, &options, features)?;
        if self.request.connector {
            session.keep_unprojected();
        }
        Ok(session)
    }

    /// The dense model's stream that the student's stream after each of `layers` is compared with, for the samples
    /// `numbers`. `layers` are counted from the first trained one. Returns, per layer, rows in bf16 by sample number.
    /// Nothing is written to disk.
    ///
    /// Errors: `Error::Invalid` when a layer has no point; those of the samples and runs; `Error::Interrupted`.
    pub fn rows_behind(
        &self,
        layers: &[usize],
        numbers: &[u64],
        cancel: &Cancel,
    ) -> Result<Vec<BTreeMap<u64, Vec<u8>>>> {
        let first = self.request.first;
        let mut outputs: Vec<ValueId> = Vec::new();
        let mut places = Vec::with_capacity(layers.len());
        for layer in layers {
            let mut points = self.points.iter().chain(&self.fit_points);
            let point = points
                .find(|point| point.student == first + layer + 1)
                .ok_or_else(|| Error::invalid("the fit", format!("has no target behind layer {layer}")))?;
            places.push(place_in(&mut outputs, self.stream_before(point)));
        }
        let mut numbers = numbers.to_vec();
        numbers.sort_unstable();
        let chosen = Chosen { source: self.request.source, numbers };
        let mut found: Vec<BTreeMap<u64, Vec<u8>>> = layers.iter().map(|_| BTreeMap::new()).collect();
        let mut model = LazySession::new(|| self.session(&outputs));
        each_round(&chosen, "dense model", &mut model, usize::MAX, cancel, &mut |round, model| {
            let kept = frozen_part::outputs(round, model, usize::MAX, |_, outputs| {
                Ok(places.iter().map(|&place| STREAMS.bytes_of(outputs[place])).collect::<Vec<_>>())
            })?;
            for (streams, sample) in kept.into_iter().zip(round.drain(..)) {
                for (by_sample, stream) in found.iter_mut().zip(streams) {
                    by_sample.insert(sample.example.number, stream);
                }
            }
            Ok(())
        })?;
        drop(model);
        self.release();
        Ok(found)
    }

    /// The stored outputs for these examples.
    ///
    /// Errors: `Error::Invalid` when the width of the stream differs from the pruned model's, or a file is damaged;
    /// `Error::Io`.
    pub fn open(&self, files: &TargetFiles, examples: &[Example], hidden_size: usize) -> Result<Targets> {
        if let Some(other) = last_size(&self.analysis, self.analysis.map.source).filter(|&other| other != hidden_size) {
            let path = self.request.teacher.bundle.root().display();
            let problem = format!("its hidden size is {other}, the pruned model's {hidden_size}");
            return Err(Error::invalid(format!("teacher `{path}`"), problem)
                .remedy("name the model that was pruned as teacher"));
        }
        let first = self.request.first;
        let streams = self.points.iter().zip(&files.streams).map(|(point, path)| {
            let rows = RowsFile::open(path, total_tokens(examples), hidden_size, STREAMS)?;
            Ok(StreamTarget { rows, point: point.student - first })
        });
        let answers = files.answers.as_ref().map(|(path, k)| {
            let count = examples.iter().map(|example| example.answers as u64).sum();
            RowsFile::open(path, count, 2 * k, ANSWERS)
        });
        Ok(Targets { streams: streams.collect::<Result<_>>()?, answers: answers.transpose()? })
    }
}

/// Position of a value in `values`. A missing value is appended.
fn place_in(values: &mut Vec<ValueId>, id: ValueId) -> usize {
    values.iter().position(|&other| other == id).unwrap_or_else(|| {
        values.push(id);
        values.len() - 1
    })
}

/// Outputs of a run of the dense model, with their positions in `values`.
struct Outputs {
    values: Vec<ValueId>,
    /// Position of the stream at each point.
    points: Vec<usize>,
    /// Position of the pruned model's residual stream before its first trained layer.
    frozen: Option<usize>,
    /// Position of the head's input, or of the logits.
    answers: Option<usize>,
}

/// A subset of the samples of a source.
pub struct Chosen<'a> {
    pub source: &'a dyn Source,
    /// Indices of the samples in the source, ascending.
    pub numbers: Vec<u64>,
}

impl Source for Chosen<'_> {
    fn digest(&self) -> Result<Sha256Digest> {
        sha256_json(&(self.source.digest()?, &self.numbers))
    }

    fn count(&self) -> u64 {
        self.numbers.len() as u64
    }

    fn samples(&self) -> Result<Box<dyn Iterator<Item = Result<TrainingSample>> + '_>> {
        self.source.some(&self.numbers)
    }
}

/// Size of the last axis of a value, when the graph fixes it.
fn last_size(analysis: &Analysis, id: ValueId) -> Option<usize> {
    match analysis.model.graph.value(id).ty.as_ref()?.shape()?.last()? {
        Dim::Known(size) => usize::try_from(*size).ok(),
        Dim::Symbol(_) | Dim::Unknown => None,
    }
}

/// Rows at the positions that predict an answer; `rows` has one per token.
fn at_answers(rows: &[f32], example: &Example) -> Vec<f32> {
    let width = rows.len() / example.length.max(1);
    let row = |&position: &u32| &rows[position as usize * width..][..width];
    example.detail().positions.iter().flat_map(row).copied().collect()
}

/// [`top_k`] of each of `count` rows of logits, on all cores.
fn likeliest(logits: &[f32], count: usize, k: usize, temperature: f64) -> Vec<f32> {
    let width = (logits.len() / count.max(1)).max(1);
    let share = count.div_ceil(thread_count()).max(1);
    std::thread::scope(|scope| {
        let shares = logits.chunks(share * width);
        let of =
            move |share: &[f32]| share.chunks(width).flat_map(|row| top_k(row, k, temperature)).collect::<Vec<_>>();
        let running: Vec<_> = shares.map(|share| scope.spawn(move || of(share))).collect();
        let joined = running.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        joined.flatten().collect()
    })
}

/// The `k` largest log-probabilities at a temperature, in descending order, then their token ids. Token ids below 2^24
/// are exact as f32; every vocabulary is smaller than that.
fn top_k(logits: &[f32], k: usize, temperature: f64) -> Vec<f32> {
    let scaled = |logit: f32| f64::from(logit) / temperature;
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&logit| (scaled(logit) - scaled(largest)).exp()).sum();
    let log_total = scaled(largest) + total.ln();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let descending = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
    if k < order.len() {
        order.select_nth_unstable_by(k, descending);
        order.truncate(k);
    }
    order.sort_unstable_by(descending);
    let log_probs = order.iter().map(|&token| (scaled(logits[token]) - log_total) as f32);
    let tokens = order.iter().map(|&token| token as f32);
    log_probs.chain(tokens).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_k_lists_the_likeliest_tokens_with_their_log_probabilities() {
        let row = top_k(&[0.0, 3.0, -1.0, 2.0], 2, 1.0);
        let total: f64 = [0.0f64, 3.0, -1.0, 2.0].iter().map(|z| z.exp()).sum();
        let want = [3.0 - total.ln(), 2.0 - total.ln(), 1.0, 3.0];
        for (found, want) in row.iter().zip(want) {
            assert!((f64::from(*found) - want).abs() < 1e-6, "{row:?}");
        }
    }
}
