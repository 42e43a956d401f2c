//! Finetuned weights written into the graphs of many exporters, compared with the same network in PyTorch.
//!
//! The base checkpoint is extracted from the GenAI exporter's graph, which names every matrix. `scripts/zoo/graft.py`
//! extracts it in the same way, checks it against the zoo's logits, and computes the logits of the twin.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use interlace::ir::{DataType, Tensor};
use interlace::onnx;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use super::cli::{interlace, stderr};
use super::zoo::{Arrays, distances, root};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.to_f64s().expect("floats").into_iter().map(|number| number as f32).collect()
}

fn transposed(rows: usize, columns: usize, numbers: &[f32]) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| numbers[row * columns + column])).collect()
}

/// The text model and its head under the names of Hugging Face.
fn base(name: &str) -> Tensors {
    let (prefix, embeddings) = match name {
        "llama" => ("model.", Some("llama/dyn18-ids.onnx")),
        _ => ("model.language_model.", None),
    };
    let model = onnx::load(&root().join(format!("genai/{name}-fp32-embeds/model.onnx"))).expect("graph");
    let mut tensors = Tensors::new();
    for (id, tensor) in &model.graph.body.initializers {
        let name = model.graph.name(*id);
        if !name.starts_with("model.") && !name.starts_with("lm_head") {
            continue;
        }
        let name = name
            .replace("model.layers.8.final_norm_layernorm", "model.norm")
            .replace(".MatMul", "")
            .replace(".attn.", ".self_attn.")
            .replace("_norm.layernorm.", "_norm.");
        let name = name.strip_prefix("model.").map_or(name.clone(), |rest| format!("{prefix}{rest}"));
        let numbers = floats(tensor);
        let [rows, columns] = tensor.dims[..] else {
            tensors.insert(name, (vec![numbers.len()], numbers));
            continue;
        };
        let (rows, columns) = (rows as usize, columns as usize);
        let numbers = transposed(rows, columns, &numbers);
        if name.contains("qkv_proj") {
            let parts = [("q_proj", 0, 64), ("k_proj", 64, 96), ("v_proj", 96, 128)];
            for (part, from, to) in parts {
                let numbers = numbers[from * rows..to * rows].to_vec();
                tensors.insert(name.replace("qkv_proj", part), (vec![to - from, rows], numbers));
            }
        } else {
            tensors.insert(name, (vec![columns, rows], numbers));
        }
    }
    if let Some(file) = embeddings {
        let model = onnx::load(&root().join(file)).expect("graph");
        let table =
            model.graph.body.initializers.iter().find(|(id, _)| model.graph.name(*id).ends_with("embed_tokens.weight"));
        let (_, table) = table.expect("embeddings");
        tensors.insert(format!("{prefix}embed_tokens.weight"), (vec![640, 64], floats(table)));
    }
    tensors
}

/// The finetuned twin, by the formula of `scripts/zoo/graft.py`.
fn twin(base: &Tensors) -> Tensors {
    let step = |place: usize| ((place * 7919 % 17) as f32 - 8.0) / 512.0;
    let moved = |numbers: &[f32]| numbers.iter().enumerate().map(|(place, number)| number + step(place)).collect();
    base.iter().map(|(name, (shape, numbers))| (name.clone(), (shape.clone(), moved(numbers)))).collect()
}

fn save(path: &Path, tensors: &Tensors) {
    fs::create_dir_all(path.parent().expect("folder")).expect("folder");
    let bytes: BTreeMap<&String, (Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, numbers))| (name, (shape.clone(), numbers.iter().flat_map(|n| n.to_le_bytes()).collect())))
        .collect();
    let views = bytes
        .iter()
        .map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("view")));
    safetensors::serialize_to_file(views, &None, path).expect("save");
}

/// Writes `base/` and `tuned/` of a network.
fn checkpoints(folder: &Path, name: &str) -> Tensors {
    let base = base(name);
    save(&folder.join("base/model.safetensors"), &base);
    save(&folder.join("tuned/model.safetensors"), &twin(&base));
    base
}

fn golden(name: &str) -> Arrays {
    let path = root().join("expected").join(name);
    tch::Tensor::read_npz(path).expect("golden values").into_iter().collect()
}

/// The single file of a network in a folder, or the path itself if it is a file.
fn graph_of(path: &Path) -> PathBuf {
    if path.is_file() {
        return path.to_path_buf();
    }
    ["model.onnx", "decode.onnx"].map(|file| path.join(file)).into_iter().find(|file| file.exists()).expect("a graph")
}

/// Grafts, and returns the largest differences of prefill and of a cached step from PyTorch.
fn grafted(folder: &Path, file: &str, tuned: &str, golden: &Arrays, given: &dyn Fn(&str) -> String) -> (f32, f32) {
    let source = root().join(file);
    let out = folder.join("out");
    let _ = fs::remove_dir_all(&out);
    let source = source.to_str().expect("path");
    let mut arguments = vec!["graft", source, "--base", "base", "--tuned", tuned, "-o", "out", "--quiet"];
    // Graphs that read embeddings have no embedding table.
    arguments.extend(
        ["--leave-out", "model.embed_tokens"].into_iter().filter(|_| file.contains("embeds") && file.contains("llama")),
    );
    let output = interlace(folder, &arguments);
    assert_eq!(output.status.code(), Some(0), "{file}: {}", stderr(&output));
    let name = Path::new(file).file_name().expect("name");
    let model = onnx::load(&if out.join(name).is_file() { out.join(name) } else { graph_of(&out) }).expect("result");
    let (prefill, decode, _) = distances(&model, golden, given);
    (prefill, decode)
}

#[test]
fn a_grafted_finetuned_twin_equals_pytorch() {
    let cases: &[(&str, &[(&str, f32)])] = &[
        (
            "llama",
            &[
                ("llama/dyn18-ids.onnx", 1e-4),
                ("llama/optimum-O2.onnx", 1e-4),
                ("llama/ts17-noname.onnx", 1e-4),
                ("optimum/llama-with-past", 1e-4),
                ("genai/llama-fp32-embeds", 1e-4),
            ],
        ),
        (
            "qwen3_vl",
            &[
                ("qwen3_vl/dyn23.onnx", 1e-4),
                ("qwen3_vl/ts17.onnx", 1e-4),
                ("qwen3_vl/mobius.onnx", 1e-4),
                ("genai/qwen3_vl-fp32-embeds", 1e-4),
            ],
        ),
    ];
    for (network, files) in cases {
        let folder = tempfile::tempdir().expect("folder");
        checkpoints(folder.path(), network);
        let golden = golden(&format!("{network}.tuned.npz"));
        for (file, tolerance) in *files {
            let (prefill, decode) = grafted(folder.path(), file, "tuned", &golden, &str::to_string);
            println!("{file}: prefill {prefill:.2e}, cached step {decode:.2e}");
            assert!(prefill < *tolerance && decode < *tolerance, "{file}: {prefill} {decode}");
        }
    }
}

#[test]
fn a_grafted_peft_adapter_equals_pytorch() {
    let folder = tempfile::tempdir().expect("folder");
    checkpoints(folder.path(), "llama");
    let adapter = root().join("llama/adapter");
    let golden = golden("llama.lora.npz");
    for file in ["llama/dyn18-ids.onnx", "optimum/llama-with-past"] {
        let (prefill, decode) = grafted(folder.path(), file, adapter.to_str().expect("path"), &golden, &str::to_string);
        assert!(prefill < 1e-4 && decode < 1e-4, "{file}: {prefill} {decode}");
    }
}

/// Grafts the twin and returns the printed table.
fn table_of(folder: &Path, source: &Path) -> Value {
    let source = source.to_str().expect("path");
    let arguments = ["graft", source, "--base", "base", "--tuned", "tuned", "-o", "out", "--quiet", "--json"];
    let output = interlace(folder, &arguments);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Every weight of a half-precision graph equals the twin's weight, rounded once.
#[test]
fn a_half_precision_graph_gets_weights_that_are_rounded_once() {
    let folder = tempfile::tempdir().expect("folder");
    let tuned = twin(&checkpoints(folder.path(), "qwen3_vl"));
    let source = root().join("post/qwen3_vl-ts17__fp16.onnx");
    let table = table_of(folder.path(), &source);
    let model = onnx::load(&folder.path().join("out/qwen3_vl-ts17__fp16.onnx")).expect("result");
    let mut compared = 0;
    for weight in table["weights"].as_array().expect("weights") {
        let (name, how) = (weight["initializer"].as_str().expect("name"), weight["how"].as_str().expect("how"));
        let (shape, numbers) = &tuned[weight["tensors"][0].as_str().expect("tensor")];
        let (_, found) =
            model.graph.body.initializers.iter().find(|(id, _)| model.graph.name(*id) == name).expect(name);
        let wanted = if how == "transposed" { transposed(shape[0], shape[1], numbers) } else { numbers.clone() };
        let bytes: Vec<u8> = wanted.iter().flat_map(|&number| half::f16::from_f32(number).to_le_bytes()).collect();
        let exact: Vec<u8> = wanted.iter().flat_map(|number| number.to_le_bytes()).collect();
        let wanted = if found.dtype == DataType::Float16 { bytes } else { exact };
        assert_eq!(found.bytes(), wanted, "{name}");
        compared += usize::from(found.dtype == DataType::Float16);
    }
    assert!(compared > 50, "{compared} half-precision weights compared");
}

/// The int4 graph gets the bytes that ONNX Runtime's quantiser gives for the twin. The same rule reproduces the graph's
/// own bytes from the base, which the verb checks for every matrix.
#[test]
fn an_int4_graph_is_requantised_by_its_own_rule() {
    let folder = tempfile::tempdir().expect("folder");
    let base = checkpoints(folder.path(), "qwen3_vl");
    let source = root().join("genai/qwen3_vl-int4-embeds");
    let table = table_of(folder.path(), &source);
    let weights = table["weights"].as_array().expect("weights");
    let quantised = |weight: &&Value| weight["how"].as_str().is_some_and(|how| how.contains("4 bits symmetric"));
    assert_eq!(weights.iter().filter(quantised).count(), 57);
    let model = onnx::load(&folder.path().join("out/model.onnx")).expect("result");
    let tensor = |name: &str| {
        let (_, tensor) =
            model.graph.body.initializers.iter().find(|(id, _)| model.graph.name(*id) == name).expect(name);
        tensor.clone()
    };
    let numbers = tensor("model.layers.3.mlp.down_proj.MatMul.weight_Q4");
    let scales = floats(&tensor("model.layers.3.mlp.down_proj.MatMul.weight_scales"));
    let (shape, wanted) = &twin(&base)["model.language_model.layers.3.mlp.down_proj.weight"];
    assert_eq!(numbers.dtype, DataType::Uint8);
    for (place, wanted) in wanted.iter().enumerate() {
        let (row, column) = (place / shape[1], place % shape[1]);
        let scale = scales[row * shape[1] / 32 + column / 32];
        let byte = numbers.bytes()[(row * shape[1] + column) / 2];
        let found = (f32::from(byte >> (4 * (column % 2)) & 15) - 8.0) * scale;
        // The largest number of the opposite sign is clipped to 7 of 8 steps.
        assert!((found - wanted).abs() <= scale.abs() * 1.001, "{place}: {found} {wanted}");
    }
}

/// In the int8 graph every matrix gets the bytes of ONNX Runtime's own rule, which reproduces the graph's bytes from
/// the base.
#[test]
fn an_int8_graph_is_requantised_by_its_own_rule() {
    let folder = tempfile::tempdir().expect("folder");
    let base = checkpoints(folder.path(), "llama");
    let source = root().join("post/llama-ts17__int8.onnx");
    let table = table_of(folder.path(), &source);
    let weights = table["weights"].as_array().expect("weights");
    let quantised: Vec<&Value> =
        weights.iter().filter(|weight| weight["how"].as_str().is_some_and(|how| how.contains("8 bits"))).collect();
    // 56 products of the layers, the head, and the embeddings.
    assert_eq!(quantised.len(), 58);
    let model = onnx::load(&folder.path().join("out/llama-ts17__int8.onnx")).expect("result");
    let weight = quantised.iter().find(|weight| weight["tensors"][0] == "model.layers.3.mlp.down_proj.weight");
    let name = weight.expect("weight")["initializer"].as_str().expect("name");
    let tensor = |name: &str| {
        let (_, tensor) =
            model.graph.body.initializers.iter().find(|(id, _)| model.graph.name(*id) == name).expect(name);
        tensor.clone()
    };
    let (shape, wanted) = &twin(&base)["model.layers.3.mlp.down_proj.weight"];
    let scale = floats(&tensor(&name.replace("_quantized", "_scale")))[0];
    let greatest = wanted.iter().fold(0.0, |most: f32, number| most.max(number.abs()));
    assert_eq!(scale, greatest / 127.0);
    let numbers = tensor(name);
    for (place, wanted) in wanted.iter().enumerate() {
        let (row, column) = (place / shape[1], place % shape[1]);
        let found = f32::from(numbers.bytes()[column * shape[0] + row] as i8) * scale;
        assert!((found - wanted).abs() <= scale * 0.501, "{place}: {found} {wanted}");
    }
}

/// A graph of ONNX Runtime's static quantiser (`scripts/zoo/qdq.py`), with a scale for each channel of a product's weight.
#[test]
fn a_graph_with_quantize_and_dequantize_nodes_gets_weights_by_its_own_rule() {
    let folder = tempfile::tempdir().expect("folder");
    let tuned = twin(&checkpoints(folder.path(), "llama"));
    let table = table_of(folder.path(), &root().join("post/llama-ts17__qdq.onnx"));
    let weights = table["weights"].as_array().expect("weights");
    let quantised: Vec<&Value> =
        weights.iter().filter(|weight| weight["how"].as_str().is_some_and(|how| how.contains("8 bits"))).collect();
    assert_eq!(quantised.len(), 58);
    let model = onnx::load(&folder.path().join("out/llama-ts17__qdq.onnx")).expect("result");
    let tensor = |name: &str| {
        let (_, tensor) =
            model.graph.body.initializers.iter().find(|(id, _)| model.graph.name(*id) == name).expect(name);
        tensor.clone()
    };
    let mut products = 0;
    for weight in quantised {
        let (shape, wanted) = &tuned[weight["tensors"][0].as_str().expect("tensor")];
        let name = weight["initializer"].as_str().expect("name");
        let scales = floats(&tensor(&name.replace("_quantized", "_scale")));
        let numbers = tensor(name);
        if scales.len() == 1 {
            continue;
        }
        products += 1;
        for row in 0..shape[0] {
            let own = &wanted[row * shape[1]..(row + 1) * shape[1]];
            let greatest = own.iter().fold(0.0, |most: f32, number| most.max(number.abs()));
            assert_eq!(scales[row], (f64::from(2.0 * greatest) / 254.0) as f32, "{name}");
            for (column, wanted) in own.iter().enumerate() {
                let found = numbers.bytes()[column * shape[0] + row] as i8;
                assert_eq!(f32::from(found), (wanted / scales[row]).round_ties_even(), "{name} {row} {column}");
            }
        }
    }
    assert_eq!(products, 57);
}

#[test]
fn checkpoints_that_do_not_match_the_graph_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let base = checkpoints(folder.path(), "llama");
    let source = root().join("llama/ts17-noname.onnx");
    let source = source.to_str().expect("path");
    let refused = |base: &str, tuned: &str, wanted: &[&str]| {
        let arguments = ["graft", source, "--base", base, "--tuned", tuned, "-o", "out", "--quiet"];
        let output = interlace(folder.path(), &arguments);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        for part in wanted {
            assert!(message.contains(part), "expected `{part}` in: {message}");
        }
        assert!(!folder.path().join("out").exists());
    };
    // Another model of the same shapes.
    let other: Tensors = base
        .iter()
        .map(|(name, (shape, n))| (name.clone(), (shape.clone(), n.iter().map(|n| n + 0.5).collect())))
        .collect();
    save(&folder.path().join("other/model.safetensors"), &other);
    refused("other", "tuned", &["none of the matrices", "exported from"]);
    // Another size, another architecture.
    let mut changed = base.clone();
    changed.insert("model.norm.weight".into(), (vec![32], vec![1.0; 32]));
    save(&folder.path().join("size/model.safetensors"), &changed);
    refused("base", "size", &["model.norm.weight", "[32]", "[64]"]);
    let mut changed = base.clone();
    changed.insert("model.layers.0.mlp.experts.0.weight".into(), (vec![4, 4], vec![1.0; 16]));
    save(&folder.path().join("names/model.safetensors"), &changed);
    refused("base", "names", &["does not have", "experts"]);
    // The finetuned checkpoint equals the base.
    refused("base", "base", &["are those of the base", "--tuned"]);
    // A tensor that the graph does not have.
    let mut more = base.clone();
    more.insert("model.visual.patch.weight".into(), (vec![8, 64], (0..512).map(|n| n as f32).collect()));
    save(&folder.path().join("more/model.safetensors"), &more);
    save(&folder.path().join("more-tuned/model.safetensors"), &twin(&more));
    refused("more", "more-tuned", &["model.visual.patch.weight", "--leave-out"]);
    let arguments = ["graft", source, "--base", "more", "--tuned", "more-tuned", "--dry-run", "--quiet"];
    assert_eq!(interlace(folder.path(), &arguments).status.code(), Some(1));
    let left: HashMap<&str, i32> = HashMap::from([("model.visual", 0), ("model.nothing", 2)]);
    for (name, code) in left {
        let output = interlace(folder.path(), &[&arguments[..], &["--leave-out", name]].concat());
        assert_eq!(output.status.code(), Some(code), "{name}: {}", stderr(&output));
    }
}

/// Every matrix of the graphs that `export --precision` writes is found and gets the twin's values, rounded as the export rounds.
#[test]
fn own_exports_are_requantised_by_the_rule_that_made_them() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let base = checkpoints(here, "llama");
    let source = root().join("llama/dyn18-ids.onnx");
    let tuned = here.join("dense");
    let output = interlace(
        here,
        &["graft", source.to_str().expect("path"), "--base", "base", "--tuned", "tuned", "-o", "dense", "-q"],
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for (number, (flags, file)) in [
        (&["int4"][..], "q4"),
        (&["int4", "--zero-points"], "q4"),
        (&["int4", "--rounding", "nearest", "--block-size", "16"], "q4"),
        (&["int8"], "quantized"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = source.file_stem().and_then(|name| name.to_str()).expect("a name");
        let export = |model: &Path, out: &str| {
            let arguments = ["export", model.to_str().expect("path"), "-o", out, "-q", "--precision"];
            let output = interlace(here, &[&arguments[..], flags].concat());
            assert_eq!(output.status.code(), Some(0), "{flags:?}: {}", stderr(&output));
            onnx::load(&here.join(out).join(format!("{name}_{file}.onnx"))).expect("graph")
        };
        let (own, want) = (format!("own{number}"), format!("want{number}"));
        export(&source, &own);
        let want = export(&tuned.join(format!("{name}.onnx")), &want);
        // The 4-bit or 8-bit file alone.
        let alone = here.join(format!("alone{number}"));
        fs::create_dir(&alone).expect("folder");
        for found in fs::read_dir(here.join(&own)).expect("folder").flatten() {
            let file_name = found.file_name().to_string_lossy().into_owned();
            if file_name.starts_with(&format!("{name}_{file}.onnx")) {
                fs::copy(found.path(), alone.join(&file_name)).expect("copied");
            }
        }
        fs::remove_dir_all(here.join("out")).unwrap_or_default();
        let table = table_of(here, &alone.join(format!("{name}_{file}.onnx")));
        let rounded = table["weights"].as_array().expect("weights").iter();
        let rounded = rounded.filter(|weight| weight["how"].as_str().is_some_and(|how| how.contains("bits"))).count();
        // 56 products of the layers, the head, and the embeddings.
        assert_eq!(rounded, 58, "{flags:?}");
        let found = onnx::load(&here.join(format!("out/{name}_{file}.onnx"))).expect("result");
        for (id, tensor) in &want.graph.body.initializers {
            let name = want.graph.name(*id);
            let own = found.graph.body.initializers.iter().find(|(id, _)| found.graph.name(*id) == name);
            let (_, own) = own.unwrap_or_else(|| panic!("{flags:?}: no `{name}`"));
            assert_eq!(own.bytes(), tensor.bytes(), "{flags:?}: {name}");
        }
    }
    assert!(base.len() > 60);
}
