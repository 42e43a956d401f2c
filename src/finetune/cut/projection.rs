//! Products of a layer whose results are summed into its output. The output is linear in the weight of the last one.

use std::collections::HashSet;

use crate::analysis::Projection;
use crate::ir::{Graph, GraphIndex, ValueId};

/// Products with `trained` weights that reach `output` through sums alone, in execution order. In most networks these
/// are the output projection of the attention and the down-projection of the MLP. The output is linear in the weight of
/// the last one, whose result has no other reader. The search ends at `input`, the residual stream before the layer.
///
/// Errors: a message with the operators that produce the output instead.
pub fn products_of(
    graph: &Graph,
    input: ValueId,
    output: ValueId,
    trained: &HashSet<ValueId>,
) -> Result<Vec<Projection>, String> {
    let index = GraphIndex::new(graph);
    let nodes = &graph.body.nodes;
    let mut products: Vec<(usize, Projection, bool)> = Vec::new();
    let mut others: Vec<String> = Vec::new();
    // Each value, with true when every value on its path to the output has one reader.
    let mut pending = vec![(output, true)];
    while let Some((id, alone)) = pending.pop() {
        let Some((number, _)) = index.node_of(id).filter(|_| id != input) else { continue };
        let node = &nodes[number];
        let alone = alone && (id == output || index.uses(id).len() == 1 && index.output_position(id).is_none());
        match node.op_type.as_str() {
            "Add" | "Sum" => {
                let terms = node.present_inputs().filter(|&term| !index.is_initializer(term));
                pending.extend(terms.map(|term| (term, alone)));
            }
            "Identity" | "Cast" | "Reshape" => pending.extend(node.present_inputs().next().map(|id| (id, alone))),
            _ => match Projection::of(graph, &index, node).filter(|product| trained.contains(&product.weight)) {
                Some(product) => products.push((number, product, alone)),
                None => others.push(node.op_type.clone()),
            },
        }
    }
    products.sort_by_key(|(number, _, _)| *number);
    match products.last() {
        Some((_, _, true)) => Ok(products.into_iter().map(|(_, product, _)| product).collect()),
        Some(_) => Err("its last product is read by more than the sum that its output is".to_string()),
        None if others.is_empty() => Err("its output is no sum with a product".to_string()),
        None => {
            others.sort_unstable();
            others.dedup();
            let scaled = others.iter().any(|op| op == "Mul" || op.contains("Norm"));
            let reason = if scaled { ": a norm or a scale after the MLP is in between" } else { "" };
            Err(format!(
                "its output is a sum with {} and with no product of a trained weight{reason}; the layer is trained by \
                 steps only",
                others.join(", ")
            ))
        }
    }
}

/// A trained layer with the products to fit in it, or with the reason why it has none.
#[derive(Clone)]
pub struct FitTarget {
    /// Counted from the first trained layer.
    pub layer: usize,
    pub products: Result<Vec<Projection>, String>,
}

impl FitTarget {
    /// The same layer with the last of its products only.
    pub fn last(&self) -> Self {
        let last = |products: &Vec<Projection>| products.last().copied().into_iter().collect();
        FitTarget { layer: self.layer, products: self.products.as_ref().map(last).map_err(Clone::clone) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{Node, Tensor, Value};

    /// A graph of `output = op(inputs)` lines. Names that begin with `w` are 2 x 2 weights; `x` is the input.
    fn graph(lines: &[(&str, &str, &[&str])]) -> (Graph, impl Fn(&str) -> ValueId) {
        let mut graph = Graph::default();
        let mut names: Vec<(String, ValueId)> = Vec::new();
        for (output, op, inputs) in lines {
            let mut id_of = |graph: &mut Graph, name: &str| match names.iter().find(|(known, _)| known == name) {
                Some((_, id)) => *id,
                None => {
                    let id = graph.add_value(Value { name: name.into(), ..Value::default() });
                    names.push((name.into(), id));
                    match name.starts_with('w') {
                        true => graph.body.initializers.push((id, Tensor::from_f32(&[2, 2], &[1.0; 4]))),
                        false if name == "x" => graph.body.inputs.push(id),
                        false => {}
                    }
                    id
                }
            };
            let inputs = inputs.iter().map(|name| Some(id_of(&mut graph, name))).collect();
            let outputs = vec![Some(id_of(&mut graph, output))];
            graph.body.nodes.push(Node { op_type: (*op).into(), inputs, outputs, ..Node::default() });
        }
        (graph, move |name: &str| names.iter().find(|(known, _)| known == name).unwrap().1)
    }

    #[test]
    fn the_projections_of_a_layer_are_found_in_their_order() {
        // The second product also depends on the first one's result, so `w0` can be fitted only together with `w1`.
        let (graph, id) = graph(&[
            ("a", "MatMul", &["x", "w0"]),
            ("r", "Add", &["x", "a"]),
            ("h", "Relu", &["r"]),
            ("p", "MatMul", &["h", "w1"]),
            ("b", "Add", &["p", "w2"]),
            ("y", "Add", &["b", "r"]),
        ]);
        let find =
            |trained: &[&str]| products_of(&graph, id("x"), id("y"), &trained.iter().map(|name| id(name)).collect());
        let product =
            |operand, weight| Projection { operand: id(operand), weight: id(weight), transposed: false, width: 2 };
        assert_eq!(find(&["w0", "w1"]), Ok(vec![product("x", "w0"), product("h", "w1")]));
        assert_eq!(find(&["w1"]), Ok(vec![product("h", "w1")]));
        assert!(find(&["w0"]).unwrap_err().contains("read by more"), "{:?}", find(&["w0"]));
    }

    #[test]
    fn a_layer_that_ends_in_a_norm_has_no_last_projection() {
        let (graph, id) =
            graph(&[("p", "MatMul", &["x", "w1"]), ("n", "RMSNormalization", &["p", "w2"]), ("y", "Add", &["x", "n"])]);
        let problem = products_of(&graph, id("x"), id("y"), &[id("w1"), id("w2")].into()).unwrap_err();
        let reason = "a norm or a scale after the MLP is in between; the layer is trained by steps only";
        assert!(problem.contains("RMSNormalization") && problem.contains(reason), "{problem}");
    }

    #[test]
    fn a_weight_may_be_transposed_before_its_product() {
        let (graph, id) =
            graph(&[("t", "Transpose", &["w1"]), ("p", "MatMul", &["x", "t"]), ("y", "Add", &["x", "p"])]);
        let found = products_of(&graph, id("x"), id("y"), &[id("w1")].into()).unwrap();
        assert_eq!(found, [Projection { operand: id("x"), weight: id("w1"), transposed: true, width: 2 }]);
    }
}
