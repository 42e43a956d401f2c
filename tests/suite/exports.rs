//! What `export` writes is what the target takes.

use std::path::{Path, PathBuf};

use interlace::base::Device;
use interlace::bundle::Bundle;
use interlace::export::triton::{TritonSettings, export};
use interlace::ir::{DataType, Dim, Node, Value, ValueType};
use interlace::onnx;
use interlace::runtime::{Runtime, SessionOptions, Tensor};

fn zoo(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(file)
}

/// A decoder whose logits are multiplied by the input `scale` of no axes, with the output `total` of no axes.
fn with_scalars(folder: &Path) -> PathBuf {
    let mut model = onnx::load(&zoo("optimum/llama-with-past/model.onnx")).expect("model");
    let graph = &mut model.graph;
    let scalar = Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(Vec::new()) });
    let mut value = |name: &str, ty| graph.add_value(Value { name: name.into(), ty, ..Value::default() });
    let (scale, total) = (value("scale", scalar.clone()), value("total", scalar));
    let plain = value("plain", None);
    let logits = graph.body.outputs[0];
    let head = graph.body.nodes.iter_mut().find(|node| node.outputs.contains(&Some(logits))).expect("head");
    head.outputs.iter_mut().filter(|id| **id == Some(logits)).for_each(|id| *id = Some(plain));
    let node = |op: &str, inputs: Vec<_>, output| Node {
        op_type: op.into(),
        name: op.into(),
        inputs,
        outputs: vec![Some(output)],
        ..Node::default()
    };
    graph.body.nodes.push(node("Mul", vec![Some(plain), Some(scale)], logits));
    let mut sum = node("ReduceSum", vec![Some(logits)], total);
    sum.attributes.push(("keepdims".into(), interlace::ir::AttributeKind::Int(0).into()));
    graph.body.nodes.push(sum);
    graph.body.inputs.push(scale);
    graph.body.outputs.push(total);
    let path = folder.join("model.onnx");
    onnx::save(&model, &path, &onnx::Storage::Inline).expect("save");
    path
}

#[test]
fn scalars_are_exported_to_triton_with_an_axis_and_the_same_numbers() {
    let folder = tempfile::tempdir().expect("folder");
    let path = with_scalars(folder.path());
    let out = folder.path().join("repository");
    let written = export(&Bundle::open(&path).expect("bundle"), &TritonSettings::default(), &out).expect("export");
    assert_eq!(written.models["model"].reshaped, ["scale", "total"]);
    let config = std::fs::read_to_string(out.join("model/config.pbtxt")).expect("config");
    assert!(!config.contains("reshape") && config.contains("name: \"scale\""), "{config}");

    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let run = |path: &Path, shape: &[usize]| {
        let mut session = runtime.session(path, &SessionOptions::default()).expect("session");
        let feeds: Vec<(String, Tensor)> = session
            .inputs()
            .iter()
            .map(|port| {
                let size = |axis: usize, dim: &Dim| match (dim, axis, port.name.starts_with("past")) {
                    (Dim::Known(size), ..) => *size as usize,
                    (_, 2, true) => 0,
                    (_, 1, false) => 3,
                    _ => 1,
                };
                let sizes: Vec<usize> = port.shape.iter().enumerate().map(|(axis, dim)| size(axis, dim)).collect();
                let count: usize = sizes.iter().product();
                let tensor = match (port.name.as_str(), port.dtype) {
                    ("scale", _) => Tensor::from_f32(DataType::Float, shape, vec![0.5]),
                    (_, dtype) if count == 0 => Tensor::empty(dtype, &sizes),
                    (_, dtype @ DataType::Int64) => Tensor::from_i64(dtype, &sizes, vec![1; count]),
                    (_, dtype) => Tensor::from_f32(dtype, &sizes, vec![0.0; count]),
                };
                (port.name.clone(), tensor.expect("tensor"))
            })
            .collect();
        let feeds: Vec<(&str, &Tensor)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let outputs = session.run(&feeds, Some(&["logits", "total"])).expect("run");
        let total = outputs.get("total").expect("total");
        (
            total.shape(),
            total.to_f32().expect("f32").to_vec(),
            outputs.get("logits").expect("logits").to_ir().expect("ir"),
        )
    };
    let (scalar, before, logits) = run(&path, &[]);
    let (axis, after, exported) = run(&out.join("model/1/model.onnx"), &[1]);
    assert_eq!((scalar, axis), (vec![], vec![1]));
    assert!(before == after && before[0] != 0.0, "{before:?} {after:?}");
    assert_eq!(logits.bytes(), exported.bytes());
}
