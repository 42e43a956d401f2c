//! Whether a model's files are what they claim: they load, the cache is consistent, configs and graphs agree, and the
//! interpreter computes what ONNX Runtime computes.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Cancel, Error, Progress, Provenance, Result, sha256_large_file};
use crate::bundle::{Bundle, Component, Role};
use crate::ir::{self, DataType, Model};
use crate::runtime::{
    Decoder, FeatureCache, InputFact, Runtime, Session, SessionOptions, Tensor, TractOutcome, VlmSession, VlmSettings,
    tract_check,
};
use crate::{analysis, onnx, torch};

use super::agreement::{
    PROMPT_TOKENS, Probe, Rounding, cached_step, interpreter_once, interpreter_steps, rounding_once, rounding_step,
};
use super::exact::{EXACT, find_node, in_f32, in_types_of, unit_roundoff};
use super::probe::{embeddings, noise_embeddings, picture_prompt, pixel_feeds, token_ids};
use super::run::LoadedModel;

/// Largest difference of two f32 computations of the same values. Graphs of 16-bit floats are compared in f32 too.
const TOLERANCE: f64 = 1e-4;
/// Largest component that tract is given: it holds all weights in memory.
const TRACT_LIMIT_BYTES: u64 = 2 << 30;
/// Operators that quantise activations over a whole run, so that a cached step cannot equal a longer prefill.
const DYNAMIC_QUANTISERS: &[&str] =
    &["DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM"];

/// What `verify` prints as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VerifyReport {
    #[serde(flatten)]
    pub provenance: Provenance,
    pub model: String,
    /// True when no check failed.
    pub passed: bool,
    pub checks: Vec<Check>,
}

impl VerifyReport {
    /// Version of the schema of the report.
    pub const SCHEMA_VERSION: u32 = 1;
}

/// One check.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    pub name: String,
    /// The file or figure that was checked.
    pub subject: String,
    pub status: CheckStatus,
    /// What was found.
    pub detail: String,
    /// Largest absolute difference, for checks that compare numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difference: Option<f64>,
    /// What the difference may be at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckStatus {
    Passed,
    Failed,
    /// It could not be made; `detail` says why. This is no failure of the model.
    Unavailable,
}

/// Collects checks.
struct Checks(Vec<Check>);

impl Checks {
    fn add(&mut self, name: &str, subject: &str, status: CheckStatus, detail: impl Into<String>) {
        let (name, subject, detail) = (name.to_string(), subject.to_string(), detail.into());
        self.0.push(Check { name, subject, status, detail, difference: None, tolerance: None });
    }

    fn compared(&mut self, name: &str, subject: &str, difference: f64, tolerance: f64, detail: impl Into<String>) {
        // A difference that is not a number is no agreement.
        let status = if difference <= tolerance { CheckStatus::Passed } else { CheckStatus::Failed };
        self.add(name, subject, status, detail);
        if let Some(check) = self.0.last_mut() {
            check.difference = Some(difference);
            check.tolerance = Some(tolerance);
        }
    }

    /// An error is a failure, but for what is not supported, which leaves the check unmade.
    fn error(&mut self, name: &str, subject: &str, error: &Error) {
        let status = match error {
            Error::Unsupported { .. } => CheckStatus::Unavailable,
            _ => CheckStatus::Failed,
        };
        self.add(name, subject, status, error.to_string());
    }

    /// What 16-bit floats cost in ONNX Runtime. Each operator rounds its result by at most `unit` of it, and n independent
    /// errors add up to about the square root of n of one (Higham & Mary 2019, doi:10.1137/18M1226312).
    fn rounded(&mut self, part: &Component, model: &Model, unit: f64, found: Result<Rounding>) {
        let name = "rounding to 16 bits";
        match found {
            Ok(Rounding { difference, largest }) => {
                let nodes = model.graph.body.nodes.len();
                let bound = unit * (nodes as f64).sqrt() * largest;
                let detail = format!(
                    "ONNX Runtime on the file as it is against f32; {nodes} operators, values up to {largest:.2}"
                );
                self.compared(name, &part.file, difference, bound, detail);
            }
            Err(error) => self.error(name, &part.file, &error),
        }
    }

    fn equal<T: PartialEq + std::fmt::Display>(&mut self, subject: &str, config: Option<T>, graph: Option<T>) {
        let name = "config and graph";
        match (config, graph) {
            (Some(config), Some(graph)) if config == graph => {
                self.add(name, subject, CheckStatus::Passed, format!("both {config}"))
            }
            (Some(config), Some(graph)) => {
                self.add(name, subject, CheckStatus::Failed, format!("the config says {config}, the graph {graph}"));
            }
            (None, _) => self.add(name, subject, CheckStatus::Unavailable, "the config does not say"),
            (_, None) => self.add(name, subject, CheckStatus::Unavailable, "the graph leaves it open"),
        }
    }
}

/// Makes every check that the model's files allow.
///
/// Errors: as `Bundle::open`, and `Error::Interrupted`; what a check finds wrong is in the report, not an error.
pub fn verify(path: &Path, runtime: &Runtime, cancel: &Cancel) -> Result<VerifyReport> {
    let bundle = Bundle::open(path)?;
    let mut checks = Checks(Vec::new());
    let progress = Progress::new("verify", "files", bundle.components().len() as u64 + 1);
    for part in bundle.components() {
        cancel.check("no report is written")?;
        progress.note(part.file.clone());
        if let Err(error) = component(&bundle, part, runtime, &mut checks) {
            checks.error("graph", &part.file, &error);
        }
        progress.advance(1);
    }
    cancel.check("no report is written")?;
    whole(path, &bundle, runtime, &mut checks);
    let inputs = BTreeMap::from([("model".to_string(), bundle.digest()?)]);
    let settings = serde_json::json!({ "device": runtime.device().to_string() });
    Ok(VerifyReport {
        provenance: Provenance::new(VerifyReport::SCHEMA_VERSION, inputs, &settings)?,
        model: path.display().to_string(),
        passed: checks.0.iter().all(|check| check.status != CheckStatus::Failed),
        checks: checks.0,
    })
}

/// Checks one graph, of whatever kind, on given inputs: arrays of an `.npz` file, named after the graph's inputs.
///
/// Errors: as `onnx::load` and `torch::read_npz`; `Error::Invalid` when an input has no array, or one of another type,
/// or an array is no input. What the comparison finds is in the report, not an error.
pub fn verify_on(path: &Path, inputs: &Path, runtime: &Runtime) -> Result<VerifyReport> {
    let bundle = Bundle::open(path)?;
    let [part] = bundle.components() else {
        return Err(Error::invalid(format!("`{}`", path.display()), "holds several graphs")
            .remedy("give the .onnx file that the inputs are for"));
    };
    let model = onnx::load(&bundle.path_of(part))?;
    let mut session = runtime.session(&bundle.path_of(part), &EXACT)?;
    let mut arrays: BTreeMap<String, ir::Tensor> = torch::read_npz(inputs)?.into_iter().collect();
    let mut feeds = Vec::new();
    for port in session.inputs() {
        let subject = || format!("`{}`", inputs.display());
        let array = arrays
            .remove(&port.name)
            .ok_or_else(|| Error::invalid(subject(), format!("lacks an array for input `{}`", port.name)))?;
        if array.dtype != port.dtype {
            let problem = format!("array `{}` is of {}, the input of {}", port.name, array.dtype, port.dtype);
            return Err(Error::invalid(subject(), problem));
        }
        feeds.push((port.name.clone(), Tensor::from_ir(&array)?));
    }
    if let Some(name) = arrays.keys().next() {
        let problem = format!("array `{name}` is no input of `{}`", path.display());
        return Err(Error::invalid(format!("`{}`", inputs.display()), problem));
    }
    let mut checks = Checks(Vec::new());
    interpreter(part, &model, &mut session, &feeds, runtime, &mut checks);
    let digests = [("model".to_string(), bundle.digest()?), ("inputs".to_string(), sha256_large_file(inputs)?)];
    let settings = serde_json::json!({ "device": runtime.device().to_string() });
    Ok(VerifyReport {
        provenance: Provenance::new(VerifyReport::SCHEMA_VERSION, BTreeMap::from(digests), &settings)?,
        model: path.display().to_string(),
        passed: checks.0.iter().all(|check| check.status != CheckStatus::Failed),
        checks: checks.0,
    })
}

/// The checks of one file.
fn component(bundle: &Bundle, part: &Component, runtime: &Runtime, checks: &mut Checks) -> Result<()> {
    let path = bundle.path_of(part);
    let model = onnx::load(&path)?;
    let session = match runtime.session(&path, &EXACT) {
        Ok(session) => session,
        Err(error) => {
            checks.error("loads in ONNX Runtime", &part.file, &error);
            return Ok(());
        }
    };
    let counts = format!("{} inputs, {} outputs", session.inputs().len(), session.outputs().len());
    checks.add("loads in ONNX Runtime", &part.file, CheckStatus::Passed, counts);
    match part.role {
        Role::VisionEncoder => {
            let mut session = session;
            match pixel_feeds(session.subject(), session.inputs()) {
                Ok(feeds) => {
                    tract(bundle, part, &facts_of(&feeds)?, checks)?;
                    interpreter(part, &model, &mut session, &feeds, runtime, checks);
                }
                Err(error) => {
                    checks.error("plans in tract", &part.file, &error);
                    checks.error("interpreter", &part.file, &error);
                }
            }
        }
        Role::EmbedTokens => {
            let mut session = session;
            let dtype = session.input("input_ids").map_or(DataType::Int64, |port| port.dtype);
            let ids =
                token_ids(PROMPT_TOKENS, bundle.config().and_then(|config| config.vocab_size).unwrap_or(16), None);
            let feeds = vec![("input_ids".to_string(), Tensor::from_i64(dtype, &[1, ids.len()], ids)?)];
            tract(bundle, part, &facts_of(&feeds)?, checks)?;
            interpreter(part, &model, &mut session, &feeds, runtime, checks);
        }
        // Weights without layers: that they load is all there is to say of them alone.
        Role::Projector | Role::LmHead | Role::AudioEncoder | Role::ImageGenerator => {}
        Role::Decoder | Role::DecoderPrefill | Role::DecoderWithPast => {
            let head_dim = bundle.config().and_then(|config| config.head_size());
            let decoder = Decoder::new(session, head_dim)?;
            config_and_graph(bundle, part, &model, &decoder, checks);
            decoder_checks(bundle, part, &model, decoder, runtime, checks)?;
        }
    }
    Ok(())
}

/// Everything together: the model's own processor encodes a picture, and its features fit the prompt.
fn whole(path: &Path, bundle: &Bundle, runtime: &Runtime, checks: &mut Checks) {
    if bundle.component(Role::VisionEncoder).is_none() {
        return;
    }
    let name = "picture and prompt";
    let subject = "processor, vision encoder, embeddings";
    let cache = FeatureCache::new(1 << 20);
    let outcome = LoadedModel::open(path, runtime, &SessionOptions::default(), &cache).and_then(|mut model| {
        let prompt = picture_prompt(&model.processor)?;
        let tokens = prompt.input_ids.len();
        model.vlm.embed(&prompt).map(|embedded| (tokens, embedded.hidden_size))
    });
    match outcome {
        Ok((tokens, hidden)) => {
            checks.add(name, subject, CheckStatus::Passed, format!("{tokens} tokens of width {hidden}"))
        }
        Err(error) => checks.error(name, subject, &error),
    }
}

fn config_and_graph(bundle: &Bundle, part: &Component, model: &Model, decoder: &Decoder, checks: &mut Checks) {
    let Some(config) = bundle.config() else {
        checks.add("config and graph", &part.file, CheckStatus::Unavailable, "there is no config");
        return;
    };
    let layers = match analysis::analyse(model) {
        Ok(found) => Some(found.map.layers.len()),
        Err(error) => {
            checks.error("layers", &part.file, &error);
            None
        }
    };
    let named = |what: &str| format!("{what} of {}", part.file);
    checks.equal(&named("num_hidden_layers"), config.num_hidden_layers, layers);
    checks.equal(&named("vocab_size"), config.vocab_size, decoder.vocabulary());
    if decoder.takes_embeds() {
        checks.equal(&named("hidden_size"), config.hidden_size, decoder.hidden_size());
    }
    // Keys and values of attention have shape [batch, heads, positions, head size].
    let attention: Vec<_> = decoder.slots().iter().filter(|slot| slot.past.shape.len() == 4).collect();
    let axis = |axis: usize| {
        let mut sizes = attention.iter().map(|slot| slot.fixed_size(axis));
        let first = sizes.next().flatten()?;
        sizes.all(|size| size == Some(first)).then_some(first)
    };
    if !attention.is_empty() {
        checks.equal(&named("num_key_value_heads"), config.num_key_value_heads.or(config.num_attention_heads), axis(1));
        checks.equal(&named("head_dim"), config.head_size(), axis(3));
    }
}

fn decoder_checks(
    bundle: &Bundle,
    part: &Component,
    model: &Model,
    decoder: Decoder,
    runtime: &Runtime,
    checks: &mut Checks,
) -> Result<()> {
    let embed = if decoder.takes_embeds() { bundle.component(Role::EmbedTokens) } else { None };
    let embed = embed.map(|part| runtime.session(&bundle.path_of(part), &SessionOptions::default())).transpose()?;
    let image_token_id = bundle.config().and_then(|config| config.image_token_id);
    let settings = VlmSettings { image_token_id, ..VlmSettings::default() };
    let (data, hidden_size, decoder) = match (decoder.takes_embeds(), embed) {
        (true, Some(embed)) => {
            let mut vlm = VlmSession::new(None, Some(embed), decoder, settings)?;
            let (data, hidden) = embeddings(&mut vlm, PROMPT_TOKENS)?;
            (data, hidden, vlm.into_decoder())
        }
        (true, None) => {
            let (data, hidden) = noise_embeddings(&decoder, PROMPT_TOKENS)?;
            (data, hidden, decoder)
        }
        (false, _) => (Vec::new(), 0, decoder),
    };
    let mut decoder = decoder;
    let ids = token_ids(PROMPT_TOKENS, decoder.vocabulary().unwrap_or(16), image_token_id);
    let probe = Probe { ids, data, hidden_size, rows: decoder.position_rows() };

    let with_cache = !decoder.slots().is_empty();
    let past = if with_cache { Some(PROMPT_TOKENS - 1) } else { None };
    let step = probe.step(if with_cache { PROMPT_TOKENS - 1 } else { 0 }, PROMPT_TOKENS);
    let mut facts = facts_of(&decoder.feeds(&step.borrowed(), past)?)?;
    for (slot, tensor) in decoder.slots().iter().zip(decoder.empty_cache(1)?.tensors()) {
        let mut shape = tensor.shape();
        if let [_, _, length @ 0, _] = &mut shape[..] {
            *length = PROMPT_TOKENS - 1;
        }
        facts.push(InputFact { name: slot.past.name.clone(), dtype: slot.past.dtype, shape });
    }
    tract(bundle, part, &facts, checks)?;

    let exact = in_f32(model);
    let mut reference = None;
    if let Some(exact) = &exact {
        let head_dim = bundle.config().and_then(|config| config.head_size());
        reference = Some(Decoder::new(runtime.session_of(exact, &EXACT)?, head_dim)?);
    }
    if let (Some(unit), Some(reference)) = (unit_roundoff(model), &mut reference) {
        checks.rounded(part, model, unit, rounding_step(&mut decoder, reference, &probe));
    }
    let decoder = reference.as_mut().unwrap_or(&mut decoder);
    let name = "cached step equals longer prefill";
    if !with_cache {
        checks.add(name, &part.file, CheckStatus::Unavailable, "the graph has no cache inputs");
    } else if let Some(operator) = dynamic_quantiser(model) {
        let why = format!("`{operator}` quantises activations over the whole run, so the two differ by design");
        checks.add(name, &part.file, CheckStatus::Unavailable, why);
    } else {
        match cached_step(decoder, &probe) {
            Ok(difference) => {
                let detail = format!("logits of token {PROMPT_TOKENS}, decoded with a cache and in one prefill");
                checks.compared(name, &part.file, difference, TOLERANCE, detail);
            }
            Err(error) => checks.error(name, &part.file, &error),
        }
    }
    let name = "interpreter";
    match interpreter_steps(model, decoder, &probe) {
        Ok(difference) => {
            let what = if with_cache { "prefill and one cached step" } else { "prefill" };
            let detail = format!("{what}, {}", compared_with(exact.is_some()));
            checks.compared(name, &part.file, difference, TOLERANCE, detail);
        }
        Err(error) => checks.error(name, &part.file, &error),
    }
    Ok(())
}

/// The interpreter check of a graph that one run exercises, and what 16-bit floats cost there.
fn interpreter(
    part: &Component,
    model: &Model,
    session: &mut Session,
    feeds: &[(String, Tensor)],
    runtime: &Runtime,
    checks: &mut Checks,
) {
    let exact = in_f32(model);
    let outcome = match &exact {
        None => interpreter_once(model, session, feeds),
        Some(exact) => runtime.session_of(exact, &EXACT).and_then(|mut reference| {
            let wide = in_types_of(&reference, feeds)?;
            if let Some(unit) = unit_roundoff(model) {
                checks.rounded(part, model, unit, rounding_once((session, feeds), (&mut reference, &wide)));
            }
            interpreter_once(model, &mut reference, &wide)
        }),
    };
    match outcome {
        Ok(difference) => {
            checks.compared("interpreter", &part.file, difference, TOLERANCE, compared_with(exact.is_some()))
        }
        Err(error) => checks.error("interpreter", &part.file, &error),
    }
}

/// What the interpreter is compared with.
fn compared_with(in_f32: bool) -> &'static str {
    if in_f32 {
        "every output against ONNX Runtime, which was asked to compute in f32"
    } else {
        "every output against ONNX Runtime"
    }
}

fn facts_of(feeds: &[(String, Tensor)]) -> Result<Vec<InputFact>> {
    feeds
        .iter()
        .map(|(name, tensor)| Ok(InputFact { name: name.clone(), dtype: tensor.dtype()?, shape: tensor.shape() }))
        .collect()
}

fn tract(bundle: &Bundle, part: &Component, facts: &[InputFact], checks: &mut Checks) -> Result<()> {
    let name = "plans in tract";
    let size = bundle.size_bytes(part)?;
    if size > TRACT_LIMIT_BYTES {
        let why = format!(
            "{} is more than tract is given here, for it holds all weights in memory",
            crate::base::human_bytes(size)
        );
        checks.add(name, &part.file, CheckStatus::Unavailable, why);
        return Ok(());
    }
    match tract_check(&bundle.path_of(part), facts) {
        Ok(TractOutcome::Loads { nodes }) => {
            checks.add(name, &part.file, CheckStatus::Passed, format!("a plan of {nodes} nodes"))
        }
        Ok(TractOutcome::Missing { operators }) => {
            checks.add(name, &part.file, CheckStatus::Unavailable, format!("tract lacks {}", operators.join(", ")));
        }
        Ok(TractOutcome::Fails { problem }) => {
            checks.add(name, &part.file, CheckStatus::Unavailable, format!("tract cannot plan it: {problem}"));
        }
        Err(error) => checks.error(name, &part.file, &error),
    }
    Ok(())
}

/// An operator that quantises activations over a whole run, if the graph has one.
fn dynamic_quantiser(model: &Model) -> Option<&str> {
    find_node(&model.graph.body, &|node| DYNAMIC_QUANTISERS.contains(&node.op_type.as_str()))
        .map(|node| node.op_type.as_str())
}
