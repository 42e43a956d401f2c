use std::collections::HashMap;
use std::path::Path;

use super::*;
use crate::analysis::analyse;
use crate::ir::{Attribute, DataType, Graph, Model, Node, Tensor, Value, ValueId, ValueType};
use crate::onnx;

fn zoo(name: &str) -> Model {
    onnx::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(name)).unwrap()
}

fn cases() -> Vec<String> {
    let table = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo/cases.tsv")).unwrap();
    table.lines().filter_map(|line| line.split('\t').next().map(str::to_string)).collect()
}

fn operators(model: &Model) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for node in &model.graph.body.nodes {
        *counts.entry(node.op()).or_default() += 1;
    }
    counts
}

#[test]
fn an_empty_plan_changes_no_operator_and_no_weight() {
    for name in cases() {
        let model = zoo(&name);
        let same = drop_layers(&analyse(&model).unwrap(), &[]).unwrap();
        assert_eq!(operators(&model), operators(&same), "{name}");
        let bytes = |model: &Model| -> HashMap<String, Vec<u8>> {
            let graph = &model.graph;
            graph.body.initializers.iter().map(|(id, t)| (graph.name(*id).to_string(), t.bytes().to_vec())).collect()
        };
        assert_eq!(bytes(&model), bytes(&same), "{name}");
    }
}

#[test]
fn ports_are_renumbered_without_gaps() {
    for name in cases() {
        let model = zoo(&name);
        let pruned = drop_layers(&analyse(&model).unwrap(), &[0, 2, 7]).unwrap();
        let map = analyse(&pruned).unwrap().map;
        assert_eq!(map.layers.len(), 5, "{name}");
        let names = |model: &Model| -> Vec<String> {
            let graph = &model.graph;
            graph.body.inputs.iter().chain(&graph.body.outputs).map(|id| graph.name(*id).to_string()).collect()
        };
        let want: Vec<String> = names(&model)
            .into_iter()
            .filter(|port| {
                !["5", "6", "7"]
                    .iter()
                    .any(|number| port.contains(&format!(".{number}.")) || port.ends_with(&format!(".{number}")))
            })
            .collect();
        assert_eq!(names(&pruned), want, "{name}");
        assert_eq!(original_layers(&pruned, 5), [1, 3, 4, 5, 6]);
    }
}

#[test]
fn layers_that_cannot_be_dropped_are_refused() {
    let analysis = analyse(&zoo("smolvlm/ts17.onnx")).unwrap();
    for (drop, want) in
        [(vec![8], "layer 8 does not exist"), (vec![2, 2], "named twice"), ((0..8).collect(), "nothing would be left")]
    {
        let message = drop_layers(&analysis, &drop).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    }
}

#[test]
fn skip_norms_keep_all_their_outputs() {
    let outputs = |model: &Model| -> Vec<Vec<String>> {
        let graph = &model.graph;
        let name = |id: &Option<crate::ir::ValueId>| id.map(|id| graph.name(id).to_string()).unwrap_or_default();
        let fused = graph.body.nodes.iter().filter(|node| node.op_type.starts_with("Skip"));
        fused.map(|node| node.outputs.iter().map(name).collect()).collect()
    };
    let model = zoo("qwen3_vl/mobius.onnx");
    assert!(outputs(&model).iter().all(|names| names.len() == 4 && !names.contains(&String::new())));
    let analysis = analyse(&model).unwrap();
    assert_eq!(outputs(&drop_layers(&analysis, &[]).unwrap()), outputs(&model));
    let pruned = outputs(&drop_layers(&analysis, &[0, 7]).unwrap());
    assert_eq!(pruned.len(), 12);
    assert!(pruned.iter().all(|names| names.len() == 4 && !names.contains(&String::new())));
}

/// Layers whose last product has a bias that a fused skip norm adds inside the next layer's first norm.
fn biased_skip_norms() -> Model {
    fn value(graph: &mut Graph, name: String) -> ValueId {
        graph.add_value(Value { name, ..Value::default() })
    }
    fn weight(graph: &mut Graph, name: String) -> ValueId {
        let id = value(graph, name);
        graph.body.initializers.push((id, Tensor::from_f32(&[10, 10], &[0.5; 100])));
        id
    }
    fn node(graph: &mut Graph, domain: &str, op_type: &str, inputs: &[ValueId], outputs: &[usize]) -> Vec<ValueId> {
        let made: Vec<ValueId> = outputs.iter().map(|_| value(graph, format!("v{}", graph.values.len()))).collect();
        let mut slots = vec![None; outputs.iter().max().map_or(0, |last| last + 1)];
        for (&slot, &id) in outputs.iter().zip(&made) {
            slots[slot] = Some(id);
        }
        graph.body.nodes.push(Node {
            name: format!("node {}", graph.body.nodes.len()),
            domain: domain.into(),
            op_type: op_type.into(),
            inputs: inputs.iter().copied().map(Some).collect(),
            outputs: slots,
            ..Node::default()
        });
        made
    }
    let mut model = Model { ir_version: 10, ..Model::default() };
    model.opset_imports.extend([(String::new(), 18), ("com.microsoft".to_string(), 1)]);
    let graph = &mut model.graph;
    let mut stream = value(graph, "inputs_embeds".into());
    graph.body.inputs.push(stream);
    let scale = weight(graph, "norm.weight".into());
    let mut normed = node(graph, "", "LayerNormalization", &[stream, scale, scale], &[0])[0];
    for layer in 0..4 {
        let linear = |graph: &mut Graph, x: ValueId, name: &str| {
            let matrix = weight(graph, format!("{layer}.{name}"));
            node(graph, "", "MatMul", &[x, matrix], &[0])[0]
        };
        let [q, k, v] = ["q", "k", "v"].map(|name| linear(graph, normed, name));
        let scores = node(graph, "", "MatMul", &[q, k], &[0])[0];
        let shares = node(graph, "", "Softmax", &[scores], &[0])[0];
        let mixed = node(graph, "", "MatMul", &[shares, v], &[0])[0];
        let mixed = linear(graph, mixed, "o");
        let skip = |graph: &mut Graph, branch: ValueId, stream: ValueId, bias: &str| {
            let bias = weight(graph, format!("{layer}.{bias}"));
            let made =
                node(graph, "com.microsoft", "SkipLayerNormalization", &[branch, stream, scale, scale, bias], &[0, 3]);
            (made[0], made[1])
        };
        (normed, stream) = skip(graph, mixed, stream, "o_bias");
        let up = linear(graph, normed, "up");
        let up = node(graph, "", "Relu", &[up], &[0])[0];
        let down = linear(graph, up, "down");
        (normed, stream) = skip(graph, down, stream, "down_bias");
    }
    graph.body.outputs.push(normed);
    model
}

#[test]
fn a_bias_added_by_the_next_norm_is_dropped_with_its_layer() {
    let model = biased_skip_norms();
    let analysis = analyse(&model).unwrap();
    assert_eq!(analysis.map.layers.len(), 4);
    assert!(analysis.map.glue.is_empty(), "{:?}", analysis.map.glue);
    for drop in [vec![0], vec![2], vec![3], vec![0, 3]] {
        let pruned = drop_layers(&analysis, &drop).unwrap();
        let graph = &pruned.graph;
        let names: Vec<&str> = graph.body.initializers.iter().map(|(id, _)| graph.name(*id)).collect();
        for layer in 0..4 {
            let own = names.iter().filter(|name| name.starts_with(&format!("{layer}."))).count();
            assert_eq!(own, if drop.contains(&layer) { 0 } else { 8 }, "layer {layer} without {drop:?}: {names:?}");
        }
        assert_eq!(operators(&pruned)["com.microsoft.SkipLayerNormalization"], 8 - 2 * drop.len(), "{drop:?}");
        let biases = graph.body.nodes.iter().filter(|node| node.op_type.starts_with("Skip"));
        assert!(biases.into_iter().all(|node| node.inputs.len() == 5), "{drop:?}");
    }
}

/// Half precision in weights, constants and casts becomes f32. The stored bytes of the weights stay unchanged.
#[test]
fn half_precision_is_widened_to_f32() {
    let model = zoo("post/qwen3_vl-ts17__fp16.onnx");
    let wide = widened(&model).expect("half precision");
    crate::ir::check(&wide).expect("sound");
    let narrow = |dtype: DataType| matches!(dtype, DataType::Float16 | DataType::Bfloat16);
    let stored: Vec<_> = wide.graph.body.initializers.iter().filter(|(_, tensor)| narrow(tensor.dtype)).collect();
    assert!(stored.len() > 50, "{}", stored.len());
    for (id, _) in &stored {
        let readers: Vec<_> =
            wide.graph.body.nodes.iter().filter(|node| node.present_inputs().any(|input| input == *id)).collect();
        assert!(matches!(&readers[..], [cast] if cast.op_type == "Cast"), "{}", wide.graph.name(*id));
    }
    assert!(
        wide.graph.values.iter().all(|value| value.ty.as_ref().and_then(ValueType::dtype).is_none_or(|ty| !narrow(ty)))
    );
    let casts = wide.graph.body.nodes.iter().filter(|node| node.op_type == "Cast");
    let to = |node: &Node| node.attribute("to").and_then(Attribute::as_int);
    assert!(casts.clone().all(|node| to(node) != Some(DataType::Float16 as i64)));
    let bytes =
        |model: &Model| model.graph.body.initializers.iter().map(|(_, t)| t.bytes().to_vec()).collect::<Vec<_>>();
    assert_eq!(bytes(&wide), bytes(&model));
    assert!(widened(&zoo("llama/ts17-noname.onnx")).is_none());
}

/// The encoder's only output comes from the last fused norm, and keys for a decoder are computed from it.
#[test]
fn dropping_the_last_layer_keeps_the_output_after_it() {
    let mut model = biased_skip_norms();
    let graph = &mut model.graph;
    let states = graph.body.outputs[0];
    graph.values[states.index()].name = "hidden_states".into();
    for layer in 0..2 {
        let weight = graph.add_value(Value { name: format!("cross.{layer}"), ..Value::default() });
        graph.body.initializers.push((weight, Tensor::from_f32(&[10, 10], &[0.5; 100])));
        let keys = graph.add_value(Value { name: format!("present_key_cross_{layer}"), ..Value::default() });
        graph.body.nodes.push(Node {
            op_type: "MatMul".into(),
            inputs: vec![Some(states), Some(weight)],
            outputs: vec![Some(keys)],
            ..Node::default()
        });
        graph.body.outputs.push(keys);
    }
    let names = |model: &Model| -> Vec<String> {
        model.graph.body.outputs.iter().map(|id| model.graph.name(*id).to_string()).collect()
    };
    let analysis = analyse(&model).unwrap();
    assert!(analysis.map.layers.iter().all(|layer| layer.ports.is_empty()));
    for drop in [vec![0], vec![3], vec![2, 3]] {
        let pruned = drop_layers(&analysis, &drop).unwrap();
        assert_eq!(names(&pruned), names(&model), "{drop:?}");
        assert_eq!(analyse(&pruned).unwrap().map.layers.len(), 4 - drop.len(), "{drop:?}");
    }
}

/// A norm after only one layer could belong to that layer, to the next one or to neither.
#[test]
fn weights_after_only_some_layers_are_refused() {
    let mut model = biased_skip_norms();
    let graph = &mut model.graph;
    // After layer 1, whose last sum is one node with the norm of the next layer.
    let fused: Vec<usize> =
        (0..graph.body.nodes.len()).filter(|&number| graph.body.nodes[number].op_type.starts_with("Skip")).collect();
    let sum = graph.body.nodes[fused[3]].outputs[3].unwrap();
    let scale = graph.body.initializers[0].0;
    let normed = graph.add_value(Value { name: "normed stream".into(), ..Value::default() });
    for node in &mut graph.body.nodes[fused[3] + 1..] {
        node.inputs.iter_mut().flatten().filter(|id| **id == sum).for_each(|id| *id = normed);
    }
    let next = graph.body.nodes[fused[3]].outputs[0].unwrap();
    graph.body.nodes[fused[3]].outputs[0] = Some(graph.add_value(Value { name: "unread".into(), ..Value::default() }));
    let norm = |input, output| Node {
        op_type: "LayerNormalization".into(),
        inputs: vec![Some(input), Some(scale)],
        outputs: vec![Some(output)],
        ..Node::default()
    };
    graph.body.nodes.insert(fused[3] + 1, norm(sum, normed));
    graph.body.nodes.insert(fused[3] + 2, norm(normed, next));
    let analysis = analyse(&model).unwrap();
    assert_eq!(analysis.map.layers.len(), 4);
    for layer in [1, 2] {
        let message = drop_layers(&analysis, &[layer]).unwrap_err().to_string();
        assert!(message.contains(&format!("layer {layer}:")) && message.contains("LayerNormalization"), "{message}");
    }
    for layer in [0, 3] {
        drop_layers(&analysis, &[layer]).unwrap();
    }
}
