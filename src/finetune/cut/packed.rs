//! Weights of 4 bits in blocks (`MatMulNBits`): what they hold as floats, and floats in the same form.
//!
//! Block by block along `K`, as ONNX Runtime's own quantiser (`MlasQuantizeBlockwise`, `q4_dq.cpp`): without zero points the
//! number of the largest magnitude becomes -8, with them the range from 0 on is parted into 15 steps.

use std::collections::HashSet;

use half::f16;

use crate::base::{Error, Result};
use crate::ir::{Attribute, DataType, Graph, Model, Node, Tensor, Value, ValueId};

/// The operator.
pub const PACKED_PRODUCT: &str = "MatMulNBits";
/// What a number of 4 bits is counted from where there are no zero points.
const MIDDLE: f32 = 8.0;
/// The largest number of 4 bits.
const LARGEST: f32 = 15.0;

/// The weight of a `MatMulNBits`: `[N, blocks, block / 2]` bytes, two numbers in each, the first in the low bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    pub weight: ValueId,
    /// `[N, blocks]`, f32 or f16.
    pub scales: ValueId,
    /// `[N, ceil(blocks / 2)]` bytes.
    pub zero_points: Option<ValueId>,
    /// `K`.
    pub rows: usize,
    /// `N`.
    pub columns: usize,
    /// Numbers along `K` with one scale.
    pub block: usize,
}

impl Packed {
    /// The packed weight that `node` multiplies by.
    ///
    /// Errors: what about it is not known, for a message.
    pub fn of(graph: &Graph, node: &Node) -> Result<Self, String> {
        let int = |name: &str| node.attribute(name).and_then(Attribute::as_int);
        let size = |name: &str| int(name).and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0);
        let (Some(rows), Some(columns), Some(block)) = (size("K"), size("N"), size("block_size")) else {
            return Err("its sizes are not stated".to_string());
        };
        if int("bits").unwrap_or(4) != 4 || !block.is_multiple_of(2) {
            return Err(format!("has {} bits in blocks of {block}, 4 bits are known", int("bits").unwrap_or(4)));
        }
        let input = |number: usize| node.inputs.get(number).copied().flatten();
        if input(4).is_some() {
            return Err("has an order of its own along K (g_idx)".to_string());
        }
        let (Some(weight), Some(scales)) = (input(1), input(2)) else { return Err("has no scales".to_string()) };
        let packed = Packed { weight, scales, zero_points: input(3), rows, columns, block };
        let tensor = |id: ValueId| graph.body.initializer(id);
        let count = |id: ValueId| tensor(id).map_or(0, Tensor::byte_len) as usize;
        let blocks = packed.blocks();
        let scale_bytes = match tensor(scales).map(|scales| scales.dtype) {
            Some(DataType::Float) => 4,
            Some(DataType::Float16) => 2,
            _ => return Err("its scales are no constant of f32 or f16".to_string()),
        };
        let fits = count(weight) == columns * blocks * block / 2
            && count(scales) == columns * blocks * scale_bytes
            && packed.zero_points.is_none_or(|zero| {
                tensor(zero).is_some_and(|zero| zero.dtype == DataType::Uint8)
                    && count(zero) == columns * packed.zero_bytes()
            });
        if !fits {
            return Err("its weight, scales or zero points are of another size or type".to_string());
        }
        Ok(packed)
    }

    fn blocks(&self) -> usize {
        self.rows.div_ceil(self.block)
    }

    fn zero_bytes(&self) -> usize {
        self.blocks().div_ceil(2)
    }

    /// Its numbers, `[N, K]`.
    pub fn floats(&self, graph: &Graph) -> Vec<f32> {
        let bytes = |id: ValueId| graph.body.initializer(id).map_or(&[][..], Tensor::bytes);
        let (packed, zeros) = (bytes(self.weight), self.zero_points.map(bytes));
        let scales = scales_of(graph.body.initializer(self.scales));
        let mut found = Vec::with_capacity(self.rows * self.columns);
        for column in 0..self.columns {
            for row in 0..self.rows {
                let (block, at) = (row / self.block, row % self.block);
                let place = column * self.blocks() + block;
                let number = nibble(packed[place * self.block / 2 + at / 2], at);
                let zero = zeros.map_or(MIDDLE, |zeros| nibble(zeros[column * self.zero_bytes() + block / 2], block));
                found.push((number - zero) * scales[place]);
            }
        }
        found
    }

    /// The numbers `[N, K]` in this form: the weight, its scales and its zero points.
    pub fn packed(&self, graph: &Graph, numbers: &[f32]) -> Vec<(ValueId, Tensor)> {
        let blocks = self.blocks();
        let mut packed = vec![0u8; self.columns * blocks * self.block / 2];
        // The half byte that an odd number of blocks leaves over holds the middle.
        let last = if blocks % 2 == 1 { (MIDDLE as u8) << 4 } else { 0 };
        let of_column = || (0..self.zero_bytes()).map(|byte| if byte + 1 == self.zero_bytes() { last } else { 0 });
        let mut zeros: Vec<u8> = (0..self.columns).flat_map(|_| of_column()).collect();
        let mut scales = Vec::with_capacity(self.columns * blocks);
        for (column, own) in numbers.chunks(self.rows.max(1)).enumerate() {
            for (block, own) in own.chunks(self.block).enumerate() {
                let (scale, zero) = range(own, self.zero_points.is_some());
                let reciprocal = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                zeros[column * self.zero_bytes() + block / 2] |= (zero as u8) << (4 * (block % 2));
                scales.push(scale);
                let start = (column * blocks + block) * self.block / 2;
                for (at, number) in own.iter().enumerate() {
                    let number = (number * reciprocal + zero).round().clamp(0.0, LARGEST) as u8;
                    packed[start + at / 2] |= number << (4 * (at % 2));
                }
            }
        }
        let like = |id: ValueId, bytes: Vec<u8>| {
            let old = graph.body.initializer(id);
            let (dtype, dims) = old.map_or((DataType::Uint8, &[][..]), |old| (old.dtype, old.dims.as_slice()));
            (id, Tensor::from_bytes(dtype, dims, bytes))
        };
        let half = graph.body.initializer(self.scales).is_some_and(|scales| scales.dtype == DataType::Float16);
        let scales = match half {
            true => scales.iter().flat_map(|&scale| f16::from_f32(scale).to_le_bytes()).collect(),
            false => scales.iter().flat_map(|scale| scale.to_le_bytes()).collect(),
        };
        let mut all = vec![like(self.weight, packed), like(self.scales, scales)];
        all.extend(self.zero_points.map(|id| like(id, zeros)));
        all
    }
}

/// Scale and zero point of a block.
fn range(numbers: &[f32], zero_points: bool) -> (f32, f32) {
    let least = numbers.iter().copied().fold(f32::INFINITY, f32::min);
    let most = numbers.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !zero_points {
        return (if most.abs() > least.abs() { most } else { least } / -MIDDLE, MIDDLE);
    }
    let (least, most) = (least.min(0.0), most.max(0.0));
    let scale = (most - least) / LARGEST;
    let zero = if scale == 0.0 { least } else { -least / scale };
    (scale, zero.round().clamp(0.0, LARGEST))
}

fn nibble(byte: u8, place: usize) -> f32 {
    f32::from(byte >> (4 * (place % 2)) & 15)
}

fn scales_of(tensor: Option<&Tensor>) -> Vec<f32> {
    match tensor {
        Some(tensor) if tensor.dtype == DataType::Float16 => {
            tensor.bytes().as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect()
        }
        Some(tensor) => tensor.bytes().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        None => Vec::new(),
    }
}

/// Puts float products in place of those with packed weights; each tensor is `[K, N]`, by the packed weight that it replaces.
///
/// Errors: `Error::Invalid` when nothing multiplies by one of the weights.
pub fn float_products(model: &mut Model, tensors: Vec<(ValueId, Tensor)>) -> Result<()> {
    let graph = &mut model.graph;
    for (weight, tensor) in tensors {
        let name = graph.fresh_name(&format!("{}.float", graph.name(weight)));
        let multiplies = |node: &Node| node.op_type == PACKED_PRODUCT && node.inputs.get(1) == Some(&Some(weight));
        let Some(place) = graph.body.nodes.iter().position(multiplies) else {
            let name = graph.name(weight).to_string();
            return Err(Error::invalid(format!("initializer `{name}`"), "was trained and is not in the model"));
        };
        let float = graph.add_value(Value { name, ..Value::default() });
        graph.body.initializers.push((float, tensor));
        let old = graph.body.nodes[place].clone();
        let (x, bias) = (old.inputs.first().copied().flatten(), old.inputs.get(5).copied().flatten());
        let mut product = Node {
            name: old.name.clone(),
            op_type: "MatMul".to_string(),
            inputs: vec![x, Some(float)],
            outputs: old.outputs.clone(),
            ..Node::default()
        };
        if let Some(bias) = bias {
            let name = graph.fresh_name(&format!("{}.product", old.name));
            let inner = graph.add_value(Value { name, ..Value::default() });
            product.outputs = vec![Some(inner)];
            let sum = Node {
                name: format!("{}.bias", old.name),
                op_type: "Add".to_string(),
                inputs: vec![Some(inner), Some(bias)],
                outputs: old.outputs.clone(),
                ..Node::default()
            };
            graph.body.nodes.insert(place + 1, sum);
        }
        graph.body.nodes[place] = product;
    }
    let read: HashSet<ValueId> = graph
        .body
        .nodes
        .iter()
        .flat_map(|node| node.present_inputs().chain(node.bodies().flat_map(crate::ir::captured)).collect::<Vec<_>>())
        .chain(graph.body.outputs.iter().copied())
        .collect();
    graph.body.initializers.retain(|(id, _)| read.contains(id));
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::ir::AttributeKind;

    /// One weight as ONNX Runtime's quantiser packs it.
    #[derive(Deserialize)]
    struct Golden {
        rows: usize,
        columns: usize,
        block: usize,
        half: bool,
        /// `[K, N]`.
        weight: Vec<f32>,
        packed: Vec<u8>,
        scales: Vec<f32>,
        zero_points: Option<Vec<u8>>,
    }

    fn graph_of(golden: &Golden) -> (Graph, Node) {
        let mut graph = Graph::default();
        let mut value = |name: &str| graph.add_value(Value { name: name.into(), ..Value::default() });
        let [x, weight, scales, zeros, y] = ["x", "weight", "scales", "zeros", "y"].map(&mut value);
        let blocks = golden.rows.div_ceil(golden.block) as u64;
        let columns = golden.columns as u64;
        let scale_bytes: Vec<u8> = match golden.half {
            true => golden.scales.iter().flat_map(|&scale| f16::from_f32(scale).to_le_bytes()).collect(),
            false => golden.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect(),
        };
        let kind = if golden.half { DataType::Float16 } else { DataType::Float };
        let dims = [columns, blocks, golden.block as u64 / 2];
        graph.body.initializers.push((weight, Tensor::from_bytes(DataType::Uint8, &dims, golden.packed.clone())));
        graph.body.initializers.push((scales, Tensor::from_bytes(kind, &[columns, blocks], scale_bytes)));
        let mut inputs = vec![Some(x), Some(weight), Some(scales)];
        if let Some(bytes) = &golden.zero_points {
            let dims = [columns, blocks.div_ceil(2)];
            graph.body.initializers.push((zeros, Tensor::from_bytes(DataType::Uint8, &dims, bytes.clone())));
            inputs.push(Some(zeros));
        }
        let attributes = [("K", golden.rows), ("N", golden.columns), ("bits", 4), ("block_size", golden.block)];
        let attributes = attributes.map(|(name, size)| (name.into(), AttributeKind::Int(size as i64).into()));
        let node = Node {
            op_type: PACKED_PRODUCT.into(),
            domain: "com.microsoft".into(),
            inputs,
            outputs: vec![Some(y)],
            attributes: attributes.into_iter().collect(),
            ..Node::default()
        };
        (graph, node)
    }

    #[test]
    fn weights_are_packed_as_onnx_runtime_does() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/expected/matmul_nbits.json");
        let all: Vec<Golden> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert!(all.len() >= 8 && all.iter().any(|golden| golden.half));
        for golden in &all {
            let (graph, node) = graph_of(golden);
            let packed = Packed::of(&graph, &node).unwrap();
            let turned: Vec<f32> = (0..golden.columns)
                .flat_map(|column| (0..golden.rows).map(move |row| golden.weight[row * golden.columns + column]))
                .collect();
            for (id, tensor) in packed.packed(&graph, &turned) {
                let want = graph.body.initializer(id).unwrap();
                assert_eq!(tensor.bytes(), want.bytes(), "{} of {} x {}", graph.name(id), golden.rows, golden.columns);
            }
            // What was packed comes back to within half a step.
            let floats = packed.floats(&graph);
            let widest = golden.scales.iter().fold(0.0f32, |most, scale| most.max(scale.abs()));
            let off = floats.iter().zip(&turned).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off <= widest * 1.01, "{off} with steps of {widest}");
        }
    }
}
