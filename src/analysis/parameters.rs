//! Numbers that a model's initializers stand for.

use std::collections::HashMap;

use crate::ir::{Attribute, Body, Node, ValueId};

/// An operator of packed weights.
struct PackedOp {
    name: &'static str,
    /// Inputs that hold packed numbers.
    packed: &'static [usize],
    /// Attribute that says their bits; 4 by default.
    bits: &'static str,
    /// Inputs with scales and zero points.
    beside: &'static [usize],
}

/// The operators of packed weights. Source: ONNX Runtime's `ContribOperators.md`.
const PACKED: &[PackedOp] = &[
    PackedOp { name: "MatMulNBits", packed: &[1], bits: "bits", beside: &[2, 3, 4] },
    PackedOp { name: "GatherBlockQuantized", packed: &[0], bits: "bits", beside: &[2, 3] },
    PackedOp { name: "QMoE", packed: &[2, 5, 8], bits: "expert_weight_bits", beside: &[3, 6, 9, 11, 12, 13] },
];

/// The number of weights that each initializer of a body stands for. Bytes that hold packed 2- or 4-bit weights count as these
/// weights; scales and zero points of quantised weights, which say how to read them, count as none.
pub fn parameter_counts(body: &Body) -> HashMap<ValueId, u64> {
    let mut counts: HashMap<ValueId, u64> =
        body.initializers.iter().map(|(id, tensor)| (*id, tensor.element_count())).collect();
    let mut open = vec![body];
    while let Some(inner) = open.pop() {
        for node in &inner.nodes {
            count_packed(body, node, &mut counts);
            open.extend(node.bodies());
        }
    }
    counts
}

fn count_packed(body: &Body, node: &Node, counts: &mut HashMap<ValueId, u64>) {
    let int = |name: &str, default: i64| node.attribute(name).and_then(Attribute::as_int).unwrap_or(default);
    let input = |at: usize| node.inputs.get(at).copied().flatten();
    if node.domain.is_empty() && ["DequantizeLinear", "QuantizeLinear"].contains(&node.op_type.as_str()) {
        for id in [1, 2].into_iter().filter_map(input) {
            counts.entry(id).and_modify(|count| *count = 0);
        }
    }
    let row = PACKED.iter().find(|row| node.domain == "com.microsoft" && node.op_type == row.name);
    let Some(row) = row else { return };
    let bits = u64::try_from(int(row.bits, 4)).unwrap_or(0);
    for id in row.packed.iter().filter_map(|&at| input(at)) {
        let Some(tensor) =
            body.initializer(id).filter(|tensor| tensor.dtype.bits() == 8 && [1, 2, 4, 8].contains(&bits))
        else {
            continue;
        };
        let held = tensor.byte_len() * 8 / bits;
        // The last block of a row may be padded.
        let product = u64::try_from(int("K", 0)).ok().zip(u64::try_from(int("N", 0)).ok());
        let said = product.and_then(|(k, n)| k.checked_mul(n)).filter(|_| row.name == "MatMulNBits");
        counts.insert(id, said.filter(|&said| said > 0 && said <= held).unwrap_or(held));
    }
    for id in row.beside.iter().filter_map(|&at| input(at)) {
        if let Some(count) = counts.get_mut(&id) {
            *count = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{AttributeKind, DataType, Graph, Tensor, Value};

    #[test]
    fn packed_weights_count_as_the_weights_that_they_hold() {
        let mut graph = Graph::default();
        let mut add = |tensor: Option<Tensor>| {
            let id = graph.add_value(Value::default());
            graph.body.initializers.extend(tensor.map(|tensor| (id, tensor)));
            id
        };
        let bytes =
            |dims: &[u64]| Tensor::from_bytes(DataType::Uint8, dims, vec![0; dims.iter().product::<u64>() as usize]);
        let (x, y) = (add(None), add(None));
        // 40 weights a row in two blocks of 32, the second one padded.
        let packed = add(Some(bytes(&[6, 2, 16])));
        let scales = add(Some(Tensor::from_f32(&[12], &[1.0; 12])));
        let bias = add(Some(Tensor::from_f32(&[6], &[1.0; 6])));
        let table = add(Some(bytes(&[10, 8])));
        let plain = add(Some(Tensor::from_f32(&[3, 5], &[1.0; 15])));
        let node = |op_type: &str, inputs: &[Option<ValueId>], numbers: &[(&str, i64)]| Node {
            domain: "com.microsoft".into(),
            op_type: op_type.into(),
            inputs: inputs.to_vec(),
            outputs: vec![Some(y)],
            attributes: numbers.iter().map(|(name, n)| (name.to_string(), AttributeKind::Int(*n).into())).collect(),
            ..Node::default()
        };
        graph.body.nodes = vec![
            node("MatMulNBits", &[Some(x), Some(packed), Some(scales), None, None, Some(bias)], &[("K", 40), ("N", 6)]),
            node("GatherBlockQuantized", &[Some(table), Some(x), Some(scales)], &[]),
        ];
        let counts = parameter_counts(&graph.body);
        assert_eq!([packed, scales, bias, table, plain].map(|id| counts[&id]), [240, 0, 6, 160, 15]);
        // Sizes that the weight does not have are not believed.
        graph.body.nodes[0] = node("MatMulNBits", &[Some(x), Some(packed), Some(scales)], &[("K", i64::MAX), ("N", 3)]);
        assert_eq!(parameter_counts(&graph.body)[&packed], 6 * 2 * 16 * 2);
    }
}
