//! Verifies a model's files: they load, the cache is consistent, configs and graphs agree, and the interpreter and ONNX
//! Runtime compute the same results.

use std::collections::BTreeMap;
use std::path::Path;

use crate::base::{
    Cancel, Error, Progress, Provenance, Result, Sha256Digest, human_bytes, sha256_file, sha256_large_file,
};
use crate::bundle::{Bundle, Component, ExportManifest, MANIFEST_FILE, ModelSource, Role};
use crate::data::ImageSettings;
use crate::ir::{self, Model};
use crate::runtime::{
    Decoder, Embedded, FeatureCache, InputFact, Runtime, Session, SessionOptions, TensorValue, TokenEmbedding,
    TractOutcome, VisionEncoder, VlmSession, VlmSettings, tract_check, tract_run,
};
use crate::{onnx, torch};

use super::agreement::{
    IMAGE_TOKENS, PROMPT_TOKENS, Probe, cached_step, interpreter_once, interpreter_steps, largest_difference,
    rounding_once, rounding_step, token_types_of, worse,
};
use super::checks::{CheckStatus, Checks, TOLERANCE, VerifyReport, half_bound};
use super::device::{DeviceLimits, device, device_of_export};
use super::exact::{EXACT, find_node, in_f32, in_types_of, unit_roundoff};
use super::figures::{config_and_graph, logits_name, port_types, readers};
use super::pixels::{noise_or_own_picture, pixel_feeds};
use super::probe::{noise, noise_text, picture_prompt, token_ids};
use super::quantised::{rounding_operator, spread_of_decoder, spread_of_session};
use super::run::LoadedModel;

/// Export targets whose folders are model folders.
pub const LOADED_TARGETS: &[&str] = &["transformers-js", "webgpu", "genai", "openvino", "tract", "single-file"];
/// Name of the check of the files against a manifest.
const FILES: &str = "files";
/// Largest difference of outputs in tract, whose kernels add in another order.
const TRACT_TOLERANCE: f64 = 1e-3;
/// Largest component for tract, in bytes: tract holds all weights in memory.
const TRACT_LIMIT_BYTES: u64 = 2 << 30;
/// Operators that quantise activations over a whole run, so that a cached step differs from a longer prefill.
const DYNAMIC_QUANTISERS: &[&str] =
    &["DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM"];

/// Runs every check that applies to the model's files; with `limits`, also whether such a device can run them.
///
/// Errors: as `ModelSource::open`, and `Error::Interrupted`. Failed checks are in the report and are not errors.
pub fn verify(
    source: &ModelSource,
    limits: Option<DeviceLimits>,
    runtime: &Runtime,
    cancel: &Cancel,
) -> Result<VerifyReport> {
    let mut checks = Checks(Vec::new());
    let manifest = match ExportManifest::read(source.path()) {
        Ok(manifest) => manifest,
        Err(error) => {
            checks.error(FILES, MANIFEST_FILE, &error);
            None
        }
    };
    let damaged = !checks.0.is_empty();
    let target = ExportManifest::target_in_record(source.path()).filter(|_| damaged);
    if target.is_some_and(|target| !LOADED_TARGETS.contains(&target.as_str())) {
        return unopened(source, limits, runtime, checks);
    }
    if let Some(manifest) = manifest.as_ref().filter(|manifest| !LOADED_TARGETS.contains(&manifest.target.as_str())) {
        return verify_manifest(source, manifest, limits, runtime, cancel);
    }
    if let Some(manifest) = &manifest {
        listed(source.path(), manifest, &mut checks)?;
    }
    let bundle = match source.open() {
        Ok(bundle) => bundle,
        // The files are not those of the export, which is the likely reason.
        Err(error) if checks.0.iter().any(|check| check.status == CheckStatus::Failed) => {
            checks.add("opens", &source.to_string(), CheckStatus::Failed, error.to_string());
            return unopened(source, limits, runtime, checks);
        }
        Err(error) => return Err(error),
    };
    let progress = Progress::new("verify", "files", bundle.components().len() as u64 + 1);
    for part in bundle.components() {
        cancel.check("no report is written")?;
        progress.note(part.file.clone());
        if let Err(error) = component(&bundle, part, runtime, &mut checks) {
            checks.error("graph", &part.file, &error);
        }
        if let Some(limits) = limits {
            device(&bundle, part, limits, runtime, cancel, &mut checks)?;
        }
        progress.advance(1);
    }
    cancel.check("no report is written")?;
    readers(&bundle, &mut checks);
    whole(source, &bundle, runtime, &mut checks);
    let inputs = BTreeMap::from([("model".to_string(), bundle.digest()?)]);
    let settings = settings(limits, runtime);
    Ok(VerifyReport {
        provenance: Provenance::new(VerifyReport::SCHEMA_VERSION, inputs, &settings)?
            .with_variants("model", bundle.chosen_variants())
            .with_hub("model", bundle.hub_name()),
        model: source.to_string(),
        passed: checks.0.iter().all(|check| check.status != CheckStatus::Failed),
        checks: checks.0,
    })
}

/// The settings in a report.
fn settings(limits: Option<DeviceLimits>, runtime: &Runtime) -> serde_json::Value {
    let mut settings = serde_json::json!({
        "device": runtime.device().to_string(),
        "max_buffer_bytes": limits.map(|limits| limits.max_buffer),
    });
    if limits.is_some_and(|limits| limits.webgpu) {
        settings["webgpu"] = true.into();
    }
    settings
}

/// Checks an export that is no model folder: its files are those of its manifest, and its graphs fit a device.
fn verify_manifest(
    source: &ModelSource,
    manifest: &ExportManifest,
    limits: Option<DeviceLimits>,
    runtime: &Runtime,
    cancel: &Cancel,
) -> Result<VerifyReport> {
    let mut checks = Checks(Vec::new());
    listed(source.path(), manifest, &mut checks)?;
    if let Some(limits) = limits {
        device_of_export(source.path(), manifest, limits, cancel, &mut checks)?;
    }
    unopened(source, limits, runtime, checks)
}

/// The report on a folder that was not opened as a model. Its input is the manifest, where there is one.
fn unopened(
    source: &ModelSource,
    limits: Option<DeviceLimits>,
    runtime: &Runtime,
    checks: Checks,
) -> Result<VerifyReport> {
    let path = source.path().join(MANIFEST_FILE);
    let mut inputs = BTreeMap::new();
    if path.is_file() {
        inputs.insert("manifest".to_string(), sha256_file(&path)?);
    }
    Ok(VerifyReport {
        provenance: Provenance::new(VerifyReport::SCHEMA_VERSION, inputs, &settings(limits, runtime))?,
        model: source.to_string(),
        passed: checks.0.iter().all(|check| check.status != CheckStatus::Failed),
        checks: checks.0,
    })
}

/// Compares a folder with its manifest.
fn listed(folder: &Path, manifest: &ExportManifest, checks: &mut Checks) -> Result<()> {
    let differences = manifest.differences(folder)?;
    let (status, detail) = match differences.is_empty() {
        true => (CheckStatus::Passed, format!("{} files have the listed sizes and digests", manifest.files.len())),
        false => (CheckStatus::Failed, ExportManifest::described(&differences)),
    };
    checks.add(FILES, MANIFEST_FILE, status, detail);
    Ok(())
}

/// Checks one graph of any kind on inputs from an `.npz` file, whose arrays have the names of the graph's inputs.
///
/// Errors: as `onnx::load` and `torch::read_npz`; `Error::Invalid` when an input has no array or one of another type,
/// or an array is not an input. The result of the comparison is in the report and is not an error.
pub fn verify_on(source: &ModelSource, inputs: &Path, runtime: &Runtime) -> Result<VerifyReport> {
    let bundle = source.open()?;
    let [part] = bundle.components() else {
        return Err(Error::invalid(format!("`{source}`"), "holds several graphs")
            .remedy("give the .onnx file that the inputs are for"));
    };
    let model = onnx::load(&bundle.path_of(part))?;
    let mut session = runtime.session(&bundle.path_of(part), &EXACT)?;
    let mut arrays: BTreeMap<String, ir::Tensor> = torch::read_npz(inputs)?.into_iter().collect();
    let mut feeds = Vec::new();
    for port in session.inputs() {
        let subject = || format!("`{}`", inputs.display());
        let array = arrays.remove(&port.name).ok_or_else(|| {
            Error::invalid(subject(), format!("lacks an array for input `{}`", port.name))
                .remedy("give one array for each input of the graph")
        })?;
        if array.dtype != port.dtype {
            let problem = format!("array `{}` is of {}, the input of {}", port.name, array.dtype, port.dtype);
            return Err(Error::invalid(subject(), problem).remedy("convert the array to the input's type"));
        }
        feeds.push((port.name.clone(), TensorValue::from_ir(&array)?));
    }
    if let Some(name) = arrays.keys().next() {
        let problem = format!("array `{name}` is not an input of `{source}`");
        return Err(Error::invalid(format!("`{}`", inputs.display()), problem)
            .remedy("name the arrays after the graph's inputs"));
    }
    let mut checks = Checks(Vec::new());
    interpreter(part, &model, &mut session, &feeds, runtime, &mut checks);
    let digests = [("model".to_string(), bundle.digest()?), ("inputs".to_string(), sha256_large_file(inputs)?)];
    let settings = serde_json::json!({ "device": runtime.device().to_string() });
    Ok(VerifyReport {
        provenance: Provenance::new(VerifyReport::SCHEMA_VERSION, BTreeMap::from(digests), &settings)?
            .with_variants("model", bundle.chosen_variants())
            .with_hub("model", bundle.hub_name()),
        model: source.to_string(),
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
    port_types(bundle, part, &model, checks);
    match part.role {
        Role::VisionEncoder => match pixel_feeds(bundle, session) {
            Ok((mut session, feeds)) => {
                tract(bundle, part, &feeds, runtime, checks)?;
                interpreter(part, &model, &mut session, &feeds, runtime, checks);
            }
            Err(error) => {
                checks.error("plans in tract", &part.file, &error);
                checks.error("interpreter", &part.file, &error);
            }
        },
        Role::EmbedTokens => {
            let embedding = match TokenEmbedding::new(session) {
                Ok(embedding) => embedding,
                Err(error) => {
                    checks.error("interpreter", &part.file, &error);
                    return Ok(());
                }
            };
            let feeds = embedding.feeds(&embedding_prompt(bundle, &embedding))?;
            tract(bundle, part, &feeds, runtime, checks)?;
            interpreter(part, &model, &mut embedding.into_session(), &feeds, runtime, checks);
        }
        Role::Projector => match connector_feeds(bundle, &session, &path, runtime) {
            Ok(Some(feeds)) => interpreter(part, &model, &mut { session }, &feeds, runtime, checks),
            Ok(None) => {}
            Err(error) => checks.error("interpreter", &part.file, &error),
        },
        // Weights without layers: loading is the only check that applies to them alone.
        Role::TokenPruner | Role::LmHead | Role::AudioEncoder | Role::ImageGenerator => {}
        Role::Decoder | Role::DecoderPrefill | Role::DecoderWithPast => {
            let head_dim = bundle.config().and_then(|config| config.head_size());
            let decoder = Decoder::new(session, head_dim)?;
            config_and_graph(bundle, part, &model, &decoder, checks);
            logits_name(bundle, part, &decoder, checks);
            decoder_checks(bundle, part, &model, decoder, runtime, checks)?;
        }
    }
    Ok(())
}

/// The connector's input: the vision encoder's features of a picture. `None` in a folder without an encoder, or for a
/// connector with other inputs.
///
/// Errors: as [`noise_or_own_picture`] and `VisionEncoder::encode`.
fn connector_feeds(
    bundle: &Bundle,
    session: &Session,
    path: &Path,
    runtime: &Runtime,
) -> Result<Option<Vec<(String, TensorValue)>>> {
    let (Some(encoder), [port]) = (bundle.component(Role::VisionEncoder), session.inputs()) else { return Ok(None) };
    let encoder = runtime.session(&bundle.path_of(encoder), &EXACT)?;
    let encoder = VisionEncoder::new(encoder, Sha256Digest::new(), FeatureCache::new(0))?;
    let mut encoder = encoder.with_projector(runtime.session(path, &EXACT)?)?;
    encoder.keep_unprojected();
    let picture = noise_or_own_picture(bundle, &encoder)?;
    let features = encoder.encode(&[&picture])?;
    let before = features.first().and_then(|features| features.unprojected.as_ref());
    let feeds = before.map(|before| {
        let shape = match port.rank() {
            2 => vec![before.tiles * before.rows, before.width],
            _ => vec![before.tiles, before.rows, before.width],
        };
        Ok(vec![(port.name.clone(), TensorValue::from_f32(port.dtype, &shape, before.data.clone())?)])
    });
    feeds.transpose()
}

/// A synthetic prompt for a token embedding; it contains a picture if the graph merges features.
fn embedding_prompt(bundle: &Bundle, embedding: &TokenEmbedding) -> Embedded {
    let config = bundle.config();
    let image_token = config.and_then(|config| config.image_token_id);
    let ids = token_ids(PROMPT_TOKENS, config.and_then(|config| config.vocab_size).unwrap_or(16), image_token);
    let mut prompt = Embedded::text(&ids, 0, Vec::new(), 0, 1);
    if let (Some(token), Some(width)) = (image_token, embedding.feature_width()) {
        prompt.side.image = (0..ids.len()).map(|at| IMAGE_TOKENS.contains(&at)).collect();
        prompt.input_ids[IMAGE_TOKENS].fill(token);
        prompt.side.features = noise(IMAGE_TOKENS.len() * width);
    }
    prompt
}

/// Checks the whole model: its own processor encodes a picture, and the picture's features fit the prompt.
fn whole(source: &ModelSource, bundle: &Bundle, runtime: &Runtime, checks: &mut Checks) {
    if bundle.component(Role::VisionEncoder).is_none() {
        return;
    }
    let name = "picture and prompt";
    let subject = "processor, vision encoder, embeddings";
    let cache = FeatureCache::new(1 << 20);
    let outcome = LoadedModel::open(source, runtime, &SessionOptions::default(), &cache, &ImageSettings::default())
        .and_then(|mut model| {
            let prompt = picture_prompt(&model.processor)?;
            let tokens = prompt.input_ids.len();
            model.vlm.embed(&prompt).map(|embedded| (tokens, embedded.len(), embedded.hidden_size))
        });
    match outcome {
        Ok((tokens, kept, hidden)) => {
            let of = if kept < tokens { format!("{kept} of {tokens}") } else { tokens.to_string() };
            checks.add(name, subject, CheckStatus::Passed, format!("{of} tokens of width {hidden}"))
        }
        Err(error) => checks.error(name, subject, &error),
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
    // An unsupported processor has a check of its own; here noise replaces the prompt.
    let embed = embed.and_then(|session| TokenEmbedding::new(session).ok());
    let image_token_id = bundle.config().and_then(|config| config.image_token_id);
    let settings = VlmSettings { image_token_id, ..VlmSettings::default() };
    let ids = token_ids(PROMPT_TOKENS, decoder.vocabulary().unwrap_or(16), image_token_id);
    let (text, mut decoder) = match embed {
        Some(embed) => {
            let mut vlm = VlmSession::new(None, Some(embed), decoder, settings)?;
            (vlm.embed_text(&ids, 0)?, vlm.into_decoder())
        }
        None => (noise_text(&decoder, &ids, 0)?, decoder),
    };
    let probe = Probe::new(text, &decoder, token_types_of(bundle));

    let with_cache = !decoder.slots().is_empty();
    let step = probe.step(with_cache)?;
    let mut feeds = decoder.feeds(&step)?;
    for (slot, tensor) in decoder.slots().iter().zip(decoder.empty_cache(1)?.tensors()) {
        let mut shape = tensor.shape();
        if let [_, _, length @ 0, _] = &mut shape[..] {
            *length = PROMPT_TOKENS - 1;
        }
        let past = TensorValue::from_f32(slot.past.dtype, &shape, noise(shape.iter().product()))?;
        feeds.push((slot.past.name.clone(), past));
    }
    tract(bundle, part, &feeds, runtime, checks)?;

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
            let computed = exact.as_ref().unwrap_or(model);
            let head_dim = bundle.config().and_then(|config| config.head_size());
            checks.engines((name, &part.file), difference, detail, (TOLERANCE, rounding_operator(computed)), || {
                spread_of_decoder(computed, decoder, &probe, head_dim, runtime)
            });
        }
        Err(error) => checks.error(name, &part.file, &error),
    }
    Ok(())
}

/// The interpreter check of a graph that needs only one run, and the check of 16-bit rounding errors.
fn interpreter(
    part: &Component,
    model: &Model,
    session: &mut Session,
    feeds: &[(String, TensorValue)],
    runtime: &Runtime,
    checks: &mut Checks,
) {
    let exact = in_f32(model);
    let mut compare = || -> Result<()> {
        let mut reference = exact.as_ref().map(|exact| runtime.session_of(exact, &EXACT)).transpose()?;
        let wide = reference.as_ref().map(|reference| in_types_of(reference, feeds)).transpose()?;
        if let (Some(reference), Some(wide), Some(unit)) = (&mut reference, &wide, unit_roundoff(model)) {
            checks.rounded(part, model, unit, rounding_once((session, feeds), (reference, wide)));
        }
        let (session, feeds) = (reference.as_mut().unwrap_or(session), wide.as_deref().unwrap_or(feeds));
        let difference = interpreter_once(model, session, feeds)?;
        let computed = exact.as_ref().unwrap_or(model);
        let detail = compared_with(exact.is_some()).to_string();
        checks.engines(
            ("interpreter", &part.file),
            difference,
            detail,
            (TOLERANCE, rounding_operator(computed)),
            || spread_of_session(computed, session, feeds, runtime),
        );
        Ok(())
    };
    if let Err(error) = compare() {
        checks.error("interpreter", &part.file, &error);
    }
}

/// The form of the graph in ONNX Runtime with which the interpreter is compared, for messages.
fn compared_with(in_f32: bool) -> &'static str {
    if in_f32 {
        "every output against ONNX Runtime, which was asked to compute in f32"
    } else {
        "every output against ONNX Runtime"
    }
}

fn facts_of(feeds: &[(String, TensorValue)]) -> Result<Vec<InputFact>> {
    feeds
        .iter()
        .map(|(name, tensor)| Ok(InputFact { name: name.clone(), dtype: tensor.dtype()?, shape: tensor.shape() }))
        .collect()
}

/// Plans a graph in tract; in a folder that was exported for tract also runs it.
fn tract(
    bundle: &Bundle,
    part: &Component,
    feeds: &[(String, TensorValue)],
    runtime: &Runtime,
    checks: &mut Checks,
) -> Result<()> {
    // A damaged manifest failed before.
    let manifest = ExportManifest::read(bundle.root()).ok().flatten();
    let target = manifest.map(|manifest| manifest.target).or_else(|| ExportManifest::target_in_record(bundle.root()));
    let runs = target.is_some_and(|target| target == "tract");
    let name = if runs { "agrees in tract" } else { "plans in tract" };
    let size = bundle.size_bytes(part)?;
    if size > TRACT_LIMIT_BYTES {
        let why = format!("{} is more than tract is given here, for it holds all weights in memory", human_bytes(size));
        checks.add(name, &part.file, CheckStatus::Unavailable, why);
        return Ok(());
    }
    let path = bundle.path_of(part);
    let planned = match runs {
        false => tract_check(&path, &facts_of(feeds)?),
        true => match tract_run(&path, feeds) {
            Ok(Ok(found)) => {
                let given: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, value)| (&name[..], value)).collect();
                let mut session = runtime.session(&path, &EXACT)?;
                let wanted = session.run(&given, None)?;
                let mut difference = if wanted.iter().count() == found.len() { 0.0 } else { f64::INFINITY };
                let mut largest = 0.0f64;
                for ((_, wanted), found) in wanted.iter().zip(&found) {
                    let wanted = wanted.to_f32()?;
                    largest = wanted.iter().fold(largest, |most, value| most.max(f64::from(value.abs())));
                    let own = match wanted.len() == found.len() {
                        true => largest_difference(wanted.iter().map(|&x| x.into()), found.iter().map(|&x| x.into())),
                        false => f64::INFINITY,
                    };
                    difference = worse(difference, own);
                }
                let mut detail = "the outputs of one run in tract and in ONNX Runtime".to_string();
                let model = onnx::load(&path)?;
                let mut least = TRACT_TOLERANCE;
                if let Some(unit) = unit_roundoff(&model) {
                    least = least.max(half_bound(&model, unit, largest));
                    detail += &format!(
                        "; both round to 16 bits, and as much is allowed as {} operators in them err, with values up to \
                         {largest:.2}",
                        model.graph.body.nodes.len()
                    );
                }
                let rounding = (least, rounding_operator(&model));
                checks.engines((name, &part.file), difference, detail, rounding, || {
                    spread_of_session(&model, &mut session, feeds, runtime)
                });
                return Ok(());
            }
            Ok(Err(outcome)) => Ok(outcome),
            Err(error) => Err(error),
        },
    };
    match planned {
        Ok(TractOutcome::Loads { nodes }) => checks.add(
            name,
            &part.file,
            CheckStatus::Passed,
            format!("a plan of {nodes} nodes, the file's own notes of shapes ignored; it was not run"),
        ),
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
