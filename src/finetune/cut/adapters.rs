//! Low-rank adapters: nodes parallel to the products of frozen weights.
//!
//! A product `y = x W` becomes `y = x W + alpha / r * (x A) B`, `A` `[K, r]`, `B` `[r, D]`. `A` is initialised at
//! random and `B` to 0, so the network's output is unchanged at the start (Hu et al. 2021, arXiv:2106.09685, section
//! 4.1). `W` has no gradient. When another operator reads the weight, as with a stack of experts, its readers read
//! `W + alpha / r * A B` instead. In both cases that sum is the weight of the finetuned model.

use std::collections::{BTreeMap, HashMap, HashSet};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::base::{Error, Result};
use crate::finetune::settings::Lora;
use crate::ir::{Attribute, Graph, GraphIndex, Node, Tensor, Value, ValueId};
use crate::rewrite::replace_uses;

use super::suffix::reads;
use super::weights::dims_of;

/// Stream number of the seeded generator for adapters. The sampler's streams count from 0.
const STREAM: u64 = u64::MAX;

/// A weight with an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adapted {
    pub weight: ValueId,
    /// `[.., K, r]`.
    pub a: ValueId,
    /// `[.., r, D]`.
    pub b: ValueId,
    /// True when the weight is stored as `[D, K]`.
    pub transposed: bool,
}

/// Readers of a weight.
enum Reads {
    /// Only products; `nodes` are their indices.
    Products {
        nodes: Vec<usize>,
        transposed: bool,
    },
    Otherwise,
}

/// Adds adapters to all of `weights` that are matrices, or stacks of them, with both sides above the rank. The other
/// weights get none.
///
/// Errors: `Error::Invalid` when no weight is large enough.
pub fn adapt(graph: &mut Graph, weights: &[ValueId], lora: Lora) -> Result<Vec<Adapted>> {
    let rank = u64::from(lora.rank);
    let mut rng = ChaCha8Rng::seed_from_u64(lora.seed);
    rng.set_stream(STREAM);
    let mut adapted = Vec::new();
    let mut after: BTreeMap<usize, Vec<Node>> = BTreeMap::new();
    let mut before: BTreeMap<usize, Vec<Node>> = BTreeMap::new();
    let scale = add(graph, "lora.scale".to_string(), Tensor::from_f32(&[], &[lora.scale() as f32]));
    let index = GraphIndex::new(graph);
    let reads: Vec<Reads> = weights.iter().map(|&weight| reads_of(graph, &index, weight)).collect();
    for (&weight, reads) in weights.iter().zip(reads) {
        let Some(dims) = dims_of(graph, weight) else { continue };
        let [stack @ .., rows, columns] = dims.as_slice() else { continue };
        if (*rows).min(*columns) <= rank {
            continue;
        }
        let transposed = matches!(reads, Reads::Products { transposed: true, .. });
        let (k, d) = if transposed { (*columns, *rows) } else { (*rows, *columns) };
        let thin = |last: [u64; 2]| [stack, &last].concat();
        let bound = 1.0 / (k as f32).sqrt();
        let count: u64 = thin([k, rank]).iter().product();
        let numbers: Vec<f32> = (0..count).map(|_| rng.random_range(-bound..bound)).collect();
        let name = graph.name(weight).to_string();
        let a = add(graph, format!("{name}.lora_A"), Tensor::from_f32(&thin([k, rank]), &numbers));
        let zeros = vec![0.0; thin([rank, d]).iter().product::<u64>() as usize];
        let b = add(graph, format!("{name}.lora_B"), Tensor::from_f32(&thin([rank, d]), &zeros));
        match reads {
            Reads::Products { nodes, .. } => {
                for number in nodes {
                    let own = adapter_nodes(graph, number, &name, (a, b, scale));
                    after.entry(number).or_default().extend(own);
                }
            }
            Reads::Otherwise => {
                let (number, own) = summed(graph, weight, &name, (a, b, scale));
                before.entry(number).or_default().extend(own);
            }
        }
        adapted.push(Adapted { weight, a, b, transposed });
    }
    if adapted.is_empty() {
        return Err(Error::invalid(
            "finetune setting `lora.rank`",
            format!("is {rank}, and no weight has larger sides"),
        )
        .remedy("take a smaller rank, or 0 to train the weights themselves"));
    }
    let nodes = std::mem::take(&mut graph.body.nodes);
    for (number, node) in nodes.into_iter().enumerate() {
        graph.body.nodes.extend(before.remove(&number).unwrap_or_default());
        graph.body.nodes.push(node);
        graph.body.nodes.extend(after.remove(&number).unwrap_or_default());
    }
    Ok(adapted)
}

fn add(graph: &mut Graph, name: String, tensor: Tensor) -> ValueId {
    let name = graph.fresh_name(&name);
    let id = graph.add_value(Value { name, ..Value::default() });
    graph.body.initializers.push((id, tensor));
    id
}

fn node(op_type: &str, name: String, inputs: &[ValueId], output: ValueId) -> Node {
    let inputs = inputs.iter().map(|id| Some(*id)).collect();
    Node { name, op_type: op_type.to_string(), inputs, outputs: vec![Some(output)], ..Node::default() }
}

/// True when nothing but products reads a weight.
pub(super) fn reads_by_products(graph: &Graph, index: &GraphIndex, weight: ValueId) -> bool {
    matches!(reads_of(graph, index, weight), Reads::Products { .. })
}

fn reads_of(graph: &Graph, index: &GraphIndex, weight: ValueId) -> Reads {
    let nodes = &graph.body.nodes;
    let readers = |id: ValueId| -> Vec<usize> {
        let all = nodes.iter().enumerate().filter(|(_, node)| node.present_inputs().any(|input| input == id));
        all.map(|(number, _)| number).collect()
    };
    let matrix = dims_of(graph, weight).is_some_and(|dims| dims.len() == 2);
    let captured: HashSet<ValueId> =
        nodes.iter().flat_map(|node| node.bodies().flat_map(crate::ir::captured)).collect();
    if !matrix || captured.contains(&weight) {
        return Reads::Otherwise;
    }
    let mut products = Vec::new();
    let mut turns = HashSet::new();
    for number in readers(weight) {
        let reader = &nodes[number];
        let turned = reader.op_type == "Transpose"
            && reader.attribute("perm").is_none_or(|perm| perm.as_ints() == Some(&[1, 0]));
        let ends: Vec<(usize, ValueId, bool)> = match (turned, reader.outputs.first().copied().flatten()) {
            (true, Some(output)) if index.output_position(output).is_none() && !captured.contains(&output) => {
                readers(output).into_iter().map(|number| (number, output, true)).collect()
            }
            _ => vec![(number, weight, false)],
        };
        for (number, right, turned) in ends {
            let Some(own) = product_turn(&nodes[number], right) else { return Reads::Otherwise };
            turns.insert(own != turned);
            products.push(number);
        }
    }
    match (products.is_empty(), turns.len()) {
        (false, 1) => Reads::Products { nodes: products, transposed: turns.contains(&true) },
        _ => Reads::Otherwise,
    }
}

/// Whether a product transposes its right operand. None unless `node` is a plain product that reads `right` as its
/// right operand only.
fn product_turn(node: &Node, right: ValueId) -> Option<bool> {
    let flag = |name: &str| node.attribute(name).map_or(Some(0), Attribute::as_int).map(|value| value != 0);
    let &[Some(left), Some(own), ..] = node.inputs.as_slice() else { return None };
    if own != right || left == right || node.inputs.iter().skip(2).any(|input| *input == Some(right)) {
        return None;
    }
    match node.op_type.as_str() {
        "MatMul" if node.domain.is_empty() => Some(false),
        "Gemm" => {
            let alpha = node.attribute("alpha").map_or(Some(1.0), Attribute::as_float)?;
            if alpha != 1.0 || flag("transA")? {
                return None;
            }
            flag("transB")
        }
        _ => None,
    }
}

/// Nodes of the adapter of product `number`. The product gets a new output, and the adapter's sum produces the value
/// that the product produced before.
fn adapter_nodes(
    graph: &mut Graph,
    number: usize,
    name: &str,
    (a, b, scale): (ValueId, ValueId, ValueId),
) -> Vec<Node> {
    let product = &graph.body.nodes[number];
    let (Some(Some(x)), Some(Some(y))) = (product.inputs.first().copied(), product.outputs.first().copied()) else {
        return Vec::new();
    };
    let mut value = |end: &str| {
        let name = graph.fresh_name(&format!("{name}.{end}"));
        graph.add_value(Value { name, ..Value::default() })
    };
    let [thin, wide, scaled, frozen] = ["lora_thin", "lora_wide", "lora_scaled", "frozen"].map(&mut value);
    graph.body.nodes[number].outputs[0] = Some(frozen);
    let name = |end: &str| format!("{name}.{end}");
    vec![
        node("MatMul", name("lora_A"), &[x, a], thin),
        node("MatMul", name("lora_B"), &[thin, b], wide),
        node("Mul", name("lora_scale"), &[wide, scale], scaled),
        node("Add", name("lora_sum"), &[frozen, scaled], y),
    ]
}

/// Nodes that add the adapter to a weight, and the index of the first node that reads the weight. All nodes that read the
/// weight, in their bodies too, then read the sum.
fn summed(
    graph: &mut Graph,
    weight: ValueId,
    name: &str,
    (a, b, scale): (ValueId, ValueId, ValueId),
) -> (usize, Vec<Node>) {
    let mut value = |end: &str| {
        let name = graph.fresh_name(&format!("{name}.{end}"));
        graph.add_value(Value { name, ..Value::default() })
    };
    let [product, scaled, sum] = ["lora_product", "lora_scaled", "lora_sum"].map(&mut value);
    let first = graph.body.nodes.iter().position(|node| reads(node).any(|id| id == weight)).unwrap_or(0);
    replace_uses(&mut graph.body, &HashMap::from([(weight, sum)]));
    let name = |end: &str| format!("{name}.{end}");
    let nodes = vec![
        node("MatMul", name("lora_product"), &[a, b], product),
        node("Mul", name("lora_scale"), &[product, scale], scaled),
        node("Add", name("lora_sum"), &[weight, scaled], sum),
    ];
    (first, nodes)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor as Torch};

    use super::*;
    use crate::ir::{AttributeKind, Model};
    use crate::torch::{Options, Program, tensor_to_ir};

    fn fill(size: &[i64], step: f64) -> Torch {
        let count: i64 = size.iter().product();
        (Torch::arange(count, (Kind::Float, Device::Cpu)) * step).sin().reshape(size) * 0.5
    }

    /// `z = relu((x w0) w1^T + w3)` and `s = stack w2`, where `w2` is a stack of matrices. The vector `w3` gets no
    /// adapter.
    fn network() -> (Model, Vec<ValueId>) {
        let mut model = Model { ir_version: 10, ..Default::default() };
        model.opset_imports.insert(String::new(), 21);
        let graph = &mut model.graph;
        let mut value = |name: &str| graph.add_value(Value { name: name.into(), ..Value::default() });
        let [x, stack, y, t, z, s, w0, w1, w2, w3] =
            ["x", "stack", "y", "t", "z", "s", "w0", "w1", "w2", "w3"].map(&mut value);
        let sizes: [(ValueId, &[i64]); 4] = [(w0, &[7, 5]), (w1, &[6, 5]), (w2, &[2, 7, 5]), (w3, &[6])];
        for (id, size) in sizes {
            let numbers = fill(size, 0.37);
            graph.body.initializers.push((id, tensor_to_ir("w", &numbers, crate::ir::DataType::Float).unwrap()));
        }
        let mut gemm = node("Gemm", "gemm".into(), &[y, w1, w3], t);
        gemm.attributes.push(("transB".into(), AttributeKind::Int(1).into()));
        graph.body.nodes = vec![
            node("MatMul", "first".into(), &[x, w0], y),
            gemm,
            node("Relu", "relu".into(), &[t], z),
            node("MatMul", "experts".into(), &[stack, w2], s),
        ];
        (graph.body.inputs, graph.body.outputs) = (vec![x, stack], vec![z, s]);
        (model, vec![w0, w1, w2, w3])
    }

    fn run(model: &Model, inputs: &[Torch; 2]) -> Vec<Torch> {
        let program = Program::compile(model, &Options::default()).unwrap();
        let given: Vec<_> = program.inputs().iter().zip(inputs).map(|(id, x)| (*id, x.shallow_clone())).collect();
        program.run(&given, program.outputs()).unwrap()
    }

    /// A network with adapters gives the same result as the network whose weights include them.
    #[test]
    fn adapters_are_added_to_the_weights() {
        let (mut model, weights) = network();
        let inputs = [fill(&[4, 7], 0.73), fill(&[2, 3, 7], 0.91)];
        let plain = run(&model, &inputs);
        let lora = Lora { rank: 3, alpha: 6.0, seed: 1 };
        let adapted = adapt(&mut model.graph, &weights, lora).unwrap();
        assert_eq!(
            adapted.iter().map(|one| (one.weight, one.transposed)).collect::<Vec<_>>(),
            [(weights[0], false), (weights[1], true), (weights[2], false)]
        );
        crate::ir::check(&model).unwrap();
        let initial = run(&model, &inputs);
        assert!(initial.iter().zip(&plain).all(|(a, b)| a.equal(b)));
        // A non-zero `B`, and the same change merged into the weights of the plain network.
        let (mut merged, _) = network();
        for one in &adapted {
            let tensor =
                |id: ValueId| crate::torch::tensor_from_ir("w", model.graph.body.initializer(id).unwrap()).unwrap();
            let b = fill(&tensor(one.b).size(), 1.3);
            let change = tensor(one.a).matmul(&b) * lora.scale();
            let sum = tensor(one.weight) + if one.transposed { change.tr() } else { change };
            for (graph, id, new) in [(&mut model.graph, one.b, b), (&mut merged.graph, one.weight, sum)] {
                let place = graph.body.initializers.iter_mut().find(|(other, _)| *other == id).unwrap();
                place.1 = tensor_to_ir("w", &new, crate::ir::DataType::Float).unwrap();
            }
        }
        let (found, want) = (run(&model, &inputs), run(&merged, &inputs));
        assert!(found.iter().zip(&want).all(|(a, b)| a.allclose(b, 1e-5, 1e-5, false)), "{found:?}, {want:?}");
        assert!(!found[0].allclose(&plain[0], 1e-2, 1e-2, false));
    }

    /// A weight that the branches of an `If` read gets its adapter too, and counts as read there.
    #[test]
    fn adapters_are_added_where_a_body_reads_the_weight() {
        let mut model = Model { ir_version: 10, ..Default::default() };
        model.opset_imports.insert(String::new(), 21);
        let graph = &mut model.graph;
        let mut value = |name: &str| graph.add_value(Value { name: name.into(), ..Value::default() });
        let [x, flag, on, off, y, w] = ["x", "flag", "on", "off", "y", "w"].map(&mut value);
        let numbers = fill(&[7, 5], 0.37);
        graph.body.initializers.push((w, tensor_to_ir("w", &numbers, crate::ir::DataType::Float).unwrap()));
        graph.body.initializers.push((flag, Tensor::from_bytes(crate::ir::DataType::Bool, &[], vec![1])));
        let branch = |output: ValueId| {
            let nodes = vec![node("MatMul", "product".into(), &[x, w], output)];
            AttributeKind::Graph(crate::ir::Body { nodes, outputs: vec![output], ..Default::default() })
        };
        let mut either = node("If", "either".into(), &[flag], y);
        either.attributes.push(("then_branch".into(), branch(on).into()));
        either.attributes.push(("else_branch".into(), branch(off).into()));
        graph.body.nodes = vec![either];
        (graph.body.inputs, graph.body.outputs) = (vec![x], vec![y]);
        assert_eq!(crate::finetune::cut::suffix::reader_count(&graph.body.nodes, w), 1);
        let lora = Lora { rank: 3, alpha: 6.0, seed: 1 };
        let adapted = adapt(graph, &[w], lora).unwrap();
        crate::ir::check(&model).unwrap();
        let a = crate::torch::tensor_from_ir("a", model.graph.body.initializer(adapted[0].a).unwrap()).unwrap();
        let b = fill(&[3, 5], 1.3);
        let place = model.graph.body.initializers.iter_mut().find(|(id, _)| *id == adapted[0].b).unwrap();
        place.1 = tensor_to_ir("b", &b, crate::ir::DataType::Float).unwrap();
        let program = Program::compile(&model, &Options::default()).unwrap();
        let input = fill(&[4, 7], 0.73);
        let found = program.run(&[(program.inputs()[0], input.shallow_clone())], program.outputs()).unwrap();
        let want = input.matmul(&(numbers + a.matmul(&b) * lora.scale()));
        assert!(found[0].allclose(&want, 1e-5, 1e-5, false), "{:?}, {want:?}", found[0]);
    }

    #[test]
    fn a_lora_rank_that_no_weight_exceeds_is_refused() {
        let (mut model, weights) = network();
        let lora = Lora { rank: 5, alpha: 1.0, seed: 1 };
        let error = adapt(&mut model.graph, &weights, lora).unwrap_err().to_string();
        assert!(error.contains("`lora.rank`") && error.contains("is 5"), "{error}");
    }
}
