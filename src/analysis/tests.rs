use std::path::Path;

use super::*;
use crate::ir::{Node, Tensor, Value, ValueId};
use crate::onnx;

fn zoo(name: &str) -> Analysis {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(name);
    analyse(&onnx::load(&path).unwrap()).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn value(graph: &mut Graph, name: &str) -> ValueId {
    graph.add_value(Value { name: name.into(), ..Value::default() })
}

fn weight(graph: &mut Graph) -> ValueId {
    let id = value(graph, "w");
    graph.body.initializers.push((id, Tensor::from_f32(&[4, 4], &[0.5; 16])));
    id
}

fn node(graph: &mut Graph, op_type: &str, inputs: &[ValueId], outputs: usize) -> Vec<ValueId> {
    let made: Vec<ValueId> = (0..outputs).map(|_| value(graph, "v")).collect();
    graph.body.nodes.push(Node {
        op_type: op_type.into(),
        domain: if op_type.ends_with("State") || op_type == "LinearAttention" { "com.microsoft" } else { "" }.into(),
        inputs: inputs.iter().copied().map(Some).collect(),
        outputs: made.iter().copied().map(Some).collect(),
        ..Node::default()
    });
    made
}

#[test]
fn eight_layers_are_found_in_the_graphs_of_every_exporter() {
    let table = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo/cases.tsv")).unwrap();
    assert!(table.lines().count() >= 15, "{table}");
    for line in table.lines() {
        let name = line.split('\t').next().unwrap();
        let found = zoo(name);
        let map = &found.map;
        assert_eq!(map.layers.len(), 8, "{name}");
        for layer in &map.layers {
            let roles: Vec<PortRole> = layer.ports.iter().map(|port| port.role).collect();
            assert_eq!(roles, [PortRole::Key, PortRole::Value], "{name} layer {}", layer.index);
            let name_of = |id: Option<crate::ir::ValueId>| id.map(|id| found.model.graph.name(id)).unwrap_or("");
            for (port, word) in layer.ports.iter().zip(["key", "value"]) {
                for port_name in [name_of(port.past), name_of(port.present)] {
                    let numbered = port_name.contains(&format!(".{}.", layer.index)) && port_name.contains(word);
                    assert!(numbered, "{name} layer {}: `{port_name}`", layer.index);
                }
            }
            assert_eq!(layer.class, 0, "{name} layer {}", layer.index);
            let own = |port: &KvPort| port.past.is_some_and(|id| layer.shared_values.contains(&id));
            assert!(!layer.ports.iter().any(own), "{name} layer {}: its own cache is not shared", layer.index);
        }
    }
}

/// Layers of a short convolution with a state, or of a gated outer-product recurrence, as in hybrid models.
fn hybrid(recurrent: bool) -> Model {
    let mut model = Model::default();
    let graph = &mut model.graph;
    let mut stream = value(graph, "inputs_embeds");
    graph.body.inputs.push(stream);
    for layer in 0..3 {
        let past = value(graph, &format!("past.{layer}"));
        graph.body.inputs.push(past);
        let (first, second) = (weight(graph), weight(graph));
        let x = node(graph, "MatMul", &[stream, first], 1)[0];
        let branch = if recurrent {
            let outer = node(graph, "MatMul", &[x, x], 1)[0];
            let state = node(graph, "Add", &[past, outer], 1)[0];
            graph.body.outputs.push(state);
            node(graph, "MatMul", &[x, state], 1)[0]
        } else {
            let joined = node(graph, "Concat", &[past, x], 1)[0];
            let state = node(graph, "Slice", &[joined], 1)[0];
            graph.body.outputs.push(state);
            let kernel = weight(graph);
            node(graph, "Conv", &[joined, kernel], 1)[0]
        };
        let branch = node(graph, "MatMul", &[branch, second], 1)[0];
        stream = node(graph, "Add", &[stream, branch], 1)[0];
    }
    graph.body.outputs.insert(0, stream);
    model
}

#[test]
fn hybrid_layers_have_the_right_kind_and_their_own_states() {
    for (recurrent, kind) in [(false, "short convolution"), (true, "linear attention")] {
        let found = analyse(&hybrid(recurrent)).unwrap();
        assert_eq!(found.map.layers.len(), 3, "{kind}");
        for layer in &found.map.layers {
            assert_eq!(layer.kind, kind);
            let past: Vec<String> = layer
                .ports
                .iter()
                .map(|port| port.past.map(|id| found.model.graph.name(id).to_string()).unwrap_or_default())
                .collect();
            assert_eq!(past, [format!("past.{}", layer.index)], "{kind}");
            assert_eq!(layer.ports[0].role, PortRole::State(0));
        }
    }
}

#[test]
fn convolution_and_recurrent_states_of_a_layer_are_distinguished() {
    let mut model = Model::default();
    let graph = &mut model.graph;
    let mut stream = value(graph, "inputs_embeds");
    graph.body.inputs.push(stream);
    for layer in 0..2 {
        let [conv, state] = ["conv", "recurrent"].map(|name| value(graph, &format!("past.{layer}.{name}")));
        graph.body.inputs.extend([conv, state]);
        let [weight, kernel, bias] = [(); 3].map(|()| weight(graph));
        let x = node(graph, "MatMul", &[stream, weight], 1)[0];
        let mixed = node(graph, "CausalConvWithState", &[x, kernel, bias, conv], 2);
        let out = node(graph, "LinearAttention", &[mixed[0], mixed[0], mixed[0], state], 2);
        graph.body.outputs.extend([out[1], mixed[1]]);
        stream = node(graph, "Add", &[stream, out[0]], 1)[0];
    }
    graph.body.outputs.insert(0, stream);
    let found = analyse(&model).unwrap();
    for layer in &found.map.layers {
        assert_eq!(layer.kind, "linear attention");
        let past = |port: &KvPort| found.model.graph.name(port.past.unwrap()).to_string();
        let past: Vec<String> = layer.ports.iter().map(past).collect();
        assert_eq!(past, [format!("past.{}.recurrent", layer.index), format!("past.{}.conv", layer.index)]);
    }
}

/// Quantisers replace the products by other operators; the caches are still recognised by the source of their entries.
#[test]
fn low_bit_matrix_products_count_as_matrix_products() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model/onnx/decoder_model_merged.onnx");
    let plain = onnx::load(&path).unwrap();
    let ports = |model: &Model| -> Vec<String> {
        let analysis = analyse(model).unwrap();
        analysis.map.layers.iter().map(|layer| format!("{:?} {:?}", layer.kind, layer.ports)).collect()
    };
    let want = ports(&plain);
    assert_eq!(want.len(), 16);
    let weights: Vec<ValueId> = plain.graph.body.initializers.iter().map(|(id, _)| *id).collect();
    for op_type in ["MatMulNBits", "MatMulBnb4", "DynamicQuantizeMatMul", "QLinearMatMul", "MatMulInteger"] {
        let mut model = plain.clone();
        for mut product in std::mem::take(&mut model.graph.body.nodes) {
            if product.op_type != "MatMul" || !product.inputs[1].is_some_and(|id| weights.contains(&id)) {
                model.graph.body.nodes.push(product);
                continue;
            }
            (product.domain, product.op_type) = ("com.microsoft".into(), op_type.into());
            let (stream, weight, scale) = (product.inputs[0].unwrap(), product.inputs[1], Some(weights[0]));
            match op_type {
                "QLinearMatMul" => {
                    product.inputs = vec![Some(stream), scale, scale, weight, scale, scale, scale, scale]
                }
                "MatMulInteger" => {
                    let result = product.outputs[0].take();
                    let few = node(&mut model.graph, "DynamicQuantizeLinear", &[stream], 3);
                    product.inputs = vec![Some(few[0]), weight, Some(few[2])];
                    let whole = model.graph.add_value(Value::default());
                    product.outputs = vec![Some(whole)];
                    model.graph.body.nodes.push(product);
                    let float = node(&mut model.graph, "Cast", &[whole], 1)[0];
                    node(&mut model.graph, "Mul", &[float, few[1]], 1);
                    model.graph.body.nodes.last_mut().unwrap().outputs = vec![result];
                    continue;
                }
                _ => {}
            }
            model.graph.body.nodes.push(product);
        }
        assert_eq!(ports(&model), want, "{op_type}");
    }
}

/// Layers of one fused operator whose outputs are `(result, first cache, second cache)`.
fn fused(domain: &str, op_type: &str, inputs: usize, past: [usize; 2]) -> Model {
    let mut model = Model::default();
    let graph = &mut model.graph;
    let mut stream = value(graph, "inputs_embeds");
    graph.body.inputs.push(stream);
    for layer in 0..3 {
        let caches = ["key", "value"].map(|part| value(graph, &format!("{part}_cache.{layer}")));
        graph.body.inputs.extend(caches);
        let [query, key, mixed] = [(); 3].map(|()| weight(graph));
        let [query, key] = [query, key].map(|weight| node(graph, "MatMul", &[stream, weight], 1)[0]);
        let made = node(graph, op_type, &[query], 3);
        let attention = graph.body.nodes.last_mut().unwrap();
        attention.domain = domain.into();
        attention.inputs = vec![None; inputs];
        (attention.inputs[0], attention.inputs[1], attention.inputs[2]) = (Some(query), Some(key), Some(key));
        (attention.inputs[past[0]], attention.inputs[past[1]]) = (Some(caches[0]), Some(caches[1]));
        graph.body.outputs.extend([made[1], made[2]]);
        let out = node(graph, "MatMul", &[made[0], mixed], 1)[0];
        stream = node(graph, "Add", &[stream, out], 1)[0];
    }
    graph.body.outputs.insert(0, stream);
    model
}

#[test]
fn fused_attention_with_a_cache_is_supported_or_refused_by_name() {
    for (op_type, inputs, past) in [("GroupQueryAttention", 7, [3, 4]), ("PagedAttention", 10, [3, 4])] {
        let found = analyse(&fused("com.microsoft", op_type, inputs, past)).unwrap();
        for layer in &found.map.layers {
            let past: Vec<&str> = layer.ports.iter().map(|port| found.model.graph.name(port.past.unwrap())).collect();
            assert_eq!(
                past,
                [format!("key_cache.{}", layer.index), format!("value_cache.{}", layer.index)],
                "{op_type}"
            );
            assert_eq!(layer.ports.iter().map(|port| port.role).collect::<Vec<_>>(), [PortRole::Key, PortRole::Value]);
        }
    }
    let message = analyse(&fused("com.vendor", "CachedAttention", 5, [3, 4])).unwrap_err().to_string();
    assert!(message.contains("com.vendor.CachedAttention") && message.contains("cache"), "{message}");
}
