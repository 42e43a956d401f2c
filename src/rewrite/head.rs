//! Joins a decoder with its head when the head is a graph of its own.

use std::collections::HashSet;

use crate::base::{Error, Result};
use crate::ir::{Model, Value, ValueId};

use super::join::{add_opsets_and_functions, move_ids};

/// Appends `head` to the decoder: the head reads `hidden`, and its output replaces that output of the decoder. The
/// decoder's values keep their ids and names; those of the head follow.
///
/// Errors: `Error::Unsupported` when the head does not have one input and one output, or when the graphs use different
/// operator sets.
pub fn with_head(decoder: &Model, hidden: ValueId, head: &Model) -> Result<Model> {
    let subject = || format!("graph `{}`", head.graph.body.name);
    let weights: HashSet<ValueId> = head.graph.body.initializers.iter().map(|(id, _)| *id).collect();
    let inputs: Vec<ValueId> = head.graph.body.inputs.iter().copied().filter(|id| !weights.contains(id)).collect();
    let (&[input], &[output]) = (&inputs[..], &head.graph.body.outputs[..]) else {
        let outputs = head.graph.body.outputs.len();
        let problem = format!("has {} inputs and {outputs} outputs, a head has one each", inputs.len());
        return Err(Error::unsupported(subject(), problem));
    };
    let mut joined = decoder.clone();
    add_opsets_and_functions(&mut joined, head, &head.graph.body.name)?;
    let taken: HashSet<String> = joined.graph.values.iter().map(|value| value.name.clone()).collect();
    let mut ids = Vec::with_capacity(head.graph.values.len());
    for value in &head.graph.values {
        let mut name = value.name.clone();
        while !name.is_empty() && taken.contains(&name) {
            name.insert_str(0, "head.");
        }
        ids.push(joined.graph.add_value(Value { name, ..value.clone() }));
    }
    ids[input.index()] = hidden;
    let moved = |id: ValueId| ids[id.index()];
    let mut body = head.graph.body.clone();
    move_ids(&mut body, &moved);
    joined.graph.body.initializers.extend(body.initializers);
    joined.graph.body.nodes.extend(body.nodes);
    for id in joined.graph.body.outputs.iter_mut().filter(|id| **id == hidden) {
        *id = moved(output);
    }
    crate::ir::check(&joined)?;
    Ok(joined)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{DataType, Dim, Graph, Node, Tensor, ValueType};

    fn product(from: &str, to: &str, opset: i64) -> Model {
        let mut graph = Graph::default();
        let ty = |shape: &[i64]| {
            let shape = Some(shape.iter().map(|&size| Dim::Known(size)).collect());
            Some(ValueType::Tensor { dtype: DataType::Float, shape })
        };
        let mut value =
            |name: &str, shape: &[i64]| graph.add_value(Value { name: name.into(), ty: ty(shape), ..Value::default() });
        let (input, weight, output) = (value(from, &[1, 2]), value("weight", &[2, 2]), value(to, &[1, 2]));
        graph.body.inputs.push(input);
        graph.body.outputs.push(output);
        graph.body.initializers.push((weight, Tensor::from_f32(&[2, 2], &[1.0, 2.0, 3.0, 4.0])));
        graph.body.nodes.push(Node {
            op_type: "MatMul".into(),
            inputs: vec![Some(input), Some(weight)],
            outputs: vec![Some(output)],
            ..Node::default()
        });
        Model { ir_version: 8, opset_imports: [(String::new(), opset)].into(), graph, ..Model::default() }
    }

    #[test]
    fn the_head_reads_the_output_of_the_decoder() {
        let decoder = product("x", "hidden", 17);
        let hidden = decoder.graph.output("hidden").expect("an output");
        let joined = with_head(&decoder, hidden, &product("hidden", "logits", 17)).expect("a graph");
        let graph = &joined.graph;
        assert_eq!(graph.body.outputs.iter().map(|&id| graph.name(id)).collect::<Vec<_>>(), ["logits"]);
        assert_eq!(graph.body.nodes[1].inputs[0], Some(hidden));
        let weights: Vec<&str> = graph.body.initializers.iter().map(|(id, _)| graph.name(*id)).collect();
        assert_eq!(weights, ["weight", "head.weight"]);
    }

    #[test]
    fn a_head_of_another_opset_is_refused() {
        let decoder = product("x", "hidden", 17);
        let hidden = decoder.graph.output("hidden").expect("an output");
        let error = with_head(&decoder, hidden, &product("h", "logits", 18)).expect_err("two opsets").to_string();
        assert!(error.contains("opset 18") && error.contains("opset 17"), "{error}");
    }
}
