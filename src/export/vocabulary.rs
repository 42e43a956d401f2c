//! A model whose head has the tokens of one domain: `export --vocabulary`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Cancel, Error, Progress, Provenance, Result, list_preview};
use crate::bundle::{Bundle, BundleWriter, Component, Record, RecordedStep, Role};
use crate::data::{Dataset, Encoder, Intake, Processor};
use crate::ir::{Dim, Graph, ValueId, ValueType};
use crate::onnx;
use crate::rewrite::cut_vocabulary;

use super::components::NOTHING;

/// Version of the schema of the report.
pub const VOCABULARY_SCHEMA_VERSION: u32 = 1;
/// File name of the report in the folder with the model.
pub const VOCABULARY_FILE: &str = "interlace-vocabulary.json";

/// `interlace-vocabulary.json`: the tokens that `export --vocabulary` left in the head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VocabularyReport {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Samples of the corpus.
    pub samples: usize,
    /// Different tokens in them.
    pub in_corpus: usize,
    /// Tokens that stay because every text can be written and ended with them; some of them are in the corpus too.
    pub essential: usize,
    /// Tokens that keep their logits.
    pub kept: usize,
    /// Tokens of the head before.
    pub of: usize,
    /// The graphs whose heads were cut.
    pub files: Vec<CutFile>,
}

/// A graph whose head was cut.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CutFile {
    /// Path in the folder.
    pub file: String,
    /// Bytes of the weights before.
    pub weight_bytes_before: u64,
    /// Bytes of the weights now, with the table that puts the logits back.
    pub weight_bytes: u64,
}

/// Writes a copy of a model folder whose head has only the tokens of the corpus and those with which every text can be written and
/// ended. The logits of other tokens are minus infinity. The tokenizer and the embeddings stay as they are.
///
/// Errors: `Error::Unsupported` for a head that is not one float product, and beside other precisions; `Error::Invalid` for a corpus
/// without samples, one that uses all tokens, and a row that cannot be read; as `onnx::load` and `onnx::save`. On an error no folder
/// remains.
pub fn write_vocabulary(bundle: &Bundle, corpus: &Dataset, cancel: &Cancel, output: &Path) -> Result<VocabularyReport> {
    bundle.check_output(output)?;
    let components = heads(bundle)?;
    let essential = Processor::open(bundle)?.essential_ids();
    let (samples, found) = tokens_of(bundle, corpus, cancel)?;
    let mut writer = BundleWriter::create(bundle, output)?;
    let (mut files, mut sizes) = (Vec::new(), (0, 0));
    for component in components {
        let model = onnx::load(&bundle.path_of(component))?;
        let logits = logits_of(&model.graph, &component.file)?;
        let of = width(&model.graph, logits, &component.file)?;
        let kept: Vec<usize> = essential.union(&found).map(|id| *id as usize).filter(|id| *id < of).collect();
        if kept.len() == of {
            return Err(Error::invalid(
                format!("corpus `{}`", corpus.path().display()),
                format!("uses all {of} tokens"),
            )
            .remedy("give texts of one domain, or leave `--vocabulary` out"));
        }
        let cut = cut_vocabulary(&model, logits, &kept)?;
        files.push(CutFile {
            file: component.file.clone(),
            weight_bytes_before: model.graph.body.weight_bytes(),
            weight_bytes: cut.graph.body.weight_bytes(),
        });
        writer.save(component, &cut)?;
        sizes = (kept.len(), of);
    }
    let (kept, of) = sizes;
    writer.push_step(RecordedStep::Vocabulary { kept, of });
    let inputs = BTreeMap::from([("model".to_string(), bundle.digest()?), ("corpus".to_string(), corpus.digest()?)]);
    let settings = serde_json::json!({ "vocabulary": true });
    let report = VocabularyReport {
        provenance: Provenance::new(VOCABULARY_SCHEMA_VERSION, inputs.clone(), &settings)?
            .with_variants("model", bundle.chosen_variants())
            .with_hub("model", bundle.hub_name()),
        samples,
        in_corpus: found.len(),
        essential: essential.len(),
        kept,
        of,
        files,
    };
    writer.add_json(VOCABULARY_FILE, &report)?;
    cancel.check(NOTHING)?;
    writer.commit(Provenance::new(Record::SCHEMA_VERSION, inputs, &settings)?)?;
    Ok(report)
}

/// The components that give the logits.
fn heads(bundle: &Bundle) -> Result<Vec<&Component>> {
    let has_head = bundle.component(Role::LmHead).is_some();
    let gives_logits = |role: Role| if has_head { role == Role::LmHead } else { role.is_decoder() };
    let found: Vec<&Component> = bundle.components().iter().filter(|part| gives_logits(part.role)).collect();
    let mut stems = BTreeSet::new();
    if let Some(other) = found.iter().find(|part| !stems.insert(&part.stem)) {
        return Err(Error::unsupported(
            format!("`{}`", other.file),
            "is a second precision, whose head would stay whole",
        )
        .remedy(
            "name the float graphs with `--variant fp32`, and quantise with `--precision` in the same command where that is wanted",
        ));
    }
    match found.is_empty() {
        true => bundle.require(Role::Decoder).map(|part| vec![part]),
        false => Ok(found),
    }
}

/// Number of samples and the tokens in them.
fn tokens_of(bundle: &Bundle, corpus: &Dataset, cancel: &Cancel) -> Result<(usize, BTreeSet<u32>)> {
    let encoder = Encoder::open(bundle, corpus)?;
    let intake = Intake::new(corpus, bundle, usize::MAX);
    let indices: Vec<usize> = (0..corpus.len()).collect();
    let progress = Progress::new("vocabulary", "samples", indices.len() as u64);
    let (mut samples, mut found) = (0, BTreeSet::new());
    for encoded in intake.encoded(corpus, &indices, |sample| encoder.conversation(sample))? {
        cancel.check(NOTHING)?;
        found.extend(encoded?.input_ids.iter().filter_map(|id| u32::try_from(*id).ok()));
        samples += 1;
        progress.advance(1);
    }
    let left_out = intake.left_out();
    if samples == 0 || left_out.unreadable + left_out.too_long > 0 {
        let why = left_out.summary().unwrap_or_else(|| "no samples".to_string());
        return Err(Error::invalid(
            format!("corpus `{}`", corpus.path().display()),
            format!("is not read whole: {why}"),
        )
        .remedy("mend these rows or take them out; a token that is not seen is never written"));
    }
    Ok((samples, found))
}

fn logits_of(graph: &Graph, file: &str) -> Result<ValueId> {
    let only = match graph.body.outputs.as_slice() {
        [only] => Some(*only),
        _ => None,
    };
    graph.output("logits").or(only).ok_or_else(|| {
        let names: Vec<&str> = graph.body.outputs.iter().map(|id| graph.name(*id)).collect();
        Error::unsupported(format!("`{file}`"), format!("has no output `logits`, found {}", list_preview(&names, 4)))
            .remedy("give a decoder that gives logits")
    })
}

/// Number of tokens of the logits.
fn width(graph: &Graph, logits: ValueId, file: &str) -> Result<usize> {
    let shape = match &graph.value(logits).ty {
        Some(ValueType::Tensor { shape: Some(shape), .. }) => shape.last(),
        _ => None,
    };
    let size = match shape {
        Some(Dim::Known(size)) => usize::try_from(*size).ok(),
        _ => None,
    };
    size.ok_or_else(|| {
        Error::unsupported(format!("`{file}`"), format!("does not declare the width of `{}`", graph.name(logits)))
            .remedy("export the graph with its shapes")
    })
}
