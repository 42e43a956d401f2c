//! Weights of 8 bits with one scale for all or one per channel, as ONNX Runtime's quantiser writes them.

use std::collections::BTreeSet;

use crate::base::Result;
use crate::checkpoint::{floats, from_floats};
use crate::ir::{Body, DataType, GraphIndex, Node, Tensor, ValueId};

use super::layout::WeightLayout;

/// A quantised matrix whose rows are those of the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Channels {
    /// Initializer of the numbers, int8 or uint8.
    pub numbers: ValueId,
    /// Initializer of the scale, one number or one per row.
    pub scales: ValueId,
    /// Initializer of the zero points, as many; 0 without them.
    pub zeros: Option<ValueId>,
    /// Order of the numbers.
    layout: WeightLayout,
    /// Sizes of the weight's axes.
    dims: Vec<u64>,
    /// True for int8, false for uint8.
    signed: bool,
    /// True for a scale per row.
    per_row: bool,
}

/// Greatest and least numbers that a scheme uses, and whether the range of the floats is made symmetric.
pub struct Range8 {
    /// Name in tables.
    pub name: &'static str,
    signed: bool,
    least: f64,
    most: f64,
    symmetric: bool,
}

/// Schemes of ONNX Runtime's quantiser for weights of 8 bits, in the order in which they are tried.
///
/// Source: `compute_scale_zp` and `get_qmin_qmax_for_qType` of ONNX Runtime 1.30's Python package.
pub const RANGES: &[Range8] = &[
    Range8 { name: "symmetric", signed: true, least: -127.0, most: 127.0, symmetric: true },
    Range8 { name: "symmetric, reduced range", signed: true, least: -64.0, most: 64.0, symmetric: true },
    Range8 { name: "asymmetric", signed: true, least: -128.0, most: 127.0, symmetric: false },
    Range8 { name: "symmetric", signed: false, least: 0.0, most: 254.0, symmetric: true },
    Range8 { name: "asymmetric", signed: false, least: 0.0, most: 255.0, symmetric: false },
    Range8 { name: "asymmetric, reduced range", signed: false, least: 0.0, most: 127.0, symmetric: false },
];

/// Rounded numbers, with the scale and the zero point of each group.
pub struct Rounded {
    /// One byte each, int8 or uint8 as the scheme says, in the order of the floats.
    pub numbers: Vec<u8>,
    /// Scales of the groups.
    pub scales: Vec<f32>,
    /// Zero points of the groups in the numbers' element type.
    pub zeros: Vec<u8>,
}

impl Range8 {
    /// All 256 values of uint8, each group by its own range: the scheme that `export` writes.
    ///
    /// Products of unsigned with signed 8-bit integers saturate on processors without VNNI; of two unsigned ones they do not.
    pub const UNSIGNED: &Range8 = &RANGES[4];

    /// Floats rounded in groups of this many, each by its own least and greatest number.
    pub fn rounded(&self, values: &[f32], group: usize) -> Rounded {
        let mut rounded = Rounded { numbers: Vec::with_capacity(values.len()), scales: Vec::new(), zeros: Vec::new() };
        for part in values.chunks(group.max(1)) {
            let low = part.iter().copied().fold(0.0, f32::min);
            let high = part.iter().copied().fold(0.0, f32::max);
            let (scale, zero) = self.scale_and_zero(low, high);
            let (least, most) = if self.signed { (-128.0, 127.0) } else { (0.0, 255.0) };
            let quantised = |&number: &f32| ((number / scale).round_ties_even() + zero).clamp(least, most);
            rounded.numbers.extend(part.iter().map(|number| self.byte(quantised(number))));
            rounded.scales.push(scale);
            rounded.zeros.push(self.byte(zero));
        }
        rounded
    }

    /// Scale and zero point of numbers from `low` (at most 0) to `high` (at least 0).
    pub fn scale_and_zero(&self, low: f32, high: f32) -> (f32, f32) {
        let (low, high) = if self.symmetric { (-high.max(-low), high.max(-low)) } else { (low, high) };
        let exact = f64::from(high - low) / (self.most - self.least);
        let (scale, zero) = match (exact < f64::from(f32::MIN_POSITIVE), self.symmetric) {
            (true, _) => (1.0, 0.0),
            (false, true) => (exact as f32, ((self.least + self.most) / 2.0).round_ties_even()),
            (false, false) => (exact as f32, (self.least - f64::from(low) / exact).round_ties_even()),
        };
        (scale, zero as f32)
    }

    /// A number of the scheme's range as it is stored.
    pub fn byte(&self, number: f32) -> u8 {
        if self.signed { number as i8 as u8 } else { number as u8 }
    }
}

/// Bytes of numbers, scales and zero points.
type Bytes = (Vec<u8>, Vec<u8>, Vec<u8>);

/// The quantised weights that nodes of a graph read, each once.
pub fn channel_matrices(body: &Body) -> Vec<Channels> {
    let index = GraphIndex::of_body(body);
    let mut found: Vec<Channels> = Vec::new();
    let mut seen = BTreeSet::new();
    for node in &body.nodes {
        let channels = match node.op_type.as_str() {
            "DequantizeLinear" => dequantised(body, &index, node),
            "MatMulInteger" => multiplied(body, &index, node),
            _ => None,
        };
        found.extend(channels.filter(|channels| seen.insert(channels.numbers)));
    }
    found
}

fn tensor(body: &Body, id: ValueId) -> Option<&Tensor> {
    body.initializers.iter().find(|(other, _)| *other == id).map(|(_, tensor)| tensor)
}

fn input(node: &Node, index: usize) -> Option<ValueId> {
    node.inputs.get(index).copied().flatten()
}

/// A weight that is turned into floats, or rows of which are.
fn dequantised(body: &Body, index: &GraphIndex, node: &Node) -> Option<Channels> {
    let numbers = input(node, 0)?;
    let numbers = match index.node_of(numbers) {
        Some((maker, _)) if body.nodes[maker].op_type == "Gather" => input(&body.nodes[maker], 0)?,
        _ => numbers,
    };
    let axis = node.attribute("axis").and_then(|axis| axis.as_int()).unwrap_or(1);
    Channels::of(body, numbers, input(node, 1)?, input(node, 2), axis)
}

/// A weight of an integer product, whose scale is multiplied with the other factor's afterwards.
fn multiplied(body: &Body, index: &GraphIndex, node: &Node) -> Option<Channels> {
    Some(integer_product(body, index, node)?.weight)
}

/// A product of integers whose first factor is quantised by its own range in every run.
pub(super) struct IntegerProduct {
    /// Number of the node that quantises the first factor.
    pub quantiser: usize,
    /// Number of the node that multiplies the result with both factors' scales.
    pub last: usize,
    /// Second factor.
    pub weight: Channels,
}

/// The product that a `MatMulInteger` is part of.
pub(super) fn integer_product(body: &Body, index: &GraphIndex, node: &Node) -> Option<IntegerProduct> {
    let (quantiser, _) = index.node_of(input(node, 0)?)?;
    let quantising = body.nodes.get(quantiser).filter(|node| node.op_type == "DynamicQuantizeLinear")?;
    let scale = quantising.outputs.get(1).copied().flatten()?;
    // One factor's scale is multiplied with those of all weights that read it: the reader of the product tells which is
    // this one's.
    let mut found = Vec::new();
    for used in index.uses(scale) {
        let Some(scales) = body.nodes.get(used.node).filter(|node| node.op_type == "Mul") else { continue };
        let Some(last) = reader_of_both(body, index, scales, node) else { continue };
        let constants = scales.present_inputs().filter(|&id| id != scale && tensor(body, id).is_some());
        found.extend(constants.map(|id| (id, last)));
    }
    let [(scales, last)] = found[..] else { return None };
    let weight = Channels::of(body, input(node, 1)?, scales, input(node, 3), 1)?;
    Some(IntegerProduct { quantiser, last, weight })
}

/// Number of the node that multiplies a product of scales with the result of an integer product.
fn reader_of_both(body: &Body, index: &GraphIndex, scales: &Node, integer: &Node) -> Option<usize> {
    let result = integer.outputs.first().copied().flatten()?;
    let casts =
        index.uses(result).iter().filter_map(|used| body.nodes.get(used.node)).filter(|node| node.op_type == "Cast");
    let floats: Vec<ValueId> = casts.flat_map(Node::present_outputs).collect();
    let readers = scales.present_outputs().flat_map(|scales| index.uses(scales));
    readers
        .map(|used| used.node)
        .find(|&number| body.nodes.get(number).is_some_and(|node| node.present_inputs().any(|id| floats.contains(&id))))
}

impl Channels {
    pub(super) fn of(
        body: &Body,
        numbers: ValueId,
        scales: ValueId,
        zeros: Option<ValueId>,
        axis: i64,
    ) -> Option<Self> {
        let weight = tensor(body, numbers)?;
        let (count, rank) = (tensor(body, scales)?.element_count(), weight.dims.len());
        let signed = match weight.dtype {
            DataType::Int8 => true,
            DataType::Uint8 => false,
            _ => return None,
        };
        let axis = if axis < 0 { axis + rank as i64 } else { axis };
        let per_row = count > 1;
        // With one scale for all, the order that the checkpoint's rows have is found by trying both.
        let layout = if per_row && axis == 0 { WeightLayout::Rows } else { WeightLayout::Columns };
        let fits = rank == 2
            && tensor(body, scales)?.dtype == DataType::Float
            && (!per_row || weight.dims.get(usize::try_from(axis).ok()?) == Some(&count))
            && match zeros {
                None => true,
                Some(zeros) => {
                    tensor(body, zeros).is_some_and(|t| t.dtype == weight.dtype && t.element_count() == count)
                }
            };
        fits.then(|| Channels { numbers, scales, zeros, layout, dims: weight.dims.clone(), signed, per_row })
    }

    /// The same numbers read in the other order of the two axes; `None` where the scales decide the order.
    pub fn turned(&self) -> Option<Self> {
        let layout = if self.layout == WeightLayout::Rows { WeightLayout::Columns } else { WeightLayout::Rows };
        (!self.per_row).then(|| Channels { layout, ..self.clone() })
    }

    /// The matrix read in the order in which another one is read.
    pub fn in_order_of(self, other: &Self) -> Self {
        Channels { layout: other.layout, ..self }
    }

    /// Numbers in a row.
    pub fn columns(&self) -> usize {
        self.layout.row_length(&self.dims)
    }

    /// An empty matrix of its size in f32, row by row.
    pub fn shape(&self) -> Tensor {
        let mut dims = self.dims.clone();
        if self.layout == WeightLayout::Columns {
            dims.reverse();
        }
        Tensor::from_bytes(DataType::Float, &dims, Vec::new())
    }

    /// Sizes of the weight's axes.
    pub fn dims(&self) -> &[u64] {
        &self.dims
    }

    /// The matrix as floats in the weight's own order.
    ///
    /// Errors: as [`floats`].
    pub fn values(&self, body: &Body) -> Result<Vec<f32>> {
        let rows: Vec<u8> = self.dequantised(body)?.0.iter().flat_map(|number| number.to_le_bytes()).collect();
        floats(&Tensor::from_bytes(DataType::Float, &self.dims, self.layout.elements(&rows, &self.dims, 4)))
    }

    /// The matrix row by row, from floats in the weight's own order.
    ///
    /// Errors: as [`floats`].
    pub fn rows_of(&self, values: &[f32]) -> Result<Vec<f32>> {
        let rows = self.layout.rows(&Tensor::from_f32(&self.dims, values));
        floats(&Tensor::from_bytes(DataType::Float, &self.dims, rows))
    }

    /// The scheme of the graph's own bytes: a symmetric one where the zero points are its middle, else an asymmetric one; the
    /// narrowest whose range holds all numbers. `None` where the weight has other zero points and no input for them.
    pub fn own_range(&self, body: &Body) -> Option<&'static Range8> {
        let bytes = |id| tensor(body, id).map_or(&[][..], |tensor| tensor.bytes());
        let zeros: Vec<f32> = match self.zeros {
            Some(id) => bytes(id).iter().map(|&byte| self.value(byte)).collect(),
            None => vec![0.0],
        };
        let numbers = || bytes(self.numbers).iter().map(|&byte| f64::from(self.value(byte)));
        let (least, most) = (numbers().fold(f64::INFINITY, f64::min), numbers().fold(f64::NEG_INFINITY, f64::max));
        let middle = |range: &Range8| ((range.least + range.most) / 2.0).round_ties_even();
        let own = || RANGES.iter().filter(|range| range.signed == self.signed);
        let centred = |range: &&Range8| range.symmetric && zeros.iter().all(|&zero| f64::from(zero) == middle(range));
        let mut fitting: Vec<&Range8> = own().filter(centred).collect();
        if fitting.is_empty() && self.zeros.is_some() {
            fitting = own().filter(|range| !range.symmetric).collect();
        }
        fitting.sort_by(|a, b| (a.most - a.least).total_cmp(&(b.most - b.least)));
        let holds = |range: &&&Range8| least >= range.least && most <= range.most;
        fitting.iter().find(holds).or(fitting.last()).copied()
    }

    fn value(&self, byte: u8) -> f32 {
        if self.signed { f32::from(byte as i8) } else { f32::from(byte) }
    }

    /// The matrix as floats row by row, and the step between two neighbouring numbers at each of them.
    ///
    /// Errors: as [`floats`].
    pub fn dequantised(&self, body: &Body) -> Result<(Vec<f32>, Vec<f32>)> {
        let scales = tensor(body, self.scales).map_or(Ok(Vec::new()), floats)?;
        let zeros = self.zeros.and_then(|zeros| tensor(body, zeros)).map_or(&[][..], |tensor| tensor.bytes());
        let rows = tensor(body, self.numbers).map(|weight| self.layout.rows(weight)).unwrap_or_default();
        let (mut values, mut steps) = (Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()));
        for (row, bytes) in rows.chunks_exact(self.columns().max(1)).enumerate() {
            let at = if self.per_row { row } else { 0 };
            let (scale, zero) = (scales[at], zeros.get(at).map_or(0.0, |&zero| self.value(zero)));
            values.extend(bytes.iter().map(|&byte| (self.value(byte) - zero) * scale));
            steps.extend(bytes.iter().map(|_| scale.abs()));
        }
        Ok((values, steps))
    }

    /// A matrix in this form.
    ///
    /// Errors: none that a checked graph causes.
    pub fn quantise(&self, values: &[f32], range: &Range8) -> Result<Vec<(ValueId, Vec<u8>)>> {
        let (numbers, scales, zeros) = self.bytes(values, range)?;
        let mut all = vec![(self.numbers, numbers), (self.scales, scales)];
        all.extend(self.zeros.map(|id| (id, zeros)));
        Ok(all)
    }

    fn bytes(&self, values: &[f32], range: &Range8) -> Result<Bytes> {
        let group = if self.per_row { self.columns() } else { values.len() };
        let Rounded { numbers, scales, zeros } = range.rounded(values, group);
        Ok((self.layout.elements(&numbers, &self.dims, 1), from_floats(DataType::Float, &scales)?, zeros))
    }

    /// The scheme that makes the graph's bytes out of these values; `None` when none does.
    ///
    /// Errors: as [`Channels::quantise`].
    pub fn scheme(&self, values: &[f32], body: &Body) -> Result<Option<&'static Range8>> {
        let bytes = |id| tensor(body, id).map_or(&[][..], |tensor| tensor.bytes());
        for range in RANGES.iter().filter(|range| range.signed == self.signed) {
            let (numbers, scales, zeros) = self.bytes(values, range)?;
            let same_zeros = match self.zeros {
                Some(id) => zeros == bytes(id),
                None => zeros.iter().all(|&zero| zero == 0),
            };
            if numbers == bytes(self.numbers) && scales == bytes(self.scales) && same_zeros {
                return Ok(Some(range));
            }
        }
        Ok(None)
    }
}
