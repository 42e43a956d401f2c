//! The frozen part before the first trained layer: a graph of its own, run once per sample in ONNX Runtime, its output
//! kept on disk.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::analysis::LayerMap;
use crate::base::{Cancel, Error, Progress, Result, Sha256Digest, read_json, write_json};
use crate::ir::{GraphIndex, Model, Node, ValueId, captured};
use crate::runtime::{Prompt, Step, StepTokens, VlmSession};

use super::batch::{Example, TrainingSet, total_tokens};
use super::cache::{Rows, RowsWriter};
use super::source::{Sample, Source};

const SCHEMA_VERSION: u32 = 1;
/// Samples and tokens that go through the frozen part in one round.
const SAMPLES_PER_ROUND: usize = 32;
const TOKENS_PER_ROUND: usize = 16_384;

/// Samples that were not trained on, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LeftOut {
    /// Longer than `max_tokens`.
    pub too_long: u64,
    /// Without an answer token.
    pub without_answer: u64,
}

/// What stands beside the rows: whose rows they are.
#[derive(Debug, Serialize, Deserialize)]
struct Index {
    schema_version: u32,
    width: usize,
    left_out: LeftOut,
    examples: Vec<Example>,
}

/// The graph up to a point of the residual stream, with the cache outputs of the layers in it. A cache input of a later
/// layer that is still read (for its shape) goes out again as it came in, so that every cache stays a pair.
///
/// Errors: `Error::Invalid` when nothing in the graph makes the value.
pub fn prefix_model(model: &Model, map: &LayerMap, stream: ValueId) -> Result<Model> {
    let index = GraphIndex::new(&model.graph);
    let mut prefix = model.clone();
    let body = &mut prefix.graph.body;
    let mut needed = HashSet::new();
    let mut read = HashSet::from([stream]);
    let mut pending = vec![stream];
    while let Some(id) = pending.pop() {
        let Some((number, _)) = index.node_of(id) else { continue };
        if needed.insert(number) {
            let node = &model.graph.body.nodes[number];
            let reads = node.present_inputs().chain(node.bodies().flat_map(captured));
            pending.extend(reads.inspect(|&id| {
                read.insert(id);
            }));
        }
    }
    if needed.is_empty() {
        return Err(Error::invalid(
            format!("value `{}`", model.graph.name(stream)),
            "is made by no node, so there is no frozen part before it",
        ));
    }
    let made = |id: &ValueId| index.node_of(*id).is_some_and(|(number, _)| needed.contains(&number));
    let caches: Vec<ValueId> = body.outputs.iter().copied().filter(|id| *id != stream && made(id)).collect();
    body.outputs = std::iter::once(stream).chain(caches).collect();
    body.inputs.retain(|id| read.contains(id));
    let loose: Vec<(ValueId, ValueId)> = map
        .layers
        .iter()
        .flat_map(|layer| &layer.ports)
        .filter_map(|port| port.past.zip(port.present))
        .filter(|(past, present)| body.inputs.contains(past) && !made(present))
        .collect();
    body.initializers.retain(|(id, _)| read.contains(id));
    let mut number = 0;
    body.nodes.retain(|_| {
        number += 1;
        needed.contains(&(number - 1))
    });
    for (past, present) in loose {
        let name = format!("{}/unchanged", model.graph.name(present));
        let (inputs, outputs) = (vec![Some(past)], vec![Some(present)]);
        body.nodes.push(Node { name, op_type: "Identity".into(), inputs, outputs, ..Node::default() });
        body.outputs.push(present);
    }
    crate::ir::check(&prefix)?;
    Ok(prefix)
}

/// Where the rows of one key are kept.
pub struct Store {
    index: PathBuf,
    rows: PathBuf,
}

impl Store {
    /// `key` is the digest of everything that decides the rows.
    pub fn new(folder: &Path, key: &Sha256Digest) -> Self {
        let name = |extension: &str| folder.join(format!("hidden-{}.{extension}", &key[..16.min(key.len())]));
        Store { index: name("json"), rows: name("f32") }
    }

    /// What an earlier run left, if it is complete.
    ///
    /// Errors: `Error::Invalid` when it is damaged.
    pub fn open(&self) -> Result<Option<(TrainingSet, LeftOut)>> {
        if !self.index.exists() {
            return Ok(None);
        }
        let Index { width, left_out, examples, .. } = read_json(&self.index, SCHEMA_VERSION)?;
        let rows = Rows::open(&self.rows, total_tokens(&examples), width)?;
        Ok(Some((TrainingSet::new(examples, rows), left_out)))
    }

    /// Runs the frozen part over all samples and keeps what it gives. `frozen` embeds prompts, and its decoder is the
    /// prefix; `None` takes the embeddings themselves, when the first layer is trained.
    ///
    /// Errors: whatever a sample or a run fails with; `Error::Interrupted`; nothing is kept then.
    pub fn fill(
        &self,
        source: &dyn Source,
        frozen: &mut VlmSession,
        embeds_only: bool,
        max_tokens: usize,
        cancel: &Cancel,
    ) -> Result<(TrainingSet, LeftOut)> {
        let progress = Progress::new("frozen part", "samples", source.count());
        let mut samples = source.samples()?;
        let mut left_out = LeftOut::default();
        let mut examples = Vec::new();
        let mut writer: Option<RowsWriter> = None;
        let mut width = 0;
        let mut round: Vec<(Sample, Example)> = Vec::new();
        let mut tokens = 0;
        loop {
            cancel.check("nothing of the frozen part is kept")?;
            let next = samples.next().transpose()?;
            let ended = next.is_none();
            if let Some(sample) = next {
                progress.advance(1);
                let example = Example::new(sample.id.clone(), &sample.prompt.input_ids, &sample.answer_mask)?;
                if example.length > max_tokens {
                    left_out.too_long += 1;
                } else if example.targets.is_empty() {
                    left_out.without_answer += 1;
                } else {
                    tokens += example.length;
                    round.push((sample, example));
                }
            }
            if round.len() >= SAMPLES_PER_ROUND || tokens >= TOKENS_PER_ROUND || (ended && !round.is_empty()) {
                let hidden = run_round(&mut round, frozen, embeds_only)?;
                for (numbers, (_, example)) in hidden.into_iter().zip(round.drain(..)) {
                    width = numbers.len() / example.length.max(1);
                    if writer.is_none() {
                        writer = Some(RowsWriter::create(&self.rows, width)?);
                    }
                    if let Some(writer) = &mut writer {
                        writer.push(&numbers)?;
                    }
                    examples.push(example);
                }
                tokens = 0;
            }
            if ended {
                break;
            }
        }
        let Some(writer) = writer else {
            return Err(Error::invalid(
                "training data",
                format!(
                    "holds no sample to train on: {} too long, {} without an answer",
                    left_out.too_long, left_out.without_answer
                ),
            )
            .remedy("look at the data, or raise `max_tokens`"));
        };
        let rows = writer.finish()?;
        let rows = Rows::open(&self.rows, rows, width)?;
        write_json(
            &self.index,
            &Index { schema_version: SCHEMA_VERSION, width, left_out, examples: examples.clone() },
        )?;
        Ok((TrainingSet::new(examples, rows), left_out))
    }
}

/// The frozen part's rows for each sample of a round.
fn run_round(round: &mut [(Sample, Example)], frozen: &mut VlmSession, embeds_only: bool) -> Result<Vec<Vec<f32>>> {
    let prompts: Vec<Prompt> = round.iter().map(|(sample, _)| sample.prompt.clone()).collect();
    let embedded = frozen.embed_all(&prompts)?;
    let rows = frozen.decoder().position_rows();
    for ((_, example), embedded) in round.iter_mut().zip(&embedded) {
        if rows > 1 {
            example.rotary = embedded.positions.clone();
        }
    }
    if embeds_only {
        return Ok(embedded.into_iter().map(|embedded| embedded.data).collect());
    }
    let mut order: Vec<usize> = (0..round.len()).collect();
    order.sort_by_key(|&number| round[number].1.length);
    let mut results: Vec<Vec<f32>> = vec![Vec::new(); round.len()];
    // Equal lengths together: no padding, so that no row depends on how samples fell into rounds.
    for group in order.chunk_by(|&a, &b| round[a].1.length == round[b].1.length) {
        let time = round[group[0]].1.length;
        let (mut data, mut ids, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for &number in group {
            data.extend_from_slice(&embedded[number].data);
            ids.extend_from_slice(&prompts[number].input_ids);
        }
        for row in 0..rows {
            for &number in group {
                positions.extend_from_slice(embedded[number].positions.get(row).map_or(&[], Vec::as_slice));
            }
        }
        let mask = vec![1; group.len() * time];
        let hidden_size = embedded[group[0]].hidden_size;
        let tokens = if frozen.decoder().takes_embeds() {
            StepTokens::Embeds { data: &data, hidden_size }
        } else {
            StepTokens::Ids(&ids)
        };
        let step = Step {
            batch: group.len(),
            tokens,
            attention_mask: &mask,
            position_ids: &positions,
            position_rows: rows,
            last_only: false,
        };
        let (hidden, _) = frozen.decoder_mut().step(&step, None)?;
        let numbers = hidden.to_f32()?;
        let each = numbers.len() / group.len();
        if each * group.len() != numbers.len() || !each.is_multiple_of(time) {
            return Err(Error::invalid(
                "the frozen part",
                format!("gave shape {:?} for {} samples of {time} tokens", hidden.shape(), group.len()),
            ));
        }
        for (&number, numbers) in group.iter().zip(numbers.chunks_exact(each)) {
            results[number] = numbers.to_vec();
        }
    }
    Ok(results)
}
