//! Weights of 8 bits: integer products of activations rounded by their own range in every run, or by ranges that were measured.
//!
//! Weights are unsigned, with a scale and a zero point for each output. Processors without VNNI add pairs of products of unsigned
//! with signed numbers in 16 bits, which saturate; products of two unsigned numbers do not.

use std::collections::HashMap;

use crate::base::{Error, Result};
use crate::checkpoint::{floats, from_floats};
use crate::ir::{AttributeKind, DataType, Graph, Node, Value, ValueId};
use crate::quantised::{Range8, Rounded, WeightLayout};

use super::super::components::NOTHING;
use super::finite::{require_finite, require_scales};
use super::report::{QuantisedTensor, relative_error};
use super::weights::{FloatConstants, WeightProduct, Weights, replace_nodes};
use super::{Done, Ranges, Work, bias_node, part_name};

/// First version of the operators with `DequantizeLinear` by channels.
const LEAST_OPSET: i64 = 13;

/// Numbers, scales and zero points.
type Parts = [ValueId; 3];

/// Integer products of activations that are rounded by their own range, as ONNX Runtime's `quantize_dynamic` writes them.
///
/// Errors: `Error::Unsupported` below opset 13; `Error::Io` when the scratch file cannot be written; `Error::Invalid` for a weight
/// or a scale that is not finite.
pub(super) fn dynamic(work: Work<'_>) -> Result<Done> {
    quantise(work, None)
}

/// Products between pairs of `QuantizeLinear` and `DequantizeLinear`, with the activations' ranges measured on data.
///
/// Errors: as [`dynamic`].
pub(super) fn calibrated(work: Work<'_>) -> Result<Done> {
    let ranges = work.ranges;
    quantise(work, Some(ranges))
}

fn quantise(mut work: Work<'_>, ranges: Option<&Ranges>) -> Result<Done> {
    let opset = work.model.opset_imports.get("").copied().unwrap_or(1);
    if opset < LEAST_OPSET {
        return Err(Error::unsupported(
            format!("`{}`", work.file),
            format!("is of opset {opset}, 8-bit weights need {LEAST_OPSET}"),
        )
        .remedy("export the graph in a newer opset"));
    }
    let mut constants = work.constants("int8")?;
    let weights = Weights::of(&work.model);
    let mut quantiser = Quantiser {
        weights: &weights,
        constants: &mut constants,
        ranges,
        file: work.file,
        known: HashMap::new(),
        tables: HashMap::new(),
        rounded: HashMap::new(),
        found: Vec::new(),
        reasons: HashMap::new(),
    };
    let cancel = work.cancel;
    replace_nodes(&mut work.model.graph, &mut |graph, node, body| {
        cancel.check(NOTHING)?;
        quantiser.replace(graph, node, body)
    })?;
    let (found, reasons) = (quantiser.found, quantiser.reasons);
    let mut done = Done::of(work.model, constants, found)?;
    done.reasons = reasons;
    Ok(done)
}

struct Quantiser<'a> {
    weights: &'a Weights,
    constants: &'a mut FloatConstants,
    /// Ranges of operands; `None` for those of each run.
    ranges: Option<&'a Ranges>,
    /// Path of the graph, for messages.
    file: &'a str,
    /// Parts of a weight, by the weight and whether it is transposed.
    known: HashMap<(ValueId, bool), Parts>,
    /// Parts of a table.
    tables: HashMap<ValueId, Parts>,
    /// The rounded form of an operand, by the operand and the body: numbers, scale and zero point, or floats again.
    rounded: HashMap<(ValueId, usize), Vec<ValueId>>,
    found: Vec<QuantisedTensor>,
    /// Why weights stay in floats.
    reasons: HashMap<String, String>,
}

impl Quantiser<'_> {
    fn replace(&mut self, graph: &mut Graph, node: Node, body: usize) -> Result<Vec<Node>> {
        if let Some(product) = self.weights.product(&node) {
            return match self.ranges {
                None => self.integers(graph, &node, &product, body),
                Some(ranges) => match ranges.get(graph.name(product.operand)) {
                    Some(&range) => self.pairs(graph, &node, &product, body, range),
                    None => {
                        let why = "no calibration sample reaches its product, or it is inside of an If or a Loop";
                        self.reasons.insert(graph.name(product.weight).to_string(), why.to_string());
                        Ok(vec![node])
                    }
                },
            };
        }
        match self.weights.table(&node) {
            Some((id, ..)) => self.table(graph, node, id),
            None => Ok(vec![node]),
        }
    }

    fn integers(&mut self, graph: &mut Graph, node: &Node, product: &WeightProduct, body: usize) -> Result<Vec<Node>> {
        let [numbers, scales, zeros] = self.weight(graph, product)?;
        let mut nodes = Vec::new();
        let named = |what: &str| part_name(&node.name, what);
        let rounded = match self.rounded.get(&(product.operand, body)) {
            Some(rounded) => rounded.clone(),
            None => {
                let operand = graph.name(product.operand).to_string();
                let outputs: Vec<ValueId> = ["quantized", "scale", "zero_point"]
                    .iter()
                    .map(|what| fresh(graph, &format!("{operand}_{what}")))
                    .collect();
                nodes.push(operator(
                    "DynamicQuantizeLinear",
                    format!("{operand}.quantized"),
                    &[product.operand],
                    &outputs,
                ));
                self.rounded.insert((product.operand, body), outputs.clone());
                outputs
            }
        };
        let [x, scale, zero] = rounded[..] else { return Ok(vec![node.clone()]) };
        let result = graph.name(product.result).to_string();
        let [sums, floats, factors] =
            ["integers", "floats", "scales"].map(|what| fresh(graph, &format!("{result}_{what}")));
        let scaled = if product.bias.is_some() { fresh(graph, &format!("{result}_product")) } else { product.result };
        nodes.push(operator("MatMulInteger", named("integers"), &[x, numbers, zero, zeros], &[sums]));
        let mut cast = operator("Cast", named("floats"), &[sums], &[floats]);
        cast.attributes = vec![("to".into(), AttributeKind::Int(DataType::Float as i64).into())];
        nodes.push(cast);
        nodes.push(operator("Mul", named("scales"), &[scale, scales], &[factors]));
        nodes.push(operator("Mul", named("scaled"), &[floats, factors], &[scaled]));
        nodes.extend(product.bias.map(|bias| bias_node(node, scaled, bias, product.result)));
        Ok(nodes)
    }

    fn pairs(
        &mut self,
        graph: &mut Graph,
        node: &Node,
        product: &WeightProduct,
        body: usize,
        (low, high): (f32, f32),
    ) -> Result<Vec<Node>> {
        let [numbers, scales, zeros] = self.weight(graph, product)?;
        let mut nodes = Vec::new();
        let operand = match self.rounded.get(&(product.operand, body)) {
            Some(rounded) => rounded.clone(),
            None => {
                let name = graph.name(product.operand).to_string();
                let (scale, zero) = Range8::UNSIGNED.scale_and_zero(low.min(0.0), high.max(0.0));
                let bytes = from_floats(DataType::Float, &[scale])?;
                let scale = self.constants.add(graph, &format!("{name}_scale"), DataType::Float, &[], bytes)?;
                let zero = vec![Range8::UNSIGNED.byte(zero)];
                let zero = self.constants.add(graph, &format!("{name}_zero_point"), DataType::Uint8, &[], zero)?;
                let [rounded, again] = ["quantized", "dequantized"].map(|what| fresh(graph, &format!("{name}_{what}")));
                nodes.push(operator(
                    "QuantizeLinear",
                    format!("{name}.quantized"),
                    &[product.operand, scale, zero],
                    &[rounded],
                ));
                nodes.push(operator(
                    "DequantizeLinear",
                    format!("{name}.dequantized"),
                    &[rounded, scale, zero],
                    &[again],
                ));
                self.rounded.insert((product.operand, body), vec![again]);
                vec![again]
            }
        };
        let weight = fresh(graph, &format!("{}_floats", graph.name(numbers)));
        let mut expanding =
            operator("DequantizeLinear", part_name(&node.name, "weight"), &[numbers, scales, zeros], &[weight]);
        expanding.attributes = vec![("axis".into(), AttributeKind::Int(1).into())];
        nodes.push(expanding);
        let factors = [operand.first().copied().unwrap_or(product.operand), weight];
        let result = match product.bias {
            Some(_) => fresh(graph, &format!("{}_product", graph.name(product.result))),
            None => product.result,
        };
        nodes.push(operator("MatMul", node.name.clone(), &factors, &[result]));
        nodes.extend(product.bias.map(|bias| bias_node(node, result, bias, product.result)));
        Ok(nodes)
    }

    /// Rows of a table of integers, turned into floats behind the `Gather`. One scale for all, as ONNX Runtime writes it.
    fn table(&mut self, graph: &mut Graph, node: Node, id: ValueId) -> Result<Vec<Node>> {
        let Some(tensor) = self.weights.matrix(id) else { return Ok(vec![node]) };
        let dims = tensor.dims.clone();
        let parts = match self.tables.get(&id) {
            Some(parts) => *parts,
            None => {
                let values = floats(tensor)?;
                tensor.release();
                let rounded = Range8::UNSIGNED.rounded(&values, values.len());
                let parts = self.add(graph, id, &values, rounded, &dims, &[])?;
                self.tables.insert(id, parts);
                parts
            }
        };
        let [numbers, scale, zero] = parts;
        let output = node.outputs.first().copied().flatten();
        let rows = fresh(graph, &format!("{}_quantized", graph.name(id)));
        let mut inputs = node.inputs.clone();
        inputs[0] = Some(numbers);
        let name = part_name(&node.name, "floats");
        let gather = Node { inputs, outputs: vec![Some(rows)], ..node };
        let mut expanding = operator("DequantizeLinear", name, &[rows, scale, zero], &[]);
        expanding.outputs = vec![output];
        Ok(vec![gather, expanding])
    }

    /// A weight of a product, `[K, N]` in the new graph, with a scale for each of `N`.
    fn weight(&mut self, graph: &mut Graph, product: &WeightProduct) -> Result<Parts> {
        let key = (product.weight, product.transposed);
        if let Some(parts) = self.known.get(&key) {
            return Ok(*parts);
        }
        let values = floats(&self.weights.rows(product))?;
        let rounded = Range8::UNSIGNED.rounded(&values, product.inner);
        let dims = [product.inner as u64, product.outer as u64];
        let parts = self.add(graph, product.weight, &values, rounded, &dims, &[product.outer as u64])?;
        self.known.insert(key, parts);
        Ok(parts)
    }

    /// Adds the parts of a matrix, whose numbers are given row by row. With a scale for each output the columns of `dims` are
    /// those rows.
    fn add(
        &mut self,
        graph: &mut Graph,
        id: ValueId,
        values: &[f32],
        rounded: Rounded,
        dims: &[u64],
        scale_dims: &[u64],
    ) -> Result<Parts> {
        let name = graph.name(id).to_string();
        let Rounded { numbers, scales, zeros } = rounded;
        let group = values.len() / scales.len().max(1);
        let float = |(at, &number): (usize, &u8)| {
            (f32::from(number) - f32::from(zeros[at / group.max(1)])) * scales[at / group.max(1)]
        };
        let found: Vec<f32> = numbers.iter().enumerate().map(float).collect();
        require_finite(self.file, &name, values)?;
        require_scales(self.file, &name, values, DataType::Float, &scales, &found)?;
        self.found.push(QuantisedTensor {
            name: name.clone(),
            dims: self.weights.matrix(id).map_or(Vec::new(), |tensor| tensor.dims.clone()),
            form: format!("8 bits, {}", if scale_dims.is_empty() { "one scale" } else { "a scale for each output" }),
            bytes: (numbers.len() + 4 * scales.len() + zeros.len()) as u64,
            relative_error: relative_error(values, &found),
        });
        let layout = if scale_dims.is_empty() { WeightLayout::Rows } else { WeightLayout::Columns };
        let numbers = layout.elements(&numbers, dims, 1);
        let scales = from_floats(DataType::Float, &scales)?;
        Ok([
            self.constants.add(graph, &format!("{name}_quantized"), DataType::Uint8, dims, numbers)?,
            self.constants.add(graph, &format!("{name}_scale"), DataType::Float, scale_dims, scales)?,
            self.constants.add(graph, &format!("{name}_zero_point"), DataType::Uint8, scale_dims, zeros)?,
        ])
    }
}

fn fresh(graph: &mut Graph, name: &str) -> ValueId {
    let name = graph.fresh_name(name);
    graph.add_value(Value { name, ..Value::default() })
}

fn operator(op_type: &str, name: String, inputs: &[ValueId], outputs: &[ValueId]) -> Node {
    let some = |ids: &[ValueId]| ids.iter().copied().map(Some).collect();
    Node { name, op_type: op_type.into(), inputs: some(inputs), outputs: some(outputs), ..Node::default() }
}
