//! Measures similarities: one prefill of each sample's prompt through the decoder with similarity outputs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::analysis;
use crate::base::{Cancel, Device, Error, Peers, Progress, Provenance, Result, Stopwatch, gathered, own_part};
use crate::bundle::{Bundle, Role};
use crate::data::{Amount, DataOptions, Dataset, Encoded, Encoder, Intake, Subset};
use crate::onnx;
use crate::rewrite::{SIMILARITY_PREFIX, has_additions, tap_similarities};
use crate::runtime::{Decoder, FeatureCache, Profile, Runtime, SessionOptions, Step, VlmSession, missing_deepstack};

use super::scores::{Modality, SCORES_SCHEMA_VERSION, SampleModality, SampleScores, Scores, Similarities, StreamSide};

/// Limit in bytes on cached image features, for data sets with several questions about one picture.
const FEATURE_CACHE_BYTES: usize = 64 << 20;

/// Number of samples that other threads prepare ahead of the runtime.
const SAMPLES_AHEAD: usize = 8;

/// Settings of scoring.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScoreSettings {
    /// Number of samples to draw.
    pub amount: Amount,
    /// Seed of the draw.
    pub seed: u64,
    /// Pack sizes besides 1, 2 and 3.
    pub longer_packs: BTreeSet<usize>,
    /// Scores packs that hold the last layer too.
    pub include_last: bool,
    /// Samples with longer prompts are left out, so that one cannot exhaust the memory.
    pub max_tokens: usize,
    /// Says where the time was spent.
    #[serde(skip)]
    pub profile: bool,
}

impl Default for ScoreSettings {
    fn default() -> Self {
        let amount = Amount::Fraction(0.1);
        ScoreSettings {
            amount,
            seed: 42,
            longer_packs: BTreeSet::new(),
            include_last: false,
            max_tokens: 8192,
            profile: false,
        }
    }
}

/// Settings of scoring in the form recorded with the scores.
#[derive(Serialize)]
struct Recorded<'a> {
    #[serde(flatten)]
    settings: &'a ScoreSettings,
    data: &'a DataOptions,
}

/// Scores a model's decoder on the prompts of a data set: the question with its pictures, up
/// to the start of the answer.
///
/// Errors: as `Intake::encoded`; `Error::Invalid` when no sample is left or a similarity is NaN; `Error::Unsupported`
/// when the decoder's layers cannot be found; `Error::Interrupted` on Ctrl-C.
pub fn score(
    bundle: &Bundle,
    dataset: &Dataset,
    settings: &ScoreSettings,
    device: Device,
    cancel: &Cancel,
) -> Result<Scores> {
    score_with_peers(None, bundle, dataset, settings, device, cancel)
}

/// [`score`] by several processes, each on its part of the samples; all of them have the same scores then, those that one
/// process alone would have.
///
/// Errors: as `score` and `Peers::of_all`.
pub fn score_with_peers(
    peers: Option<&dyn Peers>,
    bundle: &Bundle,
    dataset: &Dataset,
    settings: &ScoreSettings,
    device: Device,
    cancel: &Cancel,
) -> Result<Scores> {
    let encoder = Encoder::open(bundle, dataset)?;
    let mut drawn = dataset.draw(Subset { amount: settings.amount, seed: settings.seed })?;
    // As they are read, so that the parts of all processes are in the order of one.
    drawn.sort_unstable();
    let (asked, indices) = (drawn.len(), own_part(peers, &drawn));
    let component = bundle.require(Role::Decoder)?;
    let decoder = onnx::load(&bundle.path_of(component))?;
    let analysis = analysis::analyse(&decoder)?;
    let num_layers = analysis.map.layers.len();
    let packs: Vec<usize> = [1, 2, 3].into_iter().chain(settings.longer_packs.iter().copied()).collect();
    let tapped = tap_similarities(&analysis, &packs, settings.include_last)?;
    let runtime = Runtime::new(device)?;
    let mut model = open(&runtime, bundle, &tapped)?;
    let progress = Progress::new("score", "samples", indices.len() as u64);
    let mut samples = Vec::with_capacity(indices.len());
    let waiting = Stopwatch::default();
    let (began, before) = (Instant::now(), model.times());
    // Other threads decode the next pictures while the network runs.
    let intake = Intake::new(dataset, bundle, settings.max_tokens);
    let own = (dataset, indices, asked);
    intake.ahead(
        own,
        SAMPLES_AHEAD,
        |sample| encoder.prompt(sample),
        |all| {
            for encoded in waiting.over(all) {
                let (_, encoded) = encoded?;
                cancel.check("no scores are written")?;
                samples.push(score_one(&mut model, encoded, &packs)?);
                progress.advance(1);
            }
            Ok(())
        },
    )?;
    let profile = Profile::new(began.elapsed(), intake.preparing(), &waiting, before, model.times());
    drop(progress);
    let left_out = intake.left_out_by_all(peers, asked)?;
    let samples = gathered(peers, samples)?.concat();
    if samples.is_empty() {
        let problem = format!("no sample is left: {}", left_out.summary().unwrap_or_default());
        return Err(Error::invalid(format!("data `{}`", dataset.path().display()), problem)
            .remedy("look at the data, or raise `--max-tokens`"));
    }
    let inputs = BTreeMap::from([("model".to_string(), bundle.digest()?), ("data".to_string(), dataset.digest()?)]);
    let recorded = Recorded { settings, data: dataset.options() };
    let provenance = Provenance::new(SCORES_SCHEMA_VERSION, inputs, &recorded)?
        .with_variants("model", bundle.chosen_variants())
        .with_hub("model", bundle.hub_name());
    let scores = Scores::from_samples(provenance, num_layers, settings.include_last, samples)?;
    let additions = has_additions(&analysis.map).then_some(StreamSide::Before);
    let warnings = missing_deepstack(bundle, &decoder.graph).into_iter().chain(encoder.warning()).collect();
    Ok(Scores { left_out, additions, warnings, profile: settings.profile.then_some(profile), ..scores })
}

/// The model, with the rewritten decoder in place of its own.
fn open(runtime: &Runtime, bundle: &Bundle, tapped: &crate::ir::Model) -> Result<VlmSession> {
    let options = SessionOptions::default();
    let head_dim = bundle.config().and_then(|config| config.head_size());
    let decoder = Decoder::prefill_only(runtime.session_of(tapped, &options)?, head_dim)?;
    VlmSession::with_decoder(runtime, bundle, decoder, &options, &FeatureCache::new(FEATURE_CACHE_BYTES))
}

fn score_one(model: &mut VlmSession, encoded: Encoded, packs: &[usize]) -> Result<SampleScores> {
    let (id, image_positions) = (encoded.id.clone(), encoded.image_positions.clone());
    let prompt = encoded.into_prompt();
    // Embeddings from another program do not show which tokens are image tokens.
    let told_apart = prompt.given.as_ref().is_none_or(|given| given.batch.arrays.contains_key("input_ids"));
    let embedded = model.embed(&prompt)?;
    let outputs = model.decoder_mut().prefill_outputs(&Step::prefill(&[&embedded], true)?)?;
    let mut is_image = vec![false; prompt.input_ids.len()];
    for &position in &image_positions {
        if let Some(slot) = is_image.get_mut(position) {
            *slot = true;
        }
    }
    let is_image = embedded.of_kept(&is_image);
    let tokens = is_image.len();
    let mut sim = Similarities::new();
    let mut modalities: BTreeMap<Modality, SampleModality> = BTreeMap::new();
    for &pack in packs {
        // Shape [n, T, 1]; the mean over tokens is computed in double precision.
        let found = outputs.get(&format!("{SIMILARITY_PREFIX}{pack}"))?;
        one_stream(&found.shape(), tokens)?;
        let values = found.to_f32()?;
        let rows: Vec<&[f32]> = values.chunks_exact(tokens.max(1)).collect();
        sim.insert(pack, rows.iter().filter_map(|row| mean_over(row, |_| true)).collect());
        for (modality, wanted) in [(Modality::Image, true), (Modality::Text, false)] {
            let count = is_image.iter().filter(|&&image| image == wanted).count();
            if count > 0 && told_apart {
                let means = rows.iter().filter_map(|row| mean_over(row, |at| is_image[at] == wanted)).collect();
                let own = modalities.entry(modality).or_default();
                own.tokens = count;
                own.sim.insert(pack, means);
            }
        }
    }
    Ok(SampleScores { id, tokens, sim, modalities })
}

/// Rejects several parallel streams (as in Gemma 3n), whose similarities would look like those of more layers.
fn one_stream(shape: &[usize], tokens: usize) -> Result<()> {
    match shape {
        [_, length, 1] if *length == tokens => Ok(()),
        _ => Err(Error::unsupported(
            "the residual stream",
            format!("similarities of layers have shape {shape:?}, expected one for each layer and token, [layers, {tokens}, 1]"),
        )
        .remedy("name layers with `prune --drop`: layers of several streams side by side are not scored")),
    }
}

/// The mean of the values at positions for which `wanted` is true; `None` when there are none.
fn mean_over(values: &[f32], wanted: impl Fn(usize) -> bool) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0usize);
    for (at, &value) in values.iter().enumerate() {
        if wanted(at) {
            sum += f64::from(value);
            count += 1;
        }
    }
    (count > 0).then(|| sum / count as f64)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn long_samples_and_unreadable_rows_are_skipped_and_counted() {
        let bundle = Bundle::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        let row = |question: &str| {
            let ask = format!(r#"{{"from": "human", "value": "{question}"}}"#);
            format!(r#"{{"conversations": [{ask}, {{"from": "gpt", "value": "a"}}]}}"#)
        };
        let mut lines: Vec<String> = (0..24).map(|number| row(&format!("What is {number}?"))).collect();
        lines[3] = row(&"how many ".repeat(200));
        lines[5] = r#"{"image": "missing.png", "conversations": []}"#.to_string();
        std::fs::write(&path, lines.join("\n")).unwrap();
        let dataset = Dataset::open(&path, &DataOptions::default()).unwrap();
        let settings = ScoreSettings { amount: Amount::All, max_tokens: 100, ..ScoreSettings::default() };
        let scores = score(&bundle, &dataset, &settings, Device::Cpu, &Cancel::default()).unwrap();
        assert_eq!((scores.num_samples, scores.samples.len()), (22, 22));
        assert_eq!((scores.left_out.too_long, scores.left_out.unreadable), (1, 1));
        assert!(scores.left_out.reasons[0].contains("row 5 of `x.jsonl`"), "{:?}", scores.left_out);
        assert_eq!(scores.samples[3].id, "row 4 of `x.jsonl`");
        assert_eq!(scores.provenance.settings["data"]["turns"], "conversation");

        let settings = ScoreSettings { max_tokens: 2, ..settings };
        let error = score(&bundle, &dataset, &settings, Device::Cpu, &Cancel::default()).unwrap_err().to_string();
        assert!(error.contains("no sample is left: 1 unreadable, 23 too long"), "{error}");
    }

    #[test]
    fn the_mean_is_over_the_selected_tokens() {
        let values = [0.5, 0.25, 1.0, 0.75];
        assert_eq!(mean_over(&values, |_| true), Some(0.625));
        assert_eq!(mean_over(&values, |at| at == 1 || at == 2), Some(0.625));
        assert_eq!(mean_over(&values, |at| at != 1), Some(0.75));
        assert_eq!(mean_over(&values, |_| false), None);
    }

    #[test]
    fn parallel_residual_streams_are_refused() {
        assert!(one_stream(&[5, 7, 1], 7).is_ok());
        for shape in [&[5, 7, 1, 2][..], &[10, 6, 1], &[5, 7, 2], &[]] {
            let message = one_stream(shape, 7).unwrap_err().to_string();
            assert!(message.contains("[layers, 7, 1]"), "{message}");
        }
    }
}
