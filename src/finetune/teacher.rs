//! The dense model as teacher: its residual stream and its answers, computed once in ONNX Runtime and kept on disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::analysis::analyse;
use crate::base::{Cancel, Device, Error, Result, Sha256Digest, sha256_json};
use crate::bundle::{Bundle, Role};
use crate::ir::{Dim, ValueId};
use crate::rewrite::extract;
use crate::runtime::{Decoder, FeatureCache, Runtime, SessionOptions, VlmSession};

use super::batch::{Example, StreamTargets, Targets, total_tokens};
use super::cache::{Element, Rows, RowsWriter};
use super::loss::LossKind;
use super::prefix::{each_round, embed, outputs};
use super::settings::Settings;
use super::source::Source;

/// Bytes of logits that one run may give.
const LOGIT_BYTES: usize = 256 << 20;

/// The dense model and how its layers and the pruned model's correspond.
pub struct Teacher<'a> {
    pub bundle: &'a Bundle,
    /// For each layer of the pruned model its index in the dense one.
    pub kept: &'a [usize],
    /// The frozen layers that close a triplet, as the pruned model counts them.
    pub anchors: &'a [usize],
}

/// A point of the residual stream: before the student's layer of this number, and the dense layer before which the
/// teacher's stream is to be matched; the number of layers stands for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Point {
    student: usize,
    dense: usize,
}

/// The points that the anchor term compares, ascending: behind every trained layer, which is before the anchor where it
/// has one, and behind every anchor. So every trained layer has a target of its own.
pub fn anchor_points(anchors: &[usize], trained: &[usize]) -> Vec<usize> {
    let first = trained.iter().copied().min().unwrap_or(0);
    let behind = trained.iter().chain(anchors.iter().filter(|&&anchor| anchor > first));
    let mut points: Vec<usize> = behind.map(|&layer| layer + 1).collect();
    points.sort_unstable();
    points.dedup();
    points
}

/// The points that the stream terms compare, ascending.
///
/// A finetuned layer answers for what was dropped behind it, so the stream after it is matched with the dense stream
/// before the next layer that was kept; the stream after a frozen layer with the dense stream after that same layer.
fn points(
    kept: &[usize],
    anchors: &[usize],
    trained: &[usize],
    dense_layers: usize,
    settings: &Settings,
) -> Vec<Point> {
    let layers = kept.len();
    let first = trained.iter().copied().min().unwrap_or(0);
    let dense_of = |student: usize| match student {
        0 => 0,
        _ if trained.contains(&(student - 1)) => kept.get(student).copied().unwrap_or(dense_layers),
        _ => kept[student - 1] + 1,
    };
    let mut students: Vec<usize> = Vec::new();
    if settings.weight(LossKind::Hidden) > 0.0 {
        students.extend(first + 1..=layers);
    }
    if settings.weight(LossKind::Anchor) > 0.0 {
        students.extend(anchor_points(anchors, trained));
    }
    if settings.fit {
        students.extend(trained.iter().map(|&layer| layer + 1));
    }
    students.sort_unstable();
    students.dedup();
    students.into_iter().map(|student| Point { student, dense: dense_of(student) }).collect()
}

/// What a run of the dense model is made of.
pub struct Lesson<'a> {
    pub teacher: &'a Teacher<'a>,
    pub trained: &'a [usize],
    pub source: &'a dyn Source,
    pub data_digest: &'a Sha256Digest,
    pub examples: &'a [Example],
    /// Width of the residual stream.
    pub hidden_size: usize,
    pub settings: &'a Settings,
    pub device: Device,
    pub work: &'a Path,
    pub features: &'a Arc<FeatureCache>,
}

/// Where one kind of target is kept and how wide its rows are.
struct Kept {
    path: PathBuf,
    rows: u64,
    width: usize,
    element: Element,
}

impl Kept {
    fn open(&self) -> Result<Option<Rows>> {
        if !self.path.exists() {
            return Ok(None);
        }
        Rows::open(&self.path, self.rows, self.width, self.element).map(Some)
    }
}

impl Lesson<'_> {
    /// The dense model's targets for every example, from disk where an earlier run left them.
    ///
    /// Errors: `Error::Invalid` when dense and pruned model do not belong together; `Error::Engine`; `Error::Interrupted`.
    pub fn targets(&self, cancel: &Cancel) -> Result<Targets> {
        let path = self.teacher.bundle.path_of(self.teacher.bundle.require(Role::Decoder)?);
        let analysis = analyse(&crate::onnx::load(&path)?)?;
        let graph = &analysis.model.graph;
        let layers = &analysis.map.layers;
        if self.teacher.kept.iter().any(|&layer| layer >= layers.len()) {
            let problem = format!("has {} layers, the pruned model kept layers {:?}", layers.len(), self.teacher.kept);
            return Err(Error::invalid(format!("teacher `{}`", path.display()), problem)
                .remedy("name the model that was pruned as teacher"));
        }
        let points = points(self.teacher.kept, self.teacher.anchors, self.trained, layers.len(), self.settings);
        let wants_logits = self.settings.weight(LossKind::Kd) > 0.0;
        let digest = self.teacher.bundle.digest()?;

        let last = |id: ValueId| match graph.value(id).ty.as_ref().and_then(|ty| ty.shape()).and_then(<[Dim]>::last) {
            Some(Dim::Known(size)) => usize::try_from(*size).ok(),
            _ => None,
        };
        let vocabulary = last(analysis.map.result);
        let hidden = self.hidden_size;
        if let Some(other) = last(analysis.map.source).filter(|&other| other != hidden) {
            let problem = format!("its hidden size is {other}, the pruned model's {hidden}");
            return Err(Error::invalid(format!("teacher `{}`", path.display()), problem)
                .remedy("name the model that was pruned as teacher"));
        }
        let streams: Vec<ValueId> = points
            .iter()
            .map(|point| layers.get(point.dense).map_or(layers[layers.len() - 1].output, |l| l.input))
            .collect();
        let k = (self.settings.kd_top_k as usize).min(vocabulary.unwrap_or(usize::MAX));
        let kept_streams = (!points.is_empty()).then(|| {
            let key =
                sha256_json(&("streams", &digest, self.data_digest, self.settings.max_tokens, dense_points(&points)));
            key.map(|key| self.kept("streams", &key, total_tokens(self.examples), hidden * points.len(), Element::Bf16))
        });
        let kept_streams = kept_streams.transpose()?;
        let kept_answers = wants_logits.then(|| {
            let temperature = self.settings.kd_temperature;
            let key = sha256_json(&("answers", &digest, self.data_digest, self.settings.max_tokens, temperature, k));
            let answers = self.examples.iter().map(|example| example.targets.len() as u64).sum();
            key.map(|key| self.kept("answers", &key, answers, 2 * k, Element::F32))
        });
        let kept_answers = kept_answers.transpose()?;

        let lacks = |kept: &Option<Kept>| kept.as_ref().is_some_and(|kept| !kept.path.exists());
        if lacks(&kept_streams) || lacks(&kept_answers) {
            // One value may be wanted at two points; a graph gives it once.
            let mut outputs: Vec<ValueId> = Vec::new();
            let mut places = Vec::with_capacity(streams.len());
            for &id in &streams {
                let place = outputs.iter().position(|&other| other == id).unwrap_or(outputs.len());
                if place == outputs.len() {
                    outputs.push(id);
                }
                places.push(place);
            }
            if wants_logits {
                outputs.push(analysis.map.result);
            }
            let part = extract(&analysis.model, &[], &outputs)?;
            self.fill(&part, &places, kept_streams.as_ref(), kept_answers.as_ref(), vocabulary, cancel)?;
        }
        let first = self.trained.iter().copied().min().unwrap_or(0);
        let points = points.iter().map(|point| point.student - first).collect();
        let streams = kept_streams.map(|kept| kept.open()).transpose()?.flatten();
        let answers = kept_answers.map(|kept| kept.open()).transpose()?.flatten();
        Ok(Targets { streams: streams.map(|rows| StreamTargets { rows, points }), answers })
    }

    fn kept(&self, what: &str, key: &Sha256Digest, rows: u64, width: usize, element: Element) -> Kept {
        let path = self.work.join(format!("{what}-{}.{}", &key[..16.min(key.len())], element.extension()));
        Kept { path, rows, width, element }
    }

    fn fill(
        &self,
        part: &crate::ir::Model,
        places: &[usize],
        streams: Option<&Kept>,
        answers: Option<&Kept>,
        vocabulary: Option<usize>,
        cancel: &Cancel,
    ) -> Result<()> {
        let bundle = self.teacher.bundle;
        let runtime = Runtime::new(self.device)?;
        let options = SessionOptions::default();
        let head_dim = bundle.config().and_then(|config| config.head_size());
        let decoder = Decoder::prefill_only(runtime.session_of(part, &options)?, head_dim)?;
        let mut model = VlmSession::with_decoder(&runtime, bundle, decoder, &options, self.features)?;
        let create = |kept: &Kept| RowsWriter::create(&kept.path, kept.width, kept.element);
        let mut streams = streams.map(create).transpose()?;
        let mut answers = answers.map(create).transpose()?;
        let tokens_per_run = match (&answers, vocabulary) {
            (Some(_), Some(vocabulary)) => LOGIT_BYTES / (4 * vocabulary.max(1)),
            (Some(_), None) => 1,
            (None, _) => usize::MAX,
        };
        let max_tokens = self.settings.max_tokens as usize;
        let temperature = self.settings.kd_temperature;
        each_round(self.source, "dense model", max_tokens, cancel, &mut |mut round| {
            let embedded = embed(&mut round, &mut model)?;
            for (outputs, (_, example)) in outputs(&round, &embedded, &mut model, tokens_per_run)?.iter().zip(&round) {
                if let Some(writer) = &mut streams {
                    let points: Vec<&[f32]> = places.iter().map(|&place| outputs[place].as_slice()).collect();
                    writer.push(&side_by_side(&points, example.length))?;
                }
                if let (Some(writer), Some(logits)) = (&mut answers, outputs.last()) {
                    let width = logits.len() / example.length.max(1);
                    for &position in &example.positions {
                        let row = &logits[position as usize * width..][..width];
                        writer.push(&top_k(row, writer.width() / 2, temperature))?;
                    }
                }
            }
            Ok(())
        })?;
        for writer in [streams, answers].into_iter().flatten() {
            writer.finish()?;
        }
        Ok(())
    }
}

fn dense_points(points: &[Point]) -> Vec<usize> {
    points.iter().map(|point| point.dense).collect()
}

/// Rows of several matrices of `rows` rows, joined row by row.
fn side_by_side(points: &[&[f32]], rows: usize) -> Vec<f32> {
    let mut joined = Vec::with_capacity(points.iter().map(|numbers| numbers.len()).sum());
    for row in 0..rows {
        for numbers in points {
            let width = numbers.len() / rows;
            joined.extend_from_slice(&numbers[row * width..][..width]);
        }
    }
    joined
}

/// The `k` largest log-probabilities at a temperature, then the tokens that they are of; token ids below 2^24 are exact
/// as f32, which every vocabulary is.
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
    fn the_likeliest_tokens_come_first_with_their_log_probabilities() {
        let row = top_k(&[0.0, 3.0, -1.0, 2.0], 2, 1.0);
        let total: f64 = [0.0f64, 3.0, -1.0, 2.0].iter().map(|z| z.exp()).sum();
        let want = [3.0 - total.ln(), 2.0 - total.ln(), 1.0, 3.0];
        for (found, want) in row.iter().zip(want) {
            assert!((f64::from(*found) - want).abs() < 1e-6, "{row:?}");
        }
    }

    #[test]
    fn matrices_are_joined_row_by_row() {
        assert_eq!(side_by_side(&[&[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0]], 2), [1.0, 2.0, 5.0, 3.0, 4.0, 6.0]);
    }

    /// Eight dense layers; 2 dropped and 3 trained with anchor 4, 6 dropped and 5 trained with anchor 7.
    #[test]
    fn points_of_the_stream_correspond() {
        let kept = [0, 1, 3, 4, 5, 7];
        let with = |kind: LossKind| Settings { losses: [(kind, 1.0)].into(), ..Settings::default() };
        let pairs = |kind, anchors: &[usize]| -> Vec<(usize, usize)> {
            let points = points(&kept, anchors, &[2, 4], 8, &with(kind));
            points.iter().map(|point| (point.student, point.dense)).collect()
        };
        assert_eq!(pairs(LossKind::Anchor, &[3, 5]), [(3, 4), (4, 5), (5, 7), (6, 8)]);
        assert_eq!(pairs(LossKind::Hidden, &[3, 5]), [(3, 4), (4, 5), (5, 7), (6, 8)]);
        assert_eq!(pairs(LossKind::Anchor, &[]), [(3, 4), (5, 7)]);
    }
}
