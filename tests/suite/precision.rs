//! `export --precision`: what the new weights are, by the operators' definitions and in ONNX Runtime.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use interlace::base::{Cancel, Device};
use interlace::bundle::Bundle;
use interlace::export::{PrecisionReport, PrecisionRequest, PrecisionSettings, precision_named, write_variants};
use interlace::ir::{
    Attribute, AttributeKind, DataType, Dim, Model, Node, Tensor as Weight, Value, ValueId, ValueType,
};
use interlace::onnx;
use interlace::runtime::{Runtime, SessionOptions, TensorValue};
use serde_json::Value as Json;

use super::cli::{fixture, interlace, stderr};

/// Builds small graphs.
pub(super) struct Net(pub Model);

impl Net {
    pub fn new() -> Self {
        let opset_imports = BTreeMap::from([(String::new(), 18)]);
        Net(Model { ir_version: 10, opset_imports, ..Model::default() })
    }

    fn value(&mut self, name: &str, dtype: DataType, dims: &[i64]) -> ValueId {
        let dim = |&size: &i64| if size < 0 { Dim::Symbol("n".into()) } else { Dim::Known(size) };
        let ty = Some(ValueType::Tensor { dtype, shape: Some(dims.iter().map(dim).collect()) });
        self.0.graph.add_value(Value { name: name.into(), ty, ..Value::default() })
    }

    pub fn input(&mut self, name: &str, dtype: DataType, dims: &[i64]) -> ValueId {
        let id = self.value(name, dtype, dims);
        self.0.graph.body.inputs.push(id);
        id
    }

    pub fn weight(&mut self, name: &str, tensor: Weight) -> ValueId {
        let id = self.0.graph.add_value(Value { name: name.into(), ..Value::default() });
        self.0.graph.body.initializers.push((id, tensor));
        id
    }

    pub fn node(&mut self, op: &str, inputs: &[ValueId], attributes: &[(&str, AttributeKind)]) -> ValueId {
        let name = format!("{op}.{}", self.0.graph.values.len());
        let output = self.0.graph.add_value(Value { name: name.clone(), ..Value::default() });
        self.0.graph.body.nodes.push(Node {
            name,
            op_type: op.into(),
            inputs: inputs.iter().copied().map(Some).collect(),
            outputs: vec![Some(output)],
            attributes: attributes
                .iter()
                .map(|(name, kind)| (name.to_string(), Attribute::from(kind.clone())))
                .collect(),
            ..Node::default()
        });
        output
    }

    pub fn output(&mut self, id: ValueId, name: &str, dims: &[i64]) {
        let dim = |&size: &i64| if size < 0 { Dim::Unknown } else { Dim::Known(size) };
        let value = &mut self.0.graph.values[id.index()];
        value.name = name.into();
        value.ty = Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(dims.iter().map(dim).collect()) });
        self.0.graph.body.outputs.push(id);
    }

    pub fn save(&self, folder: &Path) {
        fs::create_dir_all(folder).expect("folder");
        onnx::save(&self.0, &folder.join("model.onnx"), &onnx::Storage::Inline).expect("saved");
    }
}

/// Numbers that no pattern of the code under test produces.
pub(super) fn numbers(count: usize, seed: f32) -> Vec<f32> {
    (0..count).map(|at| (at as f32 * 12.9898 + seed).sin() * (1.0 + (at % 7) as f32 * 0.3) * 0.1).collect()
}

/// A table of 11 rows, a product whose rows are no whole number of blocks, and a `Gemm` with a transposed weight and a bias.
pub(super) fn small(folder: &Path) -> Model {
    let mut net = Net::new();
    let ids = net.input("input_ids", DataType::Int64, &[-1]);
    let table = net.weight("table", Weight::from_f32(&[11, 48], &numbers(11 * 48, 0.1)));
    let first = net.weight("first", Weight::from_f32(&[48, 37], &numbers(48 * 37, 0.2)));
    let second = net.weight("second", Weight::from_f32(&[32, 37], &numbers(37 * 32, 0.3)));
    let bias = net.weight("bias", Weight::from_f32(&[32], &numbers(32, 0.4)));
    let rows = net.node("Gather", &[table, ids], &[]);
    let hidden = net.node("MatMul", &[rows, first], &[]);
    let last = net.node("Gemm", &[hidden, second, bias], &[("transB", AttributeKind::Int(1))]);
    net.output(last, "logits", &[-1, 32]);
    net.save(folder);
    net.0
}

pub(super) fn write(
    model: &Path,
    names: &[&str],
    settings: PrecisionSettings,
    out: &Path,
) -> interlace::base::Result<PrecisionReport> {
    let precisions: Vec<_> = names.iter().map(|name| precision_named(name).expect("a precision")).collect();
    write_variants(
        &Bundle::open(model)?,
        &PrecisionRequest { precisions: &precisions, settings, calibration: None, budget: None },
        out,
        &Cancel::default(),
    )
}

pub(super) fn constant<'a>(model: &'a Model, name: &str) -> &'a Weight {
    let body = &model.graph.body;
    let found = body.initializers.iter().find(|(id, _)| model.graph.name(*id) == name);
    &found.unwrap_or_else(|| panic!("no constant `{name}`")).1
}

fn node<'a>(model: &'a Model, op: &str) -> &'a Node {
    model.graph.body.nodes.iter().find(|node| node.op_type == op).unwrap_or_else(|| panic!("no {op}"))
}

pub(super) fn run(model: &Model, ids: &[i64]) -> Vec<f32> {
    let options = SessionOptions { exact_products: true, ..SessionOptions::default() };
    let mut session = Runtime::new(Device::Cpu).expect("runtime").session_of(model, &options).expect("session");
    let ids = TensorValue::new(&[ids.len()], ids.to_vec()).expect("ids");
    let outputs = session.run(&[("input_ids", &ids)], None).expect("run");
    outputs.get("logits").expect("logits").to_f32().expect("floats").into_owned()
}

/// The floats of a packed matrix of 4 bits, by the definition of the operators.
pub(super) fn expanded(model: &Model, name: &str, columns: usize, block: usize) -> Vec<f32> {
    let packed = constant(model, &format!("{name}_Q4")).bytes();
    let scales = constant(model, &format!("{name}_scales")).to_f64s().expect("scales");
    let named = format!("{name}_zero_points");
    let has_zeros = model.graph.values.iter().any(|value| value.name == named);
    let count = columns.div_ceil(block);
    let rows = scales.len() / count;
    let nibble =
        |bytes: &[u8], at: usize| f64::from(if at.is_multiple_of(2) { bytes[at / 2] & 15 } else { bytes[at / 2] >> 4 });
    let mut values = Vec::new();
    for row in 0..rows {
        for column in 0..columns {
            let number = nibble(packed, row * count * block + column);
            let zero = match has_zeros {
                true => nibble(&constant(model, &named).bytes()[row * count.div_ceil(2)..], column / block),
                false => 8.0,
            };
            values.push(((number - zero) * scales[row * count + column / block]) as f32);
        }
    }
    values
}

pub(super) fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

pub(super) fn relative(exact: &[f32], found: &[f32]) -> f64 {
    let square = |value: f32| f64::from(value).powi(2);
    let error: f64 = exact.iter().zip(found).map(|(&a, &b)| square(a - b)).sum();
    (error / exact.iter().map(|&a| square(a)).sum::<f64>()).sqrt()
}

pub(super) fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn four_bit_weights_are_those_of_the_definition_and_run_in_onnx_runtime() {
    let folder = tempfile::tempdir().expect("folder");
    let dense = small(&folder.path().join("model"));
    let ids = [3, 10, 0, 7];
    for (number, block_size) in [16usize, 32, 128].into_iter().enumerate() {
        for zero_points in [false, true] {
            let mut errors = Vec::new();
            for least_error in [false, true] {
                let settings = PrecisionSettings { block_size, zero_points, least_error };
                let out = folder.path().join(format!("out{number}{zero_points}{least_error}"));
                let report = write(&folder.path().join("model"), &["int4"], settings, &out).expect("written");
                let model = onnx::load(&out.join("model_q4.onnx")).expect("graph");
                let first = transposed(&expanded(&model, "first", 48, block_size), 48);
                let second = expanded(&model, "second", 37, block_size);
                // Rows of 48 are no whole number of blocks of 32.
                let table_block = block_size.min(16);
                let table = expanded(&model, "table", 48, table_block);
                assert_eq!(
                    node(&model, "GatherBlockQuantized").attribute("block_size").and_then(Attribute::as_int),
                    Some(16)
                );
                // The float graph with these numbers gives what the quantised one gives.
                let mut floats = dense.clone();
                for (id, tensor) in &mut floats.graph.body.initializers {
                    let values = match dense.graph.name(*id) {
                        "first" => &first,
                        "second" => &second,
                        "table" => &table,
                        _ => continue,
                    };
                    *tensor = Weight::from_f32(&tensor.dims.clone(), values);
                }
                let (want, found) = (run(&floats, &ids), run(&model, &ids));
                assert!(largest(&want, &found) < 1e-5, "{settings:?}: {}", largest(&want, &found));
                let tensors = &report.components[0].quantised;
                for (name, values) in [("first", &first), ("second", &second), ("table", &table)] {
                    let exact = constant(&dense, name).to_f64s().expect("floats");
                    let exact: Vec<f32> = exact.into_iter().map(|value| value as f32).collect();
                    let error = relative(&exact, values);
                    let said = tensors.iter().find(|tensor| tensor.name == name).expect("listed").relative_error;
                    assert!((error - said).abs() < 1e-6 && error < 0.13, "{settings:?} {name}: {error} {said}");
                    errors.push(error);
                }
                assert_eq!(node(&model, "Add").inputs[1].map(|id| model.graph.name(id)), Some("bias"));
                assert_eq!(model.graph.name(model.graph.body.outputs[0]), "logits");
            }
            assert!((0..3).all(|at| errors[3 + at] < errors[at]), "{errors:?}");
        }
    }
}

#[test]
fn eight_bit_products_are_those_of_exact_integers() {
    let folder = tempfile::tempdir().expect("folder");
    let dense = small(&folder.path().join("model"));
    let out = folder.path().join("out");
    let report = write(&folder.path().join("model"), &["int8"], PrecisionSettings::default(), &out).expect("written");
    assert_eq!(report.components[0].file, "model_quantized.onnx");
    let model = onnx::load(&out.join("model_quantized.onnx")).expect("graph");
    let channels = |name: &str, rows: usize| -> Vec<f64> {
        let part = |what: &str| constant(&model, &format!("{name}_{what}"));
        let (numbers, zeros) = (part("quantized").bytes(), part("zero_point").bytes());
        let scales = part("scale").to_f64s().expect("scales");
        let at = |place: usize| place % rows % scales.len();
        let value =
            |(place, &number): (usize, &u8)| (f64::from(number) - f64::from(zeros[at(place)])) * scales[at(place)];
        numbers.iter().enumerate().map(value).collect()
    };
    // One step of activations by hand, as `DynamicQuantizeLinear` is defined.
    let rounded = |values: &[f64]| -> Vec<f64> {
        let least = values.iter().copied().fold(0.0f64, f64::min);
        let scale = f64::from(((values.iter().copied().fold(0.0, f64::max) - least) / 255.0) as f32);
        let zero = (-least / scale).round_ties_even();
        values
            .iter()
            .map(|value| ((value / scale).round_ties_even() + zero).clamp(0.0, 255.0) - zero)
            .map(|n| n * scale)
            .collect()
    };
    let product = |x: &[f64], w: &[f64], inner: usize, outer: usize| -> Vec<f64> {
        let cell =
            |row: usize, column: usize| (0..inner).map(|k| x[row * inner + k] * w[k * outer + column]).sum::<f64>();
        (0..x.len() / inner)
            .flat_map(|row| (0..outer).map(move |column| (row, column)))
            .map(|(r, c)| cell(r, c))
            .collect()
    };
    let ids = [3i64, 10, 0, 7];
    let table = channels("table", 1);
    let rows: Vec<f64> = ids.iter().flat_map(|&id| table[id as usize * 48..][..48].to_vec()).collect();
    let hidden = product(&rounded(&rows), &channels("first", 37), 48, 37);
    let last = product(&rounded(&hidden), &channels("second", 32), 37, 32);
    let bias = constant(&dense, "bias").to_f64s().expect("bias");
    let want: Vec<f32> = last.iter().enumerate().map(|(at, value)| (value + bias[at % 32]) as f32).collect();
    let found = run(&model, &ids);
    assert!(largest(&want, &found) < 2e-6, "{}", largest(&want, &found));
    // Unsigned weights: no pair of products saturates on any processor.
    assert_eq!(constant(&model, "first_quantized").dtype, DataType::Uint8);
    assert!(report.components[0].quantised.iter().all(|tensor| tensor.relative_error < 0.008), "{report:?}");
}

/// A normalisation of large numbers, a rotation by large positions, and a mask with the least f32.
fn delicate(folder: &Path) -> Model {
    let mut net = Net::new();
    let x = net.input("inputs_embeds", DataType::Float, &[-1, 32]);
    let positions = net.input("position_ids", DataType::Int64, &[-1, 1]);
    let two = net.weight("two", Weight::from_f32(&[], &[2.0]));
    let epsilon = net.weight("epsilon", Weight::from_f32(&[], &[1e-6]));
    let frequencies = net.weight("frequencies", Weight::from_f32(&[1, 32], &[0.731; 32]));
    let axes = net.weight("axes", Weight::from_i64(&[1], &[-1]));
    let weight = net.weight("weight", Weight::from_f32(&[32, 32], &numbers(1024, 0.6)));
    let half_masked: Vec<f32> = (0..32).map(|at| if at < 16 { f32::MIN } else { 0.0 }).collect();
    let mask = net.weight("mask", Weight::from_f32(&[32], &half_masked));
    let lowest = net.weight("lowest", Weight::from_f32(&[1], &[f32::MIN]));
    let nothing = net.weight("nothing", Weight::from_f32(&[1], &[0.0]));
    let square = net.node("Pow", &[x, two], &[]);
    let mean = net.node("ReduceMean", &[square, axes], &[]);
    let sum = net.node("Add", &[mean, epsilon], &[]);
    let root = net.node("Sqrt", &[sum], &[]);
    let scale = net.node("Reciprocal", &[root], &[]);
    let normal = net.node("Mul", &[x, scale], &[]);
    let float = net.node("Cast", &[positions], &[("to", AttributeKind::Int(1))]);
    let angle = net.node("Mul", &[float, frequencies], &[]);
    let cosine = net.node("Cos", &[angle], &[]);
    let turned = net.node("Mul", &[normal, cosine], &[]);
    let product = net.node("MatMul", &[turned, weight], &[]);
    let masked = net.node("Add", &[product, mask], &[]);
    let shares = net.node("Softmax", &[masked], &[]);
    // In a row of padding every score is masked; nothing reads its shares, unless they are NaN.
    let padding = net.node("Add", &[product, lowest], &[]);
    let padding = net.node("Softmax", &[padding], &[]);
    let padding = net.node("Mul", &[padding, nothing], &[]);
    let sum = net.node("Add", &[product, shares], &[]);
    let last = net.node("Add", &[sum, padding], &[]);
    net.output(last, "logits", &[-1, 32]);
    net.save(folder);
    net.0
}

#[test]
fn half_precision_keeps_norms_positions_and_masks() {
    let folder = tempfile::tempdir().expect("folder");
    let dense = delicate(&folder.path().join("model"));
    let report = write(
        &folder.path().join("model"),
        &["fp16", "q4f16"],
        PrecisionSettings::default(),
        &folder.path().join("out"),
    );
    let report = report.expect("written");
    let x = TensorValue::from_f32(DataType::Float, &[3, 32], numbers(96, 0.9).iter().map(|n| n * 4000.0).collect())
        .expect("x");
    let positions = TensorValue::new(&[3, 1], vec![5i64, 4097, 30001]).expect("positions");
    let run = |model: &Model| -> Vec<f32> {
        let runtime = Runtime::new(Device::Cpu).expect("runtime");
        let mut session = runtime.session_of(model, &SessionOptions::default()).expect("session");
        let outputs = session.run(&[("inputs_embeds", &x), ("position_ids", &positions)], None).expect("run");
        outputs.get("logits").expect("logits").to_f32().expect("floats").into_owned()
    };
    let load = |suffix: &str| onnx::load(&folder.path().join(format!("out/model_{suffix}.onnx"))).expect("graph");
    let (half, four) = (load("fp16"), load("q4f16"));
    let (want, found) = (run(&dense), run(&half));
    // 2^-11 for each of a few roundings; squares of 1,000, cosines of 21,931 and sums with -3e38 would give NaN or noise.
    assert!(largest(&want, &found) < 4e-3 && relative(&want, &found) < 2e-3, "{want:?} {found:?}");
    let mut floats = dense.clone();
    let place =
        floats.graph.body.initializers.iter().position(|(id, _)| dense.graph.name(*id) == "weight").expect("weight");
    let expanded = transposed(&expanded(&four, "weight", 32, 32), 32);
    floats.graph.body.initializers[place].1 = Weight::from_f32(&[32, 32], &expanded);
    let (want, found) = (run(&floats), run(&four));
    assert!(largest(&want, &found) < 4e-3 && relative(&want, &found) < 2e-3, "{want:?} {found:?}");
    for model in [&half, &four] {
        let ports = model.graph.body.inputs.iter().chain(&model.graph.body.outputs);
        assert!(
            ports
                .clone()
                .all(|&id| model.graph.value(id).ty.as_ref().and_then(ValueType::dtype) != Some(DataType::Float16))
        );
    }
    assert_eq!(constant(&half, "weight").dtype, DataType::Float16);
    assert_eq!(constant(&four, "weight_scales").dtype, DataType::Float16);
    let kept: Vec<&str> = report.components[0].kept_operators.iter().map(|row| row.operator.as_str()).collect();
    assert_eq!(kept, ["Add", "Cast", "Cos", "Mul", "Pow", "Reciprocal", "ReduceMean", "Sqrt"]);
    assert_eq!(report.components[0].clamped_numbers, 17);
}

#[test]
fn what_cannot_be_quantised_is_refused_and_nothing_is_left() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    small(&here.join("model"));
    write(&here.join("model"), &["int4"], PrecisionSettings::default(), &here.join("four")).expect("written");
    fs::create_dir(here.join("only")).expect("folder");
    fs::copy(here.join("four/model_q4.onnx"), here.join("only/model.onnx")).expect("copied");
    let mut half = onnx::load(&here.join("model/model.onnx")).expect("graph");
    for (_, tensor) in &mut half.graph.body.initializers {
        let numbers = tensor.to_f64s().expect("floats");
        *tensor = Weight::from_f64s(DataType::Float16, &tensor.dims.clone(), &numbers).expect("f16");
    }
    Net(half).save(&here.join("half"));
    for (arguments, want) in [
        (&["export", "only", "--precision", "int4"][..], "is quantised already: it has"),
        (&["export", "half", "--precision", "int8"], "in half precision"),
        (&["export", "four", "--precision", "int4"], "`model_q4.onnx`: is there already"),
        (&["export", "model", "--precision", "int3"], "`int3` is none of fp16, int8"),
        (&["export", "model", "--precision", "q4"], "with the suffix `_q4` are written by `int4`"),
        (&["export", "model", "--precision", "int4,fp16,int4"], "`--precision`: has `int4` twice"),
        (
            &["export", "model", "--precision", "int8", "--block-size", "64"],
            "`--block-size`: is read by int4, q4f16 alone",
        ),
        (&["export", "model", "--precision", "fp16", "--zero-points"], "`--zero-points`: is read by"),
        (&["export", "model", "--precision", "int8,fp16", "--rounding", "nearest"], "and `--precision` is int8,fp16"),
        (
            &["export", "model", "--precision", "int4", "--data", "x.jsonl"],
            "`--data`: is read by int8-qdq, `--sensitivity`",
        ),
        (
            &["export", "model", "--precision", "int4", "--to", "safetensors"],
            "`--precision`: is not read by the target",
        ),
        (
            &["export", "model", "--to", "generate", "--variant", "int4"],
            "`export --precision int4` writes the variant `q4`",
        ),
        (&["export", "model", "--precision", "int8-qdq"], "needs calibration data"),
        (&["export", "model", "--precision", "int4", "--block-size", "48"], "expected a power of two"),
        (&["export", "model", "--precision", "int4", "--rounding", "up"], "nearest"),
        (&["export", "model", "--precision", "int4,int8", "--to", "generate"], "writes one precision, and 2 are named"),
        (&["export", "model", "--precision", "int4", "--max-batch-size", "4"], "is read by targets"),
        (&["export", "model"], "--to"),
        (&["export", "model", "--to", "triton", "--block-size", "16"], "--precision"),
        (&["export", "model", "--precision", "int4", "-o", "model/inside"], "inside the model folder"),
    ] {
        let arguments = [arguments, if arguments.contains(&"-o") { &[] } else { &["-o", "out"] }].concat();
        let output = interlace(here, &arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains(want), "{arguments:?}: {}", stderr(&output));
    }
    let mut left: Vec<String> = fs::read_dir(here)
        .expect("folder")
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    left.sort();
    assert_eq!(left, ["four", "half", "model", "only"]);
}

#[test]
fn the_shipped_model_is_written_for_transformers_js_and_pruned_afterwards_with_the_same_bytes() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let done = |arguments: &[&str]| -> String {
        let output = interlace(here, arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let model = fixture("model");
    let fast = ["--precision", "int4", "--rounding", "nearest", "-q"];
    let export: Json = serde_json::from_str(&done(
        &[&["--json", "export", &model, "--to", "transformers-js", "-o", "js"][..], &fast].concat(),
    ))
    .expect("JSON");
    assert_eq!(export["precision"].as_array().map(Vec::len), Some(3));
    for file in ["decoder_model_merged", "vision_encoder", "embed_tokens"] {
        for suffix in ["", "_q4"] {
            assert!(here.join(format!("js/onnx/{file}{suffix}.onnx")).exists(), "{file}{suffix}");
        }
    }
    let config: Json = serde_json::from_slice(&fs::read(here.join("js/config.json")).expect("config")).expect("JSON");
    let chunks = &config["transformers.js_config"]["use_external_data_format"];
    assert_eq!((&chunks["decoder_model_merged.onnx"], &chunks["decoder_model_merged_q4.onnx"]), (&1.into(), &1.into()));

    done(&[&["export", &model, "-o", "four"][..], &fast].concat());
    let config: Json = serde_json::from_slice(&fs::read(here.join("four/config.json")).expect("config")).expect("JSON");
    assert_eq!(config["transformers.js_config"]["use_external_data_format"]["decoder_model_merged_q4.onnx"], 1);
    done(&["prune", "four", "--drop", "3,6,8,13", "-o", "four-pruned", "-q"]);
    done(&["prune", &model, "--drop", "3,6,8,13", "-o", "pruned", "-q"]);
    done(&[&["export", "pruned", "-o", "pruned-four"][..], &fast].concat());
    let data = |folder: &str| fs::read(here.join(folder).join("onnx/decoder_model_merged_q4.onnx_data")).expect("data");
    assert_eq!(data("four-pruned"), data("pruned-four"));
    let record: Json =
        serde_json::from_slice(&fs::read(here.join("four-pruned/interlace.json")).expect("record")).expect("JSON");
    assert_eq!(
        (&record["history"][0]["step"], &record["history"][0]["precisions"][0]),
        (&"quantise".into(), &"int4".into())
    );
    let bench = fixture("data/bench-small.tsv");
    let eval =
        ["--json", "eval", "four", "--variant", "q4", "--data", &bench, "--limit", "16", "-q", "-o", "report.json"];
    let report: Json = serde_json::from_str(&done(&eval)).expect("JSON");
    assert_eq!(report["model"]["score"], 1.0);
    // Layers of different precisions are not equal, so their numbers give no ideal speed-up.
    for (baseline, ideal) in [("q4", Json::from(1.0)), ("fp32", Json::Null)] {
        let bench =
            ["--json", "bench", "four", "--variant", "q4", "--baseline", "four", "--baseline-variant", baseline];
        let few = ["--prompt-tokens", "8", "--new-tokens", "1", "--rounds", "1", "-q", "-o", "bench.json"];
        let report: Json = serde_json::from_str(&done(&[&bench[..], &few].concat())).expect("JSON");
        assert_eq!(report["speedup"]["ideal"], ideal, "{baseline}");
    }
}
