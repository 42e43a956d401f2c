//! Layer removal in graphs of many exporters, compared with the same networks in PyTorch with those layers deleted.
//!
//! `fixtures/zoo/cases.tsv` pairs each graph with expected values and a tolerance. `expected/*.npz` hold the inputs
//! (`in.NAME` for prefill, `in2.NAME` for one cached step) and PyTorch's logits (`exp.logits`, `exp2.logits`). Graphs
//! of one network that are not model folders share its weights (`NETWORK/weights.data`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use interlace::analysis::{Analysis, LayerMap, analyse};
use interlace::base::Device;
use interlace::ir::{DataType, Dim, Model};
use interlace::onnx;
use interlace::rewrite::drop_layers;
use interlace::runtime::{Runtime, Session, SessionOptions, TensorValue};

const DROPS: &[&[usize]] = &[&[], &[2, 5], &[0, 7], &[3], &[4], &[0, 1, 2, 3]];

struct Case {
    file: String,
    expected: String,
    tolerance: f32,
}

pub(super) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo")
}

fn cases() -> Vec<Case> {
    let table = std::fs::read_to_string(root().join("cases.tsv")).unwrap();
    let parse = |line: &str| {
        let mut fields = line.split('\t').map(str::to_string);
        let (file, expected, tolerance) = (fields.next().unwrap(), fields.next().unwrap(), fields.next().unwrap());
        // The tolerance is 5e-3 for half precision and 1e-4 for everything else.
        let tolerance = if tolerance == "1e-2" { 5e-3 } else { 1e-4 };
        Case { file, expected, tolerance }
    };
    let cases: Vec<Case> = table.lines().map(parse).collect();
    assert!(cases.len() >= 15, "{} cases", cases.len());
    cases
}

pub(super) type Arrays = HashMap<String, tch::Tensor>;

fn expected(case: &Case, drop: &[usize]) -> Option<Arrays> {
    let numbers: Vec<String> = drop.iter().map(usize::to_string).collect();
    let suffix = if drop.is_empty() { "nodrop".to_string() } else { format!("drop_{}", numbers.join("_")) };
    let path = root().join("expected").join(format!("{}.{suffix}.npz", case.expected));
    path.exists().then(|| tch::Tensor::read_npz(path).unwrap().into_iter().collect())
}

fn floats(tensor: &tch::Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.to_kind(tch::Kind::Float).contiguous().view([-1])).unwrap()
}

fn fed(tensor: &tch::Tensor, dtype: DataType) -> TensorValue {
    let shape: Vec<usize> = tensor.size().iter().map(|&dim| dim as usize).collect();
    match dtype {
        DataType::Float | DataType::Float16 => TensorValue::from_f32(dtype, &shape, floats(tensor)).unwrap(),
        _ => {
            let values = Vec::<i64>::try_from(tensor.to_kind(tch::Kind::Int64).contiguous().view([-1])).unwrap();
            TensorValue::from_i64(dtype, &shape, values).unwrap()
        }
    }
}

/// Runs one step: `prefix` is `in` or `in2`, `past` holds the caches by input name, `given` maps an input's name to
/// that in the data.
fn step(
    session: &mut Session,
    data: &Arrays,
    prefix: &str,
    mut past: HashMap<String, TensorValue>,
    given: &dyn Fn(&str) -> String,
    head_dim: usize,
) -> HashMap<String, TensorValue> {
    let mut feeds = Vec::new();
    for port in session.inputs().to_vec() {
        let name = given(&port.name);
        let tensor = if let Some(array) = data.get(&format!("{prefix}.{name}")) {
            // A graph with one row of positions takes the first row of multimodal positions.
            let rows = array.size().len() == 3 && port.shape.len() == 2 && name == "position_ids";
            fed(&if rows { array.get(0) } else { array.shallow_clone() }, port.dtype)
        } else if name == "cache_position" {
            fed(&data[&format!("{prefix}.position_ids")].view([-1]), port.dtype)
        } else if let Some(cache) = past.remove(&port.name) {
            cache
        } else {
            let size = |axis: usize, dim: &Dim| match dim {
                Dim::Known(size) => *size as usize,
                // One exporter writes fixed sizes as symbolic names.
                Dim::Symbol(name) if name.parse::<usize>().is_ok() => name.parse().unwrap(),
                _ if axis == 0 => 1,
                _ if axis == 3 => head_dim,
                _ => 0,
            };
            let shape: Vec<usize> = port.shape.iter().enumerate().map(|(axis, dim)| size(axis, dim)).collect();
            TensorValue::empty(port.dtype, &shape).unwrap()
        };
        feeds.push((port.name, tensor));
    }
    let feeds: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut outputs = session.run(&feeds, None).unwrap();
    let names: Vec<String> = outputs.iter().map(|(name, _)| name.to_string()).collect();
    names.into_iter().map(|name| (name.clone(), outputs.take(&name).unwrap())).collect()
}

/// The largest difference of the logits at the last `rows` positions from the expected ones.
fn distance(found: &TensorValue, want: &tch::Tensor) -> f32 {
    let rows = found.shape()[1] as i64;
    let want = want.narrow(1, want.size()[1] - rows, rows);
    let (found, want) = (found.to_f32().unwrap(), floats(&want));
    assert_eq!(found.len(), want.len());
    found.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Differences of prefill and of one cached step.
pub(super) fn distances(model: &Model, data: &Arrays, given: &dyn Fn(&str) -> String) -> (f32, f32, LayerMap) {
    let found = analyse(model).unwrap();
    let graph = &found.model.graph;
    let head_dim = data["exp.present.0.key"].size()[3] as usize;
    let runtime = Runtime::new(Device::Cpu).unwrap();
    let mut session = runtime.session_of(model, &SessionOptions::default()).unwrap();
    let result = graph.name(found.map.result).to_string();
    let mut first = step(&mut session, data, "in", HashMap::new(), given, head_dim);
    let mut past = HashMap::new();
    for port in found.map.layers.iter().flat_map(|layer| &layer.ports) {
        if let (Some(input), Some(output)) = (port.past, port.present) {
            past.insert(graph.name(input).to_string(), first.remove(graph.name(output)).unwrap());
        }
    }
    let second = step(&mut session, data, "in2", past, given, head_dim);
    let (prefill, decode) =
        (distance(&first[&result], &data["exp.logits"]), distance(&second[&result], &data["exp2.logits"]));
    (prefill, decode, found.map.clone())
}

fn check(case: &Case, analysis: &Analysis, given: &dyn Fn(&str) -> String) -> usize {
    let mut compared = 0;
    for drop in DROPS {
        let Some(data) = expected(case, drop) else { continue };
        let pruned = drop_layers(analysis, drop).unwrap();
        let (prefill, decode, map) = distances(&pruned, &data, given);
        let at = format!("{} without {drop:?}", case.file);
        assert!(prefill <= case.tolerance, "{at}: prefill differs by {prefill:e}");
        assert!(decode <= case.tolerance, "{at}: the cached step differs by {decode:e}");
        assert_eq!(map.layers.len(), 8 - drop.len(), "{at}");
        let states = data.keys().filter(|key| key.starts_with("exp.present.")).count();
        assert!(states == 0 || states == 2 * map.layers.len(), "{at}");
        compared += 1;
    }
    compared
}

/// Keeps a clone small: new cases share data with old ones where possible.
#[test]
fn fixtures_stay_under_50_mb() {
    let mut open = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")];
    let mut bytes = 0;
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() { open.push(entry.path()) } else { bytes += metadata.len() }
        }
    }
    assert!((30_000_000..50_000_000).contains(&bytes), "{bytes} bytes");
}

#[test]
fn pruned_graphs_equal_pytorch() {
    for case in cases() {
        let model = onnx::load(&root().join(&case.file)).unwrap();
        let compared = check(&case, &analyse(&model).unwrap(), &str::to_string);
        assert!(compared > 0, "{}: no expected values", case.file);
    }
}

#[test]
fn the_analysis_does_not_depend_on_names() {
    for case in cases() {
        let mut model = onnx::load(&root().join(&case.file)).unwrap();
        let old: HashMap<String, String> = scramble(&mut model);
        let given = |name: &str| old.get(name).cloned().unwrap_or_default();
        let analysis = analyse(&model).unwrap();
        assert_eq!(analysis.map.layers.len(), 8, "{}", case.file);
        assert!(check(&case, &analysis, &given) > 0, "{}", case.file);
    }
}

/// Gives every node, value and port a meaningless name; returns a map from new to old names.
fn scramble(model: &mut Model) -> HashMap<String, String> {
    let mut old = HashMap::new();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut fresh = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        format!("x{state:016x}")
    };
    for value in &mut model.graph.values {
        if value.name.is_empty() {
            continue;
        }
        let name = fresh();
        old.insert(name.clone(), std::mem::replace(&mut value.name, name));
        value.metadata.clear();
    }
    for node in &mut model.graph.body.nodes {
        node.name = fresh();
        node.metadata.clear();
    }
    old
}

#[test]
fn kept_weights_have_the_same_bytes() {
    for file in ["post/llama-ts17__int8.onnx", "genai/qwen3_vl-int4-embeds/model.onnx", "qwen3_vl/ts17.onnx"] {
        let model = onnx::load(&root().join(file)).unwrap();
        let pruned = drop_layers(&analyse(&model).unwrap(), &[2, 5]).unwrap();
        let before: HashMap<&str, &[u8]> =
            model.graph.body.initializers.iter().map(|(id, tensor)| (model.graph.name(*id), tensor.bytes())).collect();
        for (id, tensor) in &pruned.graph.body.initializers {
            assert_eq!(before[pruned.graph.name(*id)], tensor.bytes(), "{file}");
        }
        assert!(pruned.graph.body.initializers.len() < model.graph.body.initializers.len());
    }
}

#[test]
fn the_pruned_shipped_model_equals_pytorch() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let model = onnx::load(&fixtures.join("model/onnx/decoder_model_merged.onnx")).unwrap();
    let analysis = analyse(&model).unwrap();
    // The last set is what the plan at 25% drops.
    for (file, drop) in [("nodrop", vec![]), ("drop_2_5", vec![2, 5]), ("drop_3_6_8_13", vec![3, 6, 8, 13])] {
        let path = fixtures.join(format!("expected/{file}.npz"));
        let data: Arrays = tch::Tensor::read_npz(path).unwrap().into_iter().collect();
        let pruned = drop_layers(&analysis, &drop).unwrap();
        let (prefill, decode, map) = distances(&pruned, &data, &str::to_string);
        assert_eq!(map.layers.len(), 16 - drop.len(), "{file}");
        assert!(
            prefill <= 1e-4 && decode <= 1e-4,
            "{file}: prefill differs by {prefill:e}, the cached step by {decode:e}"
        );
    }
}
