//! `export --to generate`: one graph answers as `generate` does, for the tiny network of each family that it takes.

use std::path::Path;

use interlace::base::{Cancel, Device};
use interlace::bundle::Bundle;
use interlace::data::{Encoded, Processor};
use interlace::ir::DataType;
use interlace::prompt::Array;
use interlace::runtime::{FeatureCache, Port, Runtime, Session, SessionOptions, Step, TensorValue, VlmSession};
use ndarray::{ArrayD, Axis, IxDyn};

use super::cli::{interlace, stderr};
use super::exports::check_sizes_of_outputs;
use super::families::{Family, sample};

const TOKENS: i64 = 8;

/// Values for an input of pictures: the processor's, or empty ones for a prompt without pictures.
fn pictures(encoded: &Encoded, port: &Port) -> Option<Array> {
    let shape: Vec<usize> = (0..port.rank()).map(|axis| port.fixed_size(axis).unwrap_or(1)).collect();
    let constant = |value: f32| match port.dtype {
        DataType::Bool => Array::Bool(ArrayD::from_elem(IxDyn(&shape), value > 0.0)),
        DataType::Float => Array::Float(ArrayD::from_elem(IxDyn(&shape), value)),
        _ => Array::Int(ArrayD::from_elem(IxDyn(&shape), value as i64)),
    };
    let Some(images) = encoded.images.as_ref().filter(|images| !images.pictures.is_empty()) else {
        return Some(constant(0.0));
    };
    // Exporters of Qwen2-VL leave out the processor's prefix.
    let name = if port.name == "grid_thw" { "image_grid_thw" } else { &port.name };
    let array = match images.joined(name).ok()? {
        Array::Float(array) if array.ndim() + 1 == port.rank() => Array::Float(array.insert_axis(Axis(0))),
        Array::Bool(array) if array.ndim() + 1 == port.rank() => Array::Bool(array.insert_axis(Axis(0))),
        array => array,
    };
    // Some vision encoders take one picture per run.
    let fits = |(axis, &size): (usize, &usize)| port.fixed_size(axis).is_none_or(|fixed| fixed == size);
    array.shape().iter().enumerate().all(fits).then_some(array)
}

/// Runs the graph on a prompt; `None` for pictures that do not fit one run of the vision encoder.
pub fn answer(graph: &mut Session, encoded: &Encoded, tokens: i64) -> Option<Vec<i64>> {
    answer_with(graph, encoded, tokens, Vec::new())
}

/// The same with values for inputs that may be left out.
pub fn answer_with(
    graph: &mut Session,
    encoded: &Encoded,
    tokens: i64,
    mut feeds: Vec<(String, TensorValue)>,
) -> Option<Vec<i64>> {
    for port in graph.inputs().to_vec() {
        if feeds.iter().any(|(name, _)| *name == port.name) {
            continue;
        }
        let tensor = match port.name.as_str() {
            "input_ids" => {
                TensorValue::from_i64(DataType::Int64, &[1, encoded.input_ids.len()], encoded.input_ids.clone())
            }
            "max_new_tokens" => TensorValue::from_i64(DataType::Int64, &[], vec![tokens]),
            _ => TensorValue::from_array(port.dtype, pictures(encoded, &port)?),
        };
        feeds.push((port.name, tensor.expect("a tensor")));
    }
    let feeds: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let outputs = graph.run(&feeds, None).expect("an answer");
    outputs.get("generated_ids").expect("ids").to_ir().expect("a tensor").to_i64s()
}

/// Compares the graph's answers with those of the components and with Hugging Face's, for every prompt of a family; `pruning` are
/// further arguments of `prune`, which first drops the layers for which there are Hugging Face's answers. Returns the number of
/// prompts.
fn check(archive: &str, name: &str, pruning: Option<&[&str]>) -> usize {
    let family = Family::open(archive, name);
    let (folder, key) = match pruning {
        Some(more) => {
            let layers = family.drop_list("drop");
            family.run(&[&["prune", name, "--drop", &layers, "-o", "pruned", "-q"][..], more].concat());
            ("pruned", "pruned")
        }
        None => (name, "dense"),
    };
    family.run(&["export", folder, "--to", "generate", "-o", "out", "-q"]);
    let bundle = Bundle::open(&family.here().join(folder)).expect("a model folder");
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let options = SessionOptions::default();
    let mut graph = runtime.session(&family.here().join("out/onnx/generate.onnx"), &options).expect("a graph");
    let mut model = VlmSession::open(&runtime, &bundle, &options, &FeatureCache::new(1 << 20)).expect("a model");
    let processor = family.processor(&bundle);
    let ends = bundle.config().expect("a config").eos_token_ids.clone();
    let (mut checked, mut compared) = (0, 0);
    for (case, want) in family.cases() {
        let encoded = processor.encode_prompt(&sample(&want["turns"])).expect("a prompt");
        let Some(found) = answer(&mut graph, &encoded, TOKENS) else { continue };
        let prompt = encoded.into_prompt();
        let components = model.generate(&[prompt], TOKENS as usize, &Cancel::default()).expect("an answer").remove(0);
        assert_eq!(found, components, "{name} {case}");
        if let Some(theirs) = want["greedy"][key].as_array() {
            let theirs = theirs.iter().filter_map(serde_json::Value::as_i64);
            let theirs: Vec<i64> = theirs.take_while(|token| !ends.contains(token)).collect();
            assert_eq!(found, theirs, "{name} {case}");
            compared += 1;
        }
        checked += 1;
    }
    assert!(checked >= 8 && compared >= 4, "{name}: {checked} prompts, {compared} answers of Hugging Face");
    checked
}

#[test]
fn one_graph_answers_as_the_components_do() {
    for (archive, name) in [
        ("smolvlm", "smolvlm"),
        ("idefics3", "idefics3"),
        ("llava", "llava"),
        ("llava_onevision", "llava_onevision"),
        ("fast_vlm", "fast_vlm"),
        ("moondream", "moondream"),
        ("internvl", "internvl"),
        ("gemma3", "gemma3"),
        ("lfm2_vl", "lfm2_vl"),
        ("minicpm_v", "minicpm_v"),
        ("paligemma", "paligemma"),
        ("mistral3", "mistral3"),
        ("aya_vision", "aya_vision"),
        ("ovis2", "ovis2"),
        ("qwen2_vl", "qwen2_vl"),
        ("qwen2_5_vl", "qwen2_5_vl"),
        ("qwen3_vl", "qwen3_vl_plain"),
        ("glm4v", "glm4v"),
        ("glm_ocr", "glm_ocr"),
        ("paddleocr_vl", "paddleocr_vl"),
    ] {
        check(archive, name, None);
    }
    check("smolvlm", "smolvlm", Some(&[]));
    check("qwen2_vl", "qwen2_vl", Some(&[]));
}

/// DeepStack features in all forms of the decoder's inputs, token types, second embeddings.
#[test]
fn one_graph_feeds_what_decoders_read_beside_embeddings() {
    for (archive, name) in [
        ("qwen3_vl", "qwen3_vl"),
        ("qwen3_vl", "qwen3_vl_masked"),
        ("qwen3_vl", "qwen3_vl_packed"),
        ("qwen3_vl_moe", "qwen3_vl_moe"),
        ("granite_docling", "granite_docling"),
        ("gemma3", "gemma3_two_way"),
        ("paligemma", "paligemma_two_way"),
        ("gemma3n", "gemma3n"),
        ("gemma4", "gemma4"),
    ] {
        check(archive, name, None);
    }
    check("qwen3_vl", "qwen3_vl", Some(&["--deepstack", "shift"]));
    check("qwen3_vl", "qwen3_vl_masked", Some(&["--deepstack", "shift"]));
    check("gemma3", "gemma3_two_way", Some(&[]));
    check("gemma3n", "gemma3n", Some(&[]));
}

/// The components of a Triton repository in the order of its ensemble: logits behind the prompt, and the next position.
#[test]
fn the_ensemble_computes_a_prompt_as_the_components_do() {
    for (archive, name) in [
        ("qwen2_vl", "qwen2_vl"),
        ("qwen3_vl", "qwen3_vl"),
        ("qwen3_vl", "qwen3_vl_masked"),
        ("qwen3_vl", "qwen3_vl_packed"),
        ("glm4v", "glm4v"),
        ("paddleocr_vl", "paddleocr_vl"),
        ("gemma3", "gemma3_two_way"),
        ("gemma3n", "gemma3n"),
        ("smolvlm", "smolvlm"),
    ] {
        let family = Family::open(archive, name);
        family.run(&["export", name, "--to", "triton", "-o", "out", "-q"]);
        check_sizes_of_outputs(&family.here().join("out"));
        let steps = std::fs::read_to_string(family.here().join("out/prefill/config.pbtxt")).expect("an ensemble");
        assert!(family.here().join("out/generate_stream/1/model.py").is_file(), "{name}");
        let bundle = Bundle::open(&family.here().join(name)).expect("a model folder");
        let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
        let options = SessionOptions::default();
        let mut model = VlmSession::open(&runtime, &bundle, &options, &FeatureCache::new(1 << 20)).expect("a model");
        let processor = Processor::open(&bundle).expect("a processor");
        let served = |model: &str| {
            let path = family.here().join("out").join(model).join("1/model.onnx");
            runtime.session(&path, &options).expect("a session")
        };
        let mut sessions = ["vision_encoder", "embed_tokens", "merge_embeddings", "decoder_model_merged"].map(served);
        let mut checked = 0;
        // The ensemble runs the vision encoder for prompts without pictures too.
        let photo = processor.encode_prompt(&sample(&family.expected["cases"]["photo"]["turns"])).expect("a prompt");
        for (case, want) in family.cases() {
            let encoded = processor.encode_prompt(&sample(&want["turns"])).expect("a prompt");
            let pictured = encoded.images.as_ref().is_some_and(|images| !images.pictures.is_empty());
            let shown = if pictured { &encoded } else { &photo };
            let Some((logits, next)) = ensemble(&steps, &mut sessions, (&encoded, shown)) else { continue };
            let embedded = model.embed(&encoded.into_prompt()).expect("embeddings");
            assert!(next.is_none_or(|next| next == embedded.next_position), "{name} {case}: {next:?}");
            assert_eq!(next.is_some(), embedded.positions.len() == 3, "{name}");
            let step = Step::prefill(&[&embedded], false).expect("a prompt");
            let (wanted, _) = model.decoder_mut().step(&step, None).expect("logits");
            let wanted = wanted.to_f32().expect("floats").into_owned();
            let apart = wanted.iter().zip(&logits).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(wanted.len() == logits.len() && apart <= 1e-5, "{name} {case}: {apart}");
            checked += 1;
        }
        assert!(checked >= 8, "{name}: {checked} prompts");
    }
}

/// Runs the steps of an ensemble as its configuration maps them: the logits, and the next position if it gives one.
/// `shown` has the pictures.
fn ensemble(
    config: &str,
    sessions: &mut [Session; 4],
    (encoded, shown): (&Encoded, &Encoded),
) -> Option<(Vec<f32>, Option<i64>)> {
    let mut tensors: std::collections::BTreeMap<String, TensorValue> = Default::default();
    for port in sessions[0].inputs().to_vec() {
        tensors
            .insert(port.name.clone(), TensorValue::from_array(port.dtype, pictures(shown, &port)?).expect("tensor"));
    }
    let ids = TensorValue::from_i64(DataType::Int64, &[1, encoded.input_ids.len()], encoded.input_ids.clone());
    tensors.insert("input_ids".into(), ids.expect("a tensor"));
    let steps = config.split("model_name:").skip(1);
    assert_eq!(steps.clone().count(), sessions.len());
    for (text, session) in steps.zip(sessions) {
        let (inputs, outputs) = text.split_once("output_map").expect("outputs");
        let names = |part: &str| -> Vec<(String, String)> {
            let quoted: Vec<&str> = part.split('"').skip(1).step_by(2).collect();
            quoted.chunks(2).map(|pair| (pair[0].to_string(), pair[1].to_string())).collect()
        };
        // The first quoted text is the model's name.
        let inputs = names(&inputs[inputs.find("input_map").expect("inputs")..]);
        let outputs = names(outputs.split("model_version").next().expect("outputs"));
        let feeds: Vec<(&str, &TensorValue)> =
            inputs.iter().map(|(port, tensor)| (port.as_str(), &tensors[tensor])).collect();
        let mut found = session.run(&feeds, None).expect("outputs");
        for (port, tensor) in outputs {
            tensors.insert(tensor, found.take(&port).expect("an output"));
        }
    }
    let next = tensors.get("next_position").map(|next| next.to_ir().expect("a tensor").to_i64s().expect("a number")[0]);
    Some((tensors["logits"].to_f32().expect("floats").into_owned(), next))
}

/// Without a temperature the likeliest token; with one, tokens as frequent as the softmax of the logits says.
#[test]
fn tokens_are_drawn_by_temperature_and_seed() {
    let family = Family::open("smolvlm", "smolvlm");
    family.run(&["export", "smolvlm", "--to", "generate", "-o", "out", "-q"]);
    let bundle = Bundle::open(&family.here().join("smolvlm")).expect("a model folder");
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let options = SessionOptions::default();
    let mut graph = runtime.session(&family.here().join("out/onnx/generate.onnx"), &options).expect("a graph");
    let mut model = VlmSession::open(&runtime, &bundle, &options, &FeatureCache::new(1 << 20)).expect("a model");
    let processor = Processor::open(&bundle).expect("a processor");
    let (_, want) = family.cases().next().expect("a case");
    let encoded = processor.encode_prompt(&sample(&want["turns"])).expect("a prompt");
    let mut draw = |temperature: f32, seed: i64, tokens: i64| -> Vec<i64> {
        let heat = TensorValue::from_f32(DataType::Float, &[], vec![temperature]).expect("a tensor");
        let seed = TensorValue::from_i64(DataType::Int64, &[], vec![seed]).expect("a tensor");
        let more = vec![("temperature".to_string(), heat), ("seed".to_string(), seed)];
        answer_with(&mut graph, &encoded, tokens, more).expect("pictures of one run")
    };
    let greedy = draw(0.0, 5, TOKENS);
    assert_eq!(draw(0.0, 6, TOKENS), greedy);
    assert_eq!(draw(2.0, 7, TOKENS), draw(2.0, 7, TOKENS));
    let answers: std::collections::BTreeSet<Vec<i64>> = (-4..4).map(|seed| draw(2.0, seed, TOKENS)).collect();
    assert!(answers.len() > 6, "{answers:?}");

    // The logits behind the prompt by the components.
    let embedded = model.embed(&encoded.clone().into_prompt()).expect("embeddings");
    let step = Step::prefill(&[&embedded], false).expect("a prompt");
    let (logits, _) = model.decoder_mut().step(&step, None).expect("logits");
    let width = *logits.shape().last().expect("a vocabulary");
    let logits = logits.to_f32().expect("floats");
    let logits: Vec<f64> = logits[logits.len() - width..].iter().map(|&logit| f64::from(logit)).collect();
    for temperature in [1.0f64, 4.0] {
        let most = logits.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = logits.iter().map(|logit| ((logit - most) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        const DRAWS: i64 = 400;
        let mut counts = vec![0f64; weights.len()];
        let mut ended = 0.0;
        for seed in 0..DRAWS {
            match draw(temperature as f32, seed, 1).first() {
                Some(&token) => counts[token as usize] += 1.0,
                None => ended += 1.0,
            }
        }
        // Kolmogorov and Smirnov's statistic over the ids in order: below 1.63 at 1% (400 draws, seeds fixed).
        let end = bundle.config().expect("a config").eos_token_ids[0] as usize;
        counts[end] += ended;
        let (mut found, mut expected, mut farthest) = (0.0, 0.0, 0f64);
        for (count, weight) in counts.iter().zip(&weights) {
            found += count / DRAWS as f64;
            expected += weight / total;
            farthest = farthest.max((found - expected).abs());
        }
        assert!(farthest * (DRAWS as f64).sqrt() < 1.63, "temperature {temperature}: {farthest}");
    }
}

#[test]
fn graphs_that_need_more_than_a_loop_are_refused_with_the_reason() {
    for (archive, name, why) in [
        ("janus", "janus", "expected `input_ids` alone"),
        ("llava", "llava_projector", "projector"),
        ("llava", "llava_single", "pixel_values"),
    ] {
        let family = Family::open(archive, name);
        let output = interlace(family.here(), &["export", name, "--to", "generate", "-o", "out"]);
        assert_eq!(output.status.code(), Some(2), "{name}: {}", stderr(&output));
        assert!(stderr(&output).contains(why), "{name}: {}", stderr(&output));
        assert!(!family.here().join("out").exists());
    }
}

#[test]
fn weights_are_written_once_for_all_graphs() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let folder = tempfile::tempdir().expect("folder");
    let (model, out) = (model.display().to_string(), folder.path().join("out"));
    let output = interlace(folder.path(), &["export", &model, "--to", "generate", "-o", "out"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let size = |path: &Path| std::fs::metadata(path).expect("a file").len();
    let weights = size(&out.join("onnx/weights.onnx_data"));
    let dense: u64 = std::fs::read_dir(Path::new(&model).join("onnx"))
        .expect("files")
        .map(|entry| size(&entry.expect("entry").path()))
        .sum();
    assert!(weights < dense, "{weights} bytes of weights, the model has {dense}");
    // The components run over the same file.
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    for entry in std::fs::read_dir(out.join("onnx")).expect("files") {
        let path = entry.expect("entry").path();
        if path.extension().is_some_and(|extension| extension == "onnx") {
            runtime.session(&path, &SessionOptions::default()).expect("a session");
        }
    }
}
