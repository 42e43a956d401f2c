//! Adapters beside products whose weights are packed in 4 bits.

use super::*;
use crate::finetune::cut::Packed;
use crate::ir::{AttributeKind, Node, Value, ValueId};
use crate::runtime::{Runtime, SessionOptions};

const LAYERS: [usize; 2] = [2, 4];
const BLOCK: u64 = 16;

/// The model with the products of the trained layers packed, and the same with what these hold as floats.
fn packed_and_float(zero_points: bool) -> (Model, Model) {
    let dense = Bundle::open(&model()).unwrap();
    let mut packed = crate::onnx::load(&dense.path_of(dense.require(Role::Decoder).unwrap())).unwrap();
    let mut float = packed.clone();
    let analysis = crate::analysis::analyse(&packed).unwrap();
    let trained: Vec<ValueId> = LAYERS.iter().flat_map(|&layer| analysis.map.layers[layer].weights.clone()).collect();
    packed.opset_imports.insert("com.microsoft".to_string(), 1);
    let mut count = 0;
    for place in 0..packed.graph.body.nodes.len() {
        let old = packed.graph.body.nodes[place].clone();
        let Some(weight) = old.inputs.get(1).copied().flatten().filter(|weight| trained.contains(weight)) else {
            continue;
        };
        let Some(tensor) = packed.graph.body.initializer(weight).cloned() else { continue };
        let &[rows, columns] = tensor.dims.as_slice() else { continue };
        if old.op_type != "MatMul" || rows < BLOCK {
            continue;
        }
        let blocks = rows.div_ceil(BLOCK);
        let graph = &mut packed.graph;
        let mut add = |end: &str, tensor: Tensor| {
            let name = format!("{}.{end}", graph.name(weight));
            let id = graph.add_value(Value { name, ..Value::default() });
            graph.body.initializers.push((id, tensor));
            id
        };
        let empty = |dtype: DataType, dims: &[u64], size: u64| {
            Tensor::from_bytes(dtype, dims, vec![0; (dims.iter().product::<u64>() * size) as usize])
        };
        let bytes = add("packed", empty(DataType::Uint8, &[columns, blocks, BLOCK / 2], 1));
        let mut inputs = vec![old.inputs[0], Some(bytes)];
        inputs.push(Some(add("scales", empty(DataType::Float, &[columns, blocks], 4))));
        if zero_points {
            inputs.push(Some(add("zeros", empty(DataType::Uint8, &[columns, blocks.div_ceil(2)], 1))));
        }
        let sizes = [("K", rows), ("N", columns), ("bits", 4), ("block_size", BLOCK)];
        let node = Node {
            name: old.name.clone(),
            op_type: "MatMulNBits".into(),
            domain: "com.microsoft".into(),
            inputs,
            outputs: old.outputs.clone(),
            attributes: sizes.map(|(name, size)| (name.into(), AttributeKind::Int(size as i64).into())).into(),
            ..Node::default()
        };
        let form = Packed::of(graph, &node).unwrap();
        let numbers: Vec<f32> = tensor.to_f64s().unwrap().into_iter().map(|number| number as f32).collect();
        for (id, tensor) in form.packed(graph, &turned(&numbers, columns as usize)) {
            graph.body.initializers.iter_mut().find(|(other, _)| *other == id).unwrap().1 = tensor;
        }
        let held = turned(&form.floats(graph), rows as usize);
        float.graph.body.initializers.iter_mut().find(|(other, _)| *other == weight).unwrap().1 =
            Tensor::from_f32(&tensor.dims, &held);
        graph.body.nodes[place] = node;
        // In the float weight's place, so that adapters of both models begin with the same numbers.
        let of =
            |graph: &crate::ir::Graph, id| graph.body.initializers.iter().position(|(other, _)| *other == id).unwrap();
        let own = graph.body.initializers.remove(of(graph, bytes));
        let old = of(graph, weight);
        graph.body.initializers[old] = own;
        count += 1;
    }
    assert!(count >= 10, "{count} products");
    (packed, float)
}

/// The transpose of a matrix with rows of `width` numbers.
fn turned(numbers: &[f32], width: usize) -> Vec<f32> {
    (0..width).flat_map(|column| numbers.iter().skip(column).step_by(width).copied()).collect()
}

fn bundle_of(decoder: &Model, folder: &Path) -> Bundle {
    let dense = Bundle::open(&model()).unwrap();
    let target = folder.join("model");
    let mut writer = BundleWriter::create(&dense, &target).unwrap();
    writer.save(dense.require(Role::Decoder).unwrap(), decoder).unwrap();
    writer.commit(Provenance::new(Record::SCHEMA_VERSION, BTreeMap::new(), &()).unwrap()).unwrap();
    Bundle::open(&target).unwrap()
}

fn heal(decoder: &Model, settings: &Settings) -> (Result<Outcome>, Vec<StepMetrics>) {
    let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let bundle = bundle_of(decoder, folder.path());
    let request = Request {
        bundle: &bundle,
        layers: &LAYERS,
        data: &Texts { vocabulary: 800 },
        settings,
        device: Device::Cpu,
        work: work.path(),
        resume: false,
        limits: Limits::default(),
        ranks: None,
        features: &FeatureCache::new(1 << 20),
    };
    let mut steps = Vec::new();
    let _alone = alone();
    let outcome = finetune(&request, &Cancel::default(), &mut |metrics| steps.push(metrics.clone()));
    (outcome, steps)
}

/// The numbers of all packed weights, `[N, K]`, by the node's name.
fn packed_weights(decoder: &Model) -> BTreeMap<String, (Packed, Vec<f32>)> {
    let nodes = decoder.graph.body.nodes.iter().filter(|node| node.op_type == "MatMulNBits");
    let found = nodes.map(|node| {
        let packed = Packed::of(&decoder.graph, node).unwrap();
        (node.name.clone(), (packed, packed.floats(&decoder.graph)))
    });
    found.collect()
}

#[test]
fn adapters_heal_beside_packed_weights_as_beside_floats() {
    let settings = settings().with(|s| {
        (s.lora.rank, s.lora.alpha, s.schedule.kind) = (4, 16.0, Schedule::Constant);
        s.optimizer.learning_rate = LearningRate::One(1e-2);
        (s.batch.size, s.schedule.max_steps) = (8, Some(12));
    });
    for zero_points in [false, true] {
        let (packed, float) = packed_and_float(zero_points);
        let before = packed_weights(&packed);
        let (outcome, steps) = heal(&packed, &settings);
        let outcome = outcome.unwrap();
        let (reference, want) = heal(&float, &settings);
        reference.unwrap();
        assert!(
            steps.last().unwrap().loss < 0.9 * steps[0].loss,
            "{} to {}",
            steps[0].loss,
            steps.last().unwrap().loss
        );
        for (found, want) in steps.iter().zip(&want) {
            let off = |a: f64, b: f64| (a - b).abs() / b;
            // AdamW divides a gradient by its own size, so the last bits of small ones show from the second step on.
            let (loss, norm) = if want.step == 1 { (1e-6, 1e-5) } else { (1e-3, 1e-2) };
            assert!(off(found.loss, want.loss) < loss, "step {}: {} and {}", want.step, found.loss, want.loss);
            let norms = (found.grad_norm, want.grad_norm);
            assert!(off(norms.0, norms.1) < norm, "step {}: {norms:?}", want.step);
        }
        // Both forms load; the packed one is the float one to within a step of each block.
        let written = settings.clone().with(|s| s.lora.write = WriteTrained::Float);
        let floats = heal(&packed, &written).0.unwrap().decoder;
        for decoder in [&outcome.decoder, &floats] {
            Runtime::new(Device::Cpu).unwrap().session_of(decoder, &SessionOptions::default()).unwrap();
        }
        assert!(packed_weights(&floats).is_empty());
        let after = packed_weights(&outcome.decoder);
        assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
        for (name, (form, found)) in &after {
            let node = floats.graph.body.nodes.iter().find(|node| node.name == *name).unwrap();
            let weight = floats.graph.body.initializer(node.inputs[1].unwrap()).unwrap();
            assert_eq!(
                (node.op_type.as_str(), weight.dims.as_slice()),
                ("MatMul", &[form.rows as u64, form.columns as u64][..])
            );
            let want: Vec<f32> = weight.to_f64s().unwrap().into_iter().map(|number| number as f32).collect();
            let want = turned(&want, form.columns);
            assert!(before[name].1 != *found, "{name} did not change");
            let again = form.packed(&outcome.decoder.graph, &want);
            for (id, tensor) in again {
                assert_eq!(tensor.bytes(), outcome.decoder.graph.body.initializer(id).unwrap().bytes(), "{name}");
            }
        }
    }
}

#[test]
fn packed_weights_without_adapters_are_refused() {
    let (outcome, _) = heal(&packed_and_float(false).0, &settings());
    let message = outcome.err().unwrap().to_string();
    assert!(message.contains("layer 2") && message.contains("--lora-rank 16"), "{message}");
}
