//! Measures speed, memory and size, and compares with a baseline in alternating runs of one process.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Cancel, Error, Progress, Provenance, Result, peak_memory_bytes};
use crate::bundle::{Bundle, ModelSource, Role};
use crate::data::ImageSettings;
use crate::runtime::{Decoder, Embedded, FeatureCache, KvCache, Runtime, SessionOptions, Step, TensorValue};

use super::probe::{noise_text, picture_prompt, token_ids};
use super::run::LoadedModel;
use super::stats::Spread;

/// The most tokens, samples of a batch or rounds: more than any model has room for, or anyone waits for.
pub const MOST_COUNT: usize = 1 << 24;

/// Time between two looks at the process that measures memory, which prints little.
const POLLED_EVERY: Duration = Duration::from_millis(20);

/// What an interrupted measurement leaves.
const NO_REPORT: &str = "no report is written";

/// Settings of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BenchOptions {
    /// Tokens of the decoder's prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded behind it.
    pub new_tokens: usize,
    /// Measured rounds; in each, every model runs once.
    pub rounds: usize,
    /// Rounds before them that are not counted.
    pub warm_up: usize,
    /// Threads inside one operator; all cores without it.
    pub threads: Option<usize>,
}

impl Default for BenchOptions {
    fn default() -> Self {
        BenchOptions { prompt_tokens: 256, new_tokens: 32, rounds: 20, warm_up: 2, threads: None }
    }
}

/// The content of `bench.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BenchReport {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Processor cores that this process may use.
    pub cores: usize,
    /// Figures of the model.
    pub model: ModelBench,
    /// Figures of the model that it is compared with, measured in the same rounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<ModelBench>,
    /// The two compared; absent without a baseline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speedup: Option<Speedup>,
}

impl BenchReport {
    /// Version of the schema of `bench.json`.
    pub const SCHEMA_VERSION: u32 = 1;
}

/// Returns the peak memory of a model in bytes, measured in a separate process.
pub type MemoryProbe<'a> = dyn Fn(&ModelSource) -> Result<u64> + 'a;

/// One model's figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelBench {
    /// Path of the model as the user gave it.
    pub model: String,
    /// Decoder layers, where the config or the cache says how many.
    pub layers: Option<usize>,
    /// The components that were run, external data included.
    pub size_bytes: u64,
    /// The decoder's part of `size_bytes`.
    pub decoder_size_bytes: u64,
    /// Loading all components, once.
    pub load_ms: f64,
    /// Largest resident set of a process of its own that loads the model, reads the prompt and decodes behind it.
    pub peak_memory_bytes: Option<u64>,
    /// One prefill of the decoder: embeddings in, first token out.
    pub decoder_ttft_ms: Spread,
    /// An encoded picture and a question in, first token out: image processor, tokenizer, vision encoder, decoder.
    pub pipeline_ttft_ms: Option<Spread>,
    /// Decoding with the cache, one token at a time.
    pub decode_tokens_per_second: Spread,
}

/// The baseline's times over the model's, round by round: above 1 the model is faster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Speedup {
    /// Ratio of the times of one decoder prefill.
    pub decoder_ttft: Spread,
    /// Ratio of the times from picture and question to the first token.
    pub pipeline_ttft: Option<Spread>,
    /// Ratio of the times per generated token.
    pub decode: Spread,
    /// Layers of the baseline over layers of the model: what equal layers would give if nothing else took time. Absent where the
    /// decoders are in different precisions, because their layers are not equal.
    pub ideal: Option<f64>,
    /// `decoder_ttft.median` over `ideal`.
    pub decoder_ttft_of_ideal: Option<f64>,
}

/// A model with its inputs, kept between rounds.
struct Contestant {
    name: String,
    engine: Engine,
    layers: Option<usize>,
    /// Variant of the decoder.
    variant: String,
    size_bytes: u64,
    decoder_size_bytes: u64,
    load_ms: f64,
    /// A text of the requested length, for the decoder alone.
    prompt: Embedded,
    times: Vec<Times>,
}

/// The measured object: a whole model or a decoder alone.
enum Engine {
    Whole(Box<LoadedModel>),
    Alone(Box<Decoder>),
}

impl Engine {
    /// Errors: as `LoadedModel::open`, and as `Decoder::open` for a folder without a config.
    fn open(source: &ModelSource, bundle: &Bundle, runtime: &Runtime, settings: &SessionOptions) -> Result<Self> {
        if bundle.config().is_none() {
            return Ok(Engine::Alone(Box::new(Decoder::open(runtime, bundle, settings)?)));
        }
        // A cache of size 0 keeps nothing, so every round encodes its picture.
        Ok(Engine::Whole(Box::new(LoadedModel::open(
            source,
            runtime,
            settings,
            &FeatureCache::new(0),
            &ImageSettings::default(),
        )?)))
    }

    fn decoder(&mut self) -> &mut Decoder {
        match self {
            Engine::Whole(model) => model.vlm.decoder_mut(),
            Engine::Alone(decoder) => decoder,
        }
    }

    /// Decoder inputs for these tokens; noise replaces the embeddings when the model has no embedding component.
    fn embed(&mut self, ids: &[i64], first: i64) -> Result<Embedded> {
        match self {
            Engine::Whole(model) => model.vlm.embed_text(ids, first),
            Engine::Alone(decoder) => noise_text(decoder, ids, first),
        }
    }

    fn image_token(&self) -> Option<i64> {
        match self {
            Engine::Whole(model) => model.vlm.settings().image_token_id,
            Engine::Alone(_) => None,
        }
    }

    /// Runs from a picture and a question to the first token; `None` for models without a vision encoder.
    fn answer_picture(&mut self, cancel: &Cancel) -> Result<Option<f64>> {
        let Engine::Whole(model) = self else { return Ok(None) };
        if !model.vlm.reads_pictures() {
            return Ok(None);
        }
        let began = Instant::now();
        let prompt = picture_prompt(&model.processor)?;
        model.vlm.generate(&[prompt], 1, cancel)?;
        Ok(Some(milliseconds(began)))
    }
}

/// Times of one round, in milliseconds.
#[derive(Clone, Copy)]
struct Times {
    prefill_ms: f64,
    decode_ms: f64,
    pipeline_ms: Option<f64>,
}

/// Measures a model and, in alternation, a baseline. `memory` returns a model's peak memory, measured in a separate
/// process (see [`peak_memory`]); without it the report has no such figure.
///
/// Errors: `Error::Invalid` when a count is zero or above [`MOST_COUNT`], or a model does not load; `Error::Engine` when a run fails;
/// `Error::Interrupted` when the user asked to stop.
pub fn bench(
    model: &ModelSource,
    baseline: Option<&ModelSource>,
    runtime: &Runtime,
    options: &BenchOptions,
    memory: Option<&MemoryProbe>,
    cancel: &Cancel,
) -> Result<BenchReport> {
    check(options)?;
    let mut inputs = BTreeMap::from([("model".to_string(), model.open()?.digest()?)]);
    let mut contestants = vec![Contestant::open(model, runtime, options)?];
    if let Some(path) = baseline {
        inputs.insert("baseline".to_string(), path.open()?.digest()?);
        // The baseline is first in every round.
        contestants.insert(0, Contestant::open(path, runtime, options)?);
    }
    let total = options.warm_up + options.rounds;
    let progress = Progress::new("bench", "rounds", total as u64);
    for round in 0..total {
        for contestant in &mut contestants {
            cancel.check(NO_REPORT)?;
            let times = contestant.round(options, cancel)?;
            if round >= options.warm_up {
                contestant.times.push(times);
            }
        }
        progress.advance(1);
    }
    drop(progress);
    let speedup = match &contestants[..] {
        [base, model] => Some(Speedup::of(base, model)),
        _ => None,
    };
    let mut figures = Vec::new();
    for (contestant, path) in contestants.into_iter().zip(baseline.into_iter().chain([model])) {
        cancel.check(NO_REPORT)?;
        let peak = memory.map(|memory| memory(path)).transpose();
        // Ctrl-C reaches that process too, whose end is no failure then.
        cancel.check(NO_REPORT)?;
        figures.push(contestant.figures(options, peak?));
    }
    let provenance = Provenance::new(BenchReport::SCHEMA_VERSION, inputs, options)?
        .with_variants("model", model.chosen().as_deref())
        .with_variants("baseline", baseline.and_then(ModelSource::chosen).as_deref())
        .with_hub("model", model.hub_name())
        .with_hub("baseline", baseline.and_then(ModelSource::hub_name));
    let model = figures.pop().ok_or_else(|| Error::invalid("bench", "measured nothing"))?;
    Ok(BenchReport {
        provenance,
        device: runtime.device().to_string(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        model,
        baseline: figures.pop(),
        speedup,
    })
}

/// Loads a model, prefills the prompt, decodes after it, and returns the largest resident set of this process in bytes.
/// The process should do nothing else.
///
/// Errors: as `bench`.
pub fn peak_memory(model: &ModelSource, runtime: &Runtime, options: &BenchOptions, cancel: &Cancel) -> Result<u64> {
    check(options)?;
    Contestant::open(model, runtime, options)?.round(options, cancel)?;
    match peak_memory_bytes() {
        0 => Err(Error::unsupported("peak memory", "this system does not tell")),
        bytes => Ok(bytes),
    }
}

/// Runs a command that prints one number, the bytes of [`peak_memory`].
///
/// Errors: `Error::Io` when it does not start; `Error::Engine` when it fails or prints anything else than a number;
/// `Error::Interrupted` when the user asked to stop, and the process is ended.
pub fn peak_memory_of_child(command: &mut Command, cancel: &Cancel) -> Result<u64> {
    let program = command.get_program().to_os_string();
    let failed = |e| Error::io("run", &program, e);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    while child.try_wait().map_err(failed)?.is_none() {
        if let Err(stopped) = cancel.sleep(NO_REPORT, POLLED_EVERY) {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
            return Err(stopped);
        }
    }
    let output = child.wait_with_output().map_err(failed)?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.trim().parse() {
        Ok(bytes) if output.status.success() => Ok(bytes),
        _ => {
            let message = String::from_utf8_lossy(&output.stderr);
            Err(Error::engine("the process that measures memory", program.to_string_lossy(), message.trim()))
        }
    }
}

fn check(options: &BenchOptions) -> Result<()> {
    for (name, value) in
        [("prompt_tokens", options.prompt_tokens), ("new_tokens", options.new_tokens), ("rounds", options.rounds)]
    {
        if value == 0 {
            return Err(Error::invalid(format!("`{name}`"), "is 0, expected at least 1").remedy("give a larger number"));
        }
        if value > MOST_COUNT {
            let problem = format!("is {value}, expected at most {MOST_COUNT}");
            return Err(Error::invalid(format!("`{name}`"), problem).remedy("give a smaller number"));
        }
    }
    Ok(())
}

impl Contestant {
    fn open(source: &ModelSource, runtime: &Runtime, options: &BenchOptions) -> Result<Self> {
        let bundle = source.open()?;
        let settings = SessionOptions { threads: options.threads, ..SessionOptions::default() };
        let began = Instant::now();
        let mut engine = Engine::open(source, &bundle, runtime, &settings)?;
        let load_ms = milliseconds(began);
        let mut size_bytes = 0;
        for role in [Role::VisionEncoder, Role::EmbedTokens, Role::Decoder] {
            if let Some(part) = bundle.component(role) {
                size_bytes += bundle.size_bytes(part)?;
            }
        }
        let slots = engine.decoder().slots().len();
        let layers = bundle.config().and_then(|config| config.num_hidden_layers);
        Ok(Contestant {
            name: source.to_string(),
            variant: bundle.require(Role::Decoder)?.variant.clone(),
            layers: layers.or((slots > 0 && slots % 2 == 0).then_some(slots / 2)),
            size_bytes,
            decoder_size_bytes: bundle.size_bytes(bundle.require(Role::Decoder)?)?,
            load_ms,
            prompt: made_up_prompt(&mut engine, options.prompt_tokens)?,
            engine,
            times: Vec::new(),
        })
    }

    fn round(&mut self, options: &BenchOptions, cancel: &Cancel) -> Result<Times> {
        let engine = &mut self.engine;
        cancel.check(NO_REPORT)?;
        let began = Instant::now();
        let (logits, mut cache) = engine.decoder().step(&Step::prefill(&[&self.prompt], true)?, None)?;
        let mut token = likeliest(&logits)?;
        let prefill_ms = milliseconds(began);

        let began = Instant::now();
        for _ in 0..options.new_tokens {
            cancel.check(NO_REPORT)?;
            let length = cache.length();
            let row = engine.embed(&[token], length as i64)?;
            let step = Step::decode(&[&row], &[vec![1; length]], true)?;
            let (logits, longer): (TensorValue, KvCache) = engine.decoder().step(&step, Some(cache))?;
            token = likeliest(&logits)?;
            cache = longer;
        }
        let decode_ms = milliseconds(began);

        let pipeline_ms = engine.answer_picture(cancel)?;
        Ok(Times { prefill_ms, decode_ms, pipeline_ms })
    }

    fn figures(self, options: &BenchOptions, peak_memory_bytes: Option<u64>) -> ModelBench {
        let pipeline: Option<Vec<f64>> = self.times.iter().map(|times| times.pipeline_ms).collect();
        let rate = |times: &Times| options.new_tokens as f64 / (times.decode_ms / 1000.0);
        ModelBench {
            model: self.name,
            layers: self.layers,
            size_bytes: self.size_bytes,
            decoder_size_bytes: self.decoder_size_bytes,
            load_ms: self.load_ms,
            peak_memory_bytes,
            decoder_ttft_ms: Spread::of(&self.times.iter().map(|times| times.prefill_ms).collect::<Vec<_>>()),
            pipeline_ttft_ms: pipeline.map(|values| Spread::of(&values)),
            decode_tokens_per_second: Spread::of(&self.times.iter().map(rate).collect::<Vec<_>>()),
        }
    }
}

impl Speedup {
    fn of(base: &Contestant, model: &Contestant) -> Self {
        let rounds = || base.times.iter().zip(&model.times);
        let ratios =
            |part: fn(&Times) -> f64| Spread::of(&rounds().map(|(a, b)| part(a) / part(b)).collect::<Vec<_>>());
        let pipeline: Option<Vec<f64>> = rounds().map(|(a, b)| Some(a.pipeline_ms? / b.pipeline_ms?)).collect();
        let decoder_ttft = ratios(|times| times.prefill_ms);
        let ideal = match (base.layers, model.layers) {
            (Some(layers), Some(own)) if own > 0 && base.variant == model.variant => Some(layers as f64 / own as f64),
            _ => None,
        };
        Speedup {
            decoder_ttft,
            pipeline_ttft: pipeline.map(|values| Spread::of(&values)),
            decode: ratios(|times| times.decode_ms),
            ideal,
            decoder_ttft_of_ideal: ideal.map(|ideal| decoder_ttft.median / ideal),
        }
    }
}

fn made_up_prompt(engine: &mut Engine, count: usize) -> Result<Embedded> {
    let vocabulary = engine.decoder().vocabulary().unwrap_or(256);
    let ids = token_ids(count, vocabulary, engine.image_token());
    engine.embed(&ids, 0)
}

/// The most probable token at the last position.
fn likeliest(logits: &TensorValue) -> Result<i64> {
    crate::runtime::argmax_last(logits, 1)?.first().copied().ok_or_else(|| Error::invalid("logits", "are empty"))
}

fn milliseconds(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_out_of_range_are_refused() {
        for (options, name) in [
            (BenchOptions { prompt_tokens: 0, ..BenchOptions::default() }, "prompt_tokens"),
            (BenchOptions { new_tokens: 0, ..BenchOptions::default() }, "new_tokens"),
            (BenchOptions { rounds: 0, ..BenchOptions::default() }, "rounds"),
        ] {
            let error = check(&options).expect_err(name).to_string();
            assert!(error.starts_with(&format!("`{name}`: is 0, expected at least 1")), "{error}");
        }
        check(&BenchOptions::default()).expect("the defaults");
        let endless = BenchOptions { prompt_tokens: usize::MAX, ..BenchOptions::default() };
        let error = check(&endless).expect_err("a prompt without end").to_string();
        assert!(error.contains("`prompt_tokens`: is 18446744073709551615, expected at most 16777216"), "{error}");
    }

    #[test]
    fn a_child_process_is_ended_when_the_user_asks_to_stop() {
        let (cancel, began) = (Cancel::default(), Instant::now());
        cancel.request();
        let stopped = peak_memory_of_child(Command::new("sleep").arg("600"), &cancel);
        assert!(matches!(stopped, Err(Error::Interrupted { kept }) if kept == NO_REPORT));
        assert!(began.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn a_child_process_reports_its_peak_memory_or_its_error() {
        let bytes =
            peak_memory_of_child(Command::new("sh").args(["-c", "echo 4096"]), &Cancel::default()).expect("a number");
        assert_eq!(bytes, 4096);
        for (script, message) in [("echo 12; exit 3", ""), ("echo much", ""), ("echo broken >&2; exit 2", "broken")] {
            let mut command = Command::new("sh");
            let ended = peak_memory_of_child(command.args(["-c", script]), &Cancel::default());
            let error = ended.expect_err(script).to_string();
            let want = format!("the process that measures memory failed on sh: {message}");
            assert!(error.starts_with(&want), "{script}: {error}");
        }
    }
}
