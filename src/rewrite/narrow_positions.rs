//! Positions in int32 from the first node on, for ONNX Runtime Web's WebGPU back ends.
//!
//! They have no int64, so the cast of `position_ids` to float runs on the processor, in the middle of the device's commands, and the
//! result may be read before it is there: logits are wrong. A cast to int32 as the first node comes before all of these commands.

use std::collections::HashSet;

use crate::ir::{Attribute, AttributeKind, Body, DataType, GraphIndex, Model, Node, Value, ValueId, ValueType};

const POSITIONS: &str = "position_ids";
/// The positions in int32, and the node that gives them.
const CAST: &str = "interlace.positions.int32";

/// Operators that move numbers and take int32 as well as int64; positions are their first input.
const MOVES: &[&str] =
    &["Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"];

/// Casts `position_ids` to int32 in the first node, if all readers cast it or move it to casts; otherwise nothing changes.
/// Positions are below 2^31, so the results are the same.
pub fn narrow_positions(model: &mut Model) -> bool {
    let Some(positions) = model.graph.input(POSITIONS) else { return false };
    if model.graph.value(positions).ty.as_ref().and_then(ValueType::dtype) != Some(DataType::Int64) {
        return false;
    }
    let name = model.graph.fresh_name(CAST);
    // Otherwise an earlier export did it.
    let Some(moved) = moved_to_casts(model, positions).filter(|_| name == CAST) else { return false };
    let graph = &mut model.graph;
    for id in moved {
        if let Some(ValueType::Tensor { dtype, .. }) = &mut graph.values[id.index()].ty {
            *dtype = DataType::Int32;
        }
    }
    let narrow = graph.add_value(Value { name: name.clone(), ..Value::default() });
    for node in &mut graph.body.nodes {
        node.inputs.iter_mut().filter(|id| **id == Some(positions)).for_each(|id| *id = Some(narrow));
    }
    let to = Attribute::from(AttributeKind::Int(DataType::Int32 as i64));
    let cast = Node {
        name,
        op_type: "Cast".into(),
        inputs: vec![Some(positions)],
        outputs: vec![Some(narrow)],
        attributes: vec![("to".into(), to)],
        ..Node::default()
    };
    graph.body.nodes.insert(0, cast);
    true
}

/// Operators of the default domain that compute int64 from int64.
const INTEGERS: &[&str] = &["Add", "Concat", "Div", "Max", "Min", "Mod", "Mul", "Sub"];

/// True when int64 that follow from `position_ids` are cast to floats, which WebGPU's back ends may read too early.
pub fn casts_wide_positions(model: &Model) -> bool {
    let Some(positions) = model.graph.input(POSITIONS) else { return false };
    let wide = model.graph.value(positions).ty.as_ref().and_then(ValueType::dtype) == Some(DataType::Int64);
    wide && is_cast_to_floats(&model.graph.body, &mut HashSet::from([positions]))
}

/// `wide` are the int64 before the body's nodes, which are in execution order.
fn is_cast_to_floats(body: &Body, wide: &mut HashSet<ValueId>) -> bool {
    body.nodes.iter().any(|node| {
        let standard = node.domain.is_empty();
        let reads = |place: usize| node.inputs.get(place).copied().flatten().is_some_and(|id| wide.contains(&id));
        if standard && node.op_type == "Cast" && reads(0) {
            let to = node.attribute("to").and_then(Attribute::as_int);
            let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16, DataType::Double];
            return floats.iter().any(|&dtype| to == Some(dtype as i64));
        }
        let moved = standard && MOVES.contains(&node.op_type.as_str()) && reads(0);
        let computed = standard && INTEGERS.contains(&node.op_type.as_str());
        if moved || computed && (0..node.inputs.len()).any(reads) {
            wide.extend(node.present_outputs());
        }
        node.bodies().any(|inner| is_cast_to_floats(inner, wide))
    })
}

/// The values that hold moved positions; `None` when something else than a cast reads them.
fn moved_to_casts(model: &Model, positions: ValueId) -> Option<Vec<ValueId>> {
    let body = &model.graph.body;
    let index = GraphIndex::of_body(body);
    let (mut pending, mut moved, mut cast) = (vec![positions], Vec::new(), false);
    while let Some(id) = pending.pop() {
        if index.output_position(id).is_some() {
            return None;
        }
        for reader in index.uses(id) {
            let node = &body.nodes[reader.node];
            match (reader.input, node.op_type.as_str()) {
                (Some(0), "Cast") if node.domain.is_empty() => cast = true,
                // The sizes are the same in int32.
                (Some(0), "Shape") if node.domain.is_empty() => {}
                (Some(0), op) if node.domain.is_empty() && MOVES.contains(&op) => {
                    let output = node.outputs.first().copied().flatten()?;
                    moved.push(output);
                    pending.push(output);
                }
                _ => return None,
            }
        }
    }
    cast.then_some(moved)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn positions_are_cast_in_the_first_node_and_only_where_casts_read_them() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model/onnx/decoder_model_merged.onnx");
        let mut model = crate::onnx::load(&path).unwrap();
        assert!(casts_wide_positions(&model));
        assert!(narrow_positions(&mut model));
        assert!(!casts_wide_positions(&model));
        crate::ir::check(&model).unwrap();
        let positions = model.graph.input(POSITIONS).unwrap();
        let readers: Vec<usize> = (0..model.graph.body.nodes.len())
            .filter(|at| model.graph.body.nodes[*at].inputs.contains(&Some(positions)))
            .collect();
        assert_eq!((readers, model.graph.body.nodes[0].op_type.as_str()), (vec![0], "Cast"));
        assert!(!narrow_positions(&mut model), "it is there already");
        // An output of int64 has to stay one.
        let mut other = crate::onnx::load(&path).unwrap();
        let positions = other.graph.input(POSITIONS).unwrap();
        other.graph.body.outputs.push(positions);
        assert!(!narrow_positions(&mut other));
    }
}
