//! Requirements of each verb on a model's decoder, checked before the work begins.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::analysis::{self, Analysis};
use crate::base::{Error, Provenance, Result};
use crate::bundle::{Bundle, Component, RecordedStep, Role, SetAside, variant_flag};
use crate::data::{Dataset, Processor};
use crate::onnx;

/// Kind of work with a model's decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Similarities of layers.
    Score,
    /// Losses without layers, for strategies that select by loss.
    MeasureLosses,
    /// Training with losses on answers.
    FinetuneOnAnswers,
    /// Training with losses on the dense model's stream alone.
    FinetuneOnStream,
    /// Answers to questions.
    Answer,
    /// Perplexity of running text.
    Perplexity,
    /// Times of prefill and cached steps.
    Bench,
}

/// A property of a decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A residual stream with layers.
    Layers,
    /// Logits for every input position.
    EveryPosition,
    /// Cache inputs, so that a step can continue the earlier ones.
    Cache,
    /// A single decoder graph: a second one would keep its old weights.
    OneDecoder,
}

/// Requirements by kind of work.
pub const NEEDS: &[(Work, &[Need])] = &[
    (Work::Score, &[Need::Layers]),
    (Work::MeasureLosses, &[Need::Layers, Need::EveryPosition]),
    (Work::FinetuneOnAnswers, &[Need::OneDecoder, Need::Layers, Need::EveryPosition]),
    (Work::FinetuneOnStream, &[Need::OneDecoder, Need::Layers]),
    (Work::Answer, &[Need::Cache]),
    (Work::Perplexity, &[Need::EveryPosition]),
    (Work::Bench, &[Need::Cache]),
];

impl Work {
    /// The requirements of this work.
    pub fn needs(self) -> &'static [Need] {
        NEEDS.iter().find(|(work, _)| *work == self).map_or(&[], |(_, needs)| needs)
    }

    fn name(self) -> &'static str {
        match self {
            Work::Score => "scoring layers",
            Work::MeasureLosses => "measuring losses without layers",
            Work::FinetuneOnAnswers | Work::FinetuneOnStream => "finetuning",
            Work::Answer => "answering questions",
            Work::Perplexity => "perplexity",
            Work::Bench => "measuring speed",
        }
    }
}

/// Rejects a model that does not meet the requirements of the work.
///
/// Errors: `Error::Unsupported` naming the component, its property and the requirement; as `onnx::load`.
pub fn check(bundle: &Bundle, work: Work) -> Result<()> {
    let component = bundle.require(Role::Decoder)?;
    if work.needs().contains(&Need::OneDecoder) {
        check_single_decoder(bundle, component)?;
    }
    match analysis::analyse(&onnx::load(&bundle.path_of(component))?) {
        Ok(analysis) => check_analysed(bundle, work, &analysis),
        Err(error) if work.needs().contains(&Need::Layers) => Err(error),
        // Without layers no further requirement can be checked; the engine reports its own.
        Err(_) => Ok(()),
    }
}

/// [`check`] with the analysed decoder.
fn check_analysed(bundle: &Bundle, work: Work, analysis: &Analysis) -> Result<()> {
    let component = bundle.require(Role::Decoder)?;
    if work.needs().contains(&Need::OneDecoder) {
        check_single_decoder(bundle, component)?;
    }
    for need in work.needs() {
        if let Some((problem, remedy)) = unmet(analysis, *need) {
            return Err(Error::unsupported(
                format!("`{}`", bundle.path_of(component).display()),
                format!("{problem}, and {} needs {}", work.name(), requirement(*need)),
            )
            .remedy(remedy));
        }
    }
    Ok(())
}

/// Whether a verb works on a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// Name of the verb.
    pub verb: String,
    /// False where the verb refuses the model.
    pub works: bool,
    /// Why it refuses the model, or what it works on alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Whether `score`, `prune`, `finetune` and `eval` work on a model, judged by its files: the analysed decoder, the error
/// of its processor, and the reason why no layer can be dropped, if there is one.
pub fn verdicts(
    bundle: &Bundle,
    analysis: &Analysis,
    processor: &Result<Processor>,
    undroppable: Option<String>,
) -> Vec<Verdict> {
    let limit = match processor {
        Ok(processor) => {
            processor.without_template().map(|problem| format!("on running text and ready tensors alone: {problem}"))
        }
        Err(error) => Some(format!("on ready tensors alone: {error}")),
    };
    let refusal = |work| check_analysed(bundle, work, analysis).err().map(|error| error.to_string());
    let verdict = |verb: &str, refusal: Option<String>, limit: Option<String>| Verdict {
        verb: verb.to_string(),
        works: refusal.is_none(),
        reason: refusal.or(limit),
    };
    let finetune = match (refusal(Work::FinetuneOnStream), refusal(Work::FinetuneOnAnswers)) {
        (None, Some(problem)) => {
            let own = format!("with a recipe without a loss on answers, such as `fast`, alone: {problem}");
            verdict("finetune", None, Some(own))
        }
        (refusal, _) => verdict("finetune", refusal, limit.clone()),
    };
    vec![
        verdict("score", refusal(Work::Score), limit.clone()),
        verdict("prune", undroppable, None),
        finetune,
        verdict("eval", refusal(Work::Answer), limit),
    ]
}

/// Warning about a model that is to be finetuned later and has several precision variants of the decoder, those aside that
/// are set aside.
pub fn variants_warning(bundle: &Bundle, set_aside: &[SetAside]) -> Option<String> {
    let files = bundle.variants(Role::Decoder).map(|component| component.file.as_str());
    let mut files = files.filter(|file| !set_aside.iter().any(|variant| variant.file == *file));
    let first = files.next()?;
    let others: Vec<&str> = files.collect();
    (!others.is_empty()).then(|| {
        format!(
            "`finetune` takes the float decoder `{first}` alone: leave out the other variants ({}) with its `--variant`, and \
             quantise the result afterwards",
            others.join(", ")
        )
    })
}

/// The error for a file that was made for another model, with what the file says of its own. `remedy` applies to a model that
/// was never pruned.
pub(super) fn of_another_model(subject: String, made: &Provenance, bundle: &Bundle, remedy: &str) -> Error {
    let (theirs, own) = (made.variants.get("model").map(String::as_str), bundle.chosen_variants());
    // Of one commit on the hub, other variants are other files.
    if let Some(name) = bundle.hub_name()
        && made.hub.get("model") == Some(&name)
        && theirs != own
    {
        let (theirs, own) = (variant_flag(theirs), variant_flag(own));
        return Error::invalid(subject, format!("made for other files of `{name}`: with {theirs}, not with {own}"))
            .remedy(format!("make it anew with {own}, or run this with {theirs}"));
    }
    let history = bundle.record().ok().flatten().map(|record| record.history).unwrap_or_default();
    let pruned = history.iter().any(|step| matches!(step, RecordedStep::Prune { .. }));
    let problem = format!("made for another model than `{}`", bundle.root().display());
    match pruned {
        true => Error::invalid(subject, format!("{problem}, which was pruned already")).remedy("give the dense model"),
        false => Error::invalid(subject, problem).remedy(remedy),
    }
}

/// Warnings about a model, before it reads data.
pub fn warnings(bundle: &Bundle, data: &Path) -> Vec<String> {
    if Dataset::is_tensors(data) {
        return Vec::new();
    }
    Processor::open(bundle).ok().and_then(|processor| processor.warning()).into_iter().collect()
}

/// The requirement in messages.
fn requirement(need: Need) -> &'static str {
    match need {
        Need::Layers => "a residual stream with layers",
        Need::EveryPosition => "the logits of every position",
        Need::Cache => "cached steps",
        Need::OneDecoder => "one decoder graph",
    }
}

/// Problem and remedy, when the decoder does not meet the requirement.
fn unmet(analysis: &Analysis, need: Need) -> Option<(String, &'static str)> {
    match need {
        Need::EveryPosition => Some((
            analysis.picks_positions()?,
            "export the model with the logits of all positions, or with a `num_logits_to_keep` input, or use a \
             strategy that reads only scores, such as `interlace`, and a recipe without a loss on answers, such as \
             `fast`",
        )),
        Need::Cache => {
            let cached = analysis.map.layers.iter().flat_map(|layer| &layer.ports).any(|port| port.past.is_some());
            let remedy = "export the decoder with past key values as inputs";
            (!cached).then(|| ("the graph has no cache inputs".to_string(), remedy))
        }
        Need::Layers | Need::OneDecoder => None,
    }
}

/// Rejects a folder with a second decoder graph.
fn check_single_decoder(bundle: &Bundle, component: &Component) -> Result<()> {
    let is_other = |other: &&Component| other.role.is_decoder() && other.file != component.file;
    let others: Vec<&Component> = bundle.components().iter().filter(is_other).collect();
    if others.is_empty() {
        return Ok(());
    }
    let remedy = match others.iter().all(|other| other.role == component.role) {
        true => format!(
            "leave out the others with `--variant {}={}`, and make the variants from the result",
            component.role.name(),
            component.variant_name()
        ),
        // A choice of variants leaves one graph of each part.
        false => "export the model with one decoder graph, for prefill and for cached steps".to_string(),
    };
    let files: Vec<&str> = others.iter().map(|other| other.file.as_str()).collect();
    Err(Error::unsupported(
        format!("finetuning `{}` beside {}", component.file, files.join(", ")),
        "the latter would keep their old weights",
    )
    .remedy(remedy))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn every_kind_of_work_has_one_row() {
        let all = [
            Work::Score,
            Work::MeasureLosses,
            Work::FinetuneOnAnswers,
            Work::FinetuneOnStream,
            Work::Answer,
            Work::Perplexity,
            Work::Bench,
        ];
        for work in all {
            assert_eq!(NEEDS.iter().filter(|(row, _)| *row == work).count(), 1, "{work:?}");
            assert!(!work.needs().is_empty(), "{work:?}");
        }
        assert_eq!(NEEDS.len(), all.len());
    }

    #[test]
    fn the_remedy_for_a_second_decoder_is_one_that_helps() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
        let model = crate::onnx::load(&fixture.join("onnx/decoder_model_merged.onnx")).unwrap();
        let error = |decoders: &[&str]| {
            let folder = tempfile::tempdir().unwrap();
            std::fs::create_dir(folder.path().join("onnx")).unwrap();
            std::fs::copy(fixture.join("config.json"), folder.path().join("config.json")).unwrap();
            for name in ["vision_encoder", "embed_tokens"] {
                let file = format!("onnx/{name}.onnx");
                std::fs::copy(fixture.join(&file), folder.path().join(&file)).unwrap();
            }
            for name in decoders {
                onnx::save(&model, &folder.path().join(format!("onnx/{name}.onnx")), &onnx::Storage::Inline).unwrap();
            }
            check(&Bundle::open(folder.path()).unwrap(), Work::FinetuneOnAnswers).unwrap_err().to_string()
        };
        let merged = "decoder_model_merged";
        for (decoders, named) in [
            (&[merged, "decoder_model_merged_q4"][..], "`--variant decoder=fp32`"),
            (&["decoder_model_merged_fp16", "decoder_model_merged_q4"], "`--variant decoder=fp16`"),
        ] {
            let error = error(decoders);
            assert!(error.contains(named), "{error}");
        }
        let error = error(&[merged, "decoder_with_past_model"]);
        assert!(error.contains("one decoder graph") && !error.contains("--variant"), "{error}");
    }

    #[test]
    fn a_graph_without_a_cache_is_refused_for_work_with_cached_steps() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo/hfexp/llama-cpu/prefill.onnx");
        let bundle = Bundle::open(&path).unwrap();
        for work in [Work::Answer, Work::Bench] {
            let error = check(&bundle, work).unwrap_err().to_string();
            assert!(error.contains("prefill.onnx") && error.contains("no cache inputs"), "{error}");
        }
        for work in [Work::Score, Work::MeasureLosses, Work::Perplexity, Work::FinetuneOnAnswers] {
            check(&bundle, work).unwrap();
        }
    }
}
