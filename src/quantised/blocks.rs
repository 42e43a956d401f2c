//! Weights quantised in blocks of a row, as `MatMulNBits` and `GatherBlockQuantized` read them.

use std::collections::BTreeSet;

use crate::base::Result;
use crate::checkpoint::{floats, from_floats};
use crate::ir::{Body, DataType, Node, Tensor, ValueId};

use super::fitted;

/// A quantised matrix `[rows, columns]`, whose rows are those of the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// Initializer of the packed numbers.
    pub numbers: ValueId,
    /// Initializer of one scale per block.
    pub scales: ValueId,
    /// Initializer of one zero point per block; half of the range without one.
    pub zeros: Option<ValueId>,
    /// Rows of the matrix.
    pub rows: usize,
    /// Numbers in a row.
    pub columns: usize,
    /// Bits of a number: 4 or 8.
    pub bits: u32,
    /// Numbers in a block; the last one of a row may be shorter.
    pub block: usize,
}

/// Scale and zero point from a block's numbers, the weights of their errors, and the greatest quantised number.
type Fit = fn(&[f32], &[f32], f32) -> (f32, f32);

/// How a block of numbers becomes a scale and a zero point.
pub struct Scheme {
    /// Name in tables.
    pub name: &'static str,
    /// True for blocks with zero points of their own.
    pub has_zeros: bool,
    /// True when numbers are rounded by the scale as it is stored, in place of the exact one.
    by_stored_scale: bool,
    /// Scale and zero point of a block. The second argument has the weight of each number's squared error, and is empty where
    /// all count alike; the third is the greatest value of a quantised number.
    fit: Fit,
}

/// Size of a matrix, and its bits and blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockForm {
    /// Rows of the matrix.
    pub rows: usize,
    /// Numbers in a row.
    pub columns: usize,
    /// Bits of a number: 4 or 8.
    pub bits: u32,
    /// Numbers in a block; the last one of a row may be shorter.
    pub block: usize,
}

impl Scheme {
    /// The scheme of this kind: with zero points or without, with the least error or by the plain range.
    pub fn of(zeros: bool, least_error: bool) -> &'static Scheme {
        let fits = |scheme: &&Scheme| scheme.has_zeros == zeros && scheme.by_stored_scale == least_error;
        SCHEMES.iter().find(fits).unwrap_or(&SCHEMES[0])
    }

    /// Scale and zero point of one block, all numbers alike.
    #[cfg(test)]
    pub(super) fn fitted(&self, block: &[f32], most: f32) -> (f32, f32) {
        (self.fit)(block, &[], most)
    }
}

/// Schemes for `MatMulNBits` in the order in which they are tried. The first two are those of ONNX Runtime's quantiser.
///
/// Source: `MlasQuantizeBlockwise` of ONNX Runtime 1.30; the least squared error is searched as by `make_qx_quants` and
/// `make_qkx2_quants` of llama.cpp.
pub const SCHEMES: &[Scheme] = &[
    Scheme {
        name: "symmetric",
        has_zeros: false,
        by_stored_scale: false,
        fit: |block, _, most| {
            let (low, high) = ends(block);
            let half = most.midpoint(1.0).floor();
            (if high.abs() > low.abs() { high } else { low } / -half, half)
        },
    },
    Scheme {
        name: "asymmetric",
        has_zeros: true,
        by_stored_scale: false,
        fit: |block, _, most| {
            let (low, high) = ends(block);
            let (low, high) = (low.min(0.0), high.max(0.0));
            let scale = (high - low) / most;
            let zero = if scale == 0.0 { low } else { 0.0 - low / scale };
            (scale, round(zero).clamp(0.0, most))
        },
    },
    Scheme { name: "symmetric, least error", has_zeros: false, by_stored_scale: true, fit: fitted::symmetric },
    Scheme { name: "asymmetric, least error", has_zeros: true, by_stored_scale: true, fit: fitted::asymmetric },
];

/// The least and the greatest number.
fn ends(block: &[f32]) -> (f32, f32) {
    let least = block.iter().copied().fold(f32::INFINITY, f32::min);
    (least, block.iter().copied().fold(f32::NEG_INFINITY, f32::max))
}

/// Halves away from zero.
fn round(number: f32) -> f32 {
    number.round()
}

/// Bytes of a quantised matrix.
#[derive(Debug, PartialEq)]
pub struct Packed {
    /// Packed numbers, low bits first.
    pub numbers: Vec<u8>,
    /// Scales in the element type of the graph's.
    pub scales: Vec<u8>,
    /// Packed zero points.
    pub zeros: Option<Vec<u8>>,
}

/// The quantised matrices that nodes of a graph read, each once.
pub fn block_matrices(body: &Body) -> Vec<Blocks> {
    let mut found: Vec<Blocks> = Vec::new();
    let mut seen = BTreeSet::new();
    for node in &body.nodes {
        let blocks = match (node.domain.as_str(), node.op_type.as_str()) {
            ("com.microsoft", "MatMulNBits") => of_product(body, node),
            ("com.microsoft", "GatherBlockQuantized") => of_table(body, node),
            _ => None,
        };
        found.extend(blocks.filter(|blocks| seen.insert(blocks.numbers)));
        for inner in node.bodies() {
            found.extend(block_matrices(inner).into_iter().filter(|blocks| seen.insert(blocks.numbers)));
        }
    }
    found
}

fn int(node: &Node, name: &str) -> Option<i64> {
    node.attribute(name)?.as_int()
}

fn tensor(body: &Body, id: ValueId) -> Option<&Tensor> {
    body.initializers.iter().find(|(other, _)| *other == id).map(|(_, tensor)| tensor)
}

pub(super) fn of_product(body: &Body, node: &Node) -> Option<Blocks> {
    let input = |index: usize| node.inputs.get(index).copied().flatten();
    let size = |name: &str| int(node, name).and_then(|value| usize::try_from(value).ok());
    // A fifth input orders the columns in groups; its numbers are not in rows of blocks.
    if input(4).is_some() {
        return None;
    }
    let blocks = Blocks {
        numbers: input(1)?,
        scales: input(2)?,
        zeros: input(3),
        rows: size("N")?,
        columns: size("K")?,
        bits: u32::try_from(int(node, "bits").unwrap_or(4)).ok()?,
        block: size("block_size")?,
    };
    blocks.fits(body).then_some(blocks)
}

fn of_table(body: &Body, node: &Node) -> Option<Blocks> {
    let input = |index: usize| node.inputs.get(index).copied().flatten();
    let bits = u32::try_from(int(node, "bits").unwrap_or(4)).ok()?;
    let data = tensor(body, input(0)?)?;
    if int(node, "gather_axis").unwrap_or(0) != 0 || data.dtype != DataType::Uint8 || bits == 0 {
        return None;
    }
    let rows = usize::try_from(*data.dims.first()?).ok()?;
    let elements = data.byte_len().checked_mul(8)? / u64::from(bits);
    let blocks = Blocks {
        numbers: input(0)?,
        scales: input(2)?,
        zeros: input(3),
        rows,
        columns: usize::try_from(elements).ok()?.checked_div(rows)?,
        bits,
        block: usize::try_from(int(node, "block_size").unwrap_or(128)).ok()?,
    };
    blocks.fits(body).then_some(blocks)
}

impl Blocks {
    /// An empty matrix of its size in f32.
    pub fn shape(&self) -> Tensor {
        Tensor::from_bytes(DataType::Float, &[self.rows as u64, self.columns as u64], Vec::new())
    }

    /// Its size, bits and blocks.
    pub fn form(&self) -> BlockForm {
        BlockForm { rows: self.rows, columns: self.columns, bits: self.bits, block: self.block }
    }

    /// True when the initializers are there and have the sizes that the node says.
    fn fits(&self, body: &Body) -> bool {
        let whole = matches!(self.bits, 4 | 8) && self.block.is_power_of_two() && self.block >= 16 && self.columns > 0;
        if !whole {
            return false;
        }
        let form = self.form();
        let Some(blocks) = self.rows.checked_mul(form.count()) else { return false };
        let bytes = blocks.checked_mul(self.block * self.bits as usize / 8);
        let numbers = tensor(body, self.numbers);
        let scales = tensor(body, self.scales);
        let zeros = self.zeros.map(|zeros| tensor(body, zeros));
        numbers.is_some_and(|t| t.dtype == DataType::Uint8 && Some(t.bytes().len()) == bytes)
            && scales.is_some_and(|t| t.dtype.is_float() && t.element_count() == blocks as u64)
            && zeros.is_none_or(|t| {
                t.is_some_and(|t| t.dtype == DataType::Uint8 && t.bytes().len() == self.rows * form.zero_bytes())
            })
    }

    /// Element type of the scales.
    pub(super) fn scale_type(&self, body: &Body) -> DataType {
        tensor(body, self.scales).map_or(DataType::Float, |tensor| tensor.dtype)
    }

    /// The matrix as floats in row-major order, and how far each may lie from the number that it was made of: the step between two
    /// neighbours, and any distance at an end of the range, where numbers are clipped.
    ///
    /// Errors: as [`floats`].
    pub fn dequantised(&self, body: &Body) -> Result<(Vec<f32>, Vec<f32>)> {
        let scales = tensor(body, self.scales).map_or(Ok(Vec::new()), floats)?;
        let numbers = tensor(body, self.numbers).map_or(&[][..], |tensor| tensor.bytes());
        let (form, most) = (self.form(), ((1u32 << self.bits) - 1) as u8);
        let step = |row: usize, column: usize| {
            let number = form.number(numbers, row * form.count() * self.block + column);
            if [0, most].contains(&number) {
                f32::INFINITY
            } else {
                scales[row * form.count() + column / self.block].abs()
            }
        };
        let places = (0..self.rows).flat_map(|row| (0..self.columns).map(move |column| (row, column)));
        Ok((self.values(body)?, places.map(|(row, column)| step(row, column)).collect()))
    }

    /// The matrix as floats in row-major order.
    ///
    /// Errors: as [`floats`].
    pub fn values(&self, body: &Body) -> Result<Vec<f32>> {
        let bytes = |id| tensor(body, id).map_or(&[][..], |tensor| tensor.bytes());
        let scales = tensor(body, self.scales).map_or(Ok(Vec::new()), floats)?;
        Ok(self.form().unpack(bytes(self.numbers), &scales, self.zeros.map(bytes)))
    }

    /// A matrix in this form, with scales in the graph's element type.
    ///
    /// Errors: none that a checked graph causes.
    pub fn quantise(&self, values: &[f32], scheme: &Scheme, body: &Body) -> Result<Packed> {
        self.form().pack(values, scheme, self.scale_type(body), &[])
    }

    /// The scheme with zero points where the graph has them, and without where it has none.
    pub fn own_scheme(&self) -> &'static Scheme {
        Scheme::of(self.zeros.is_some(), false)
    }

    /// The scheme that makes the graph's bytes out of these values; `None` when none does.
    ///
    /// Errors: as [`Blocks::quantise`].
    pub fn scheme(&self, values: &[f32], body: &Body) -> Result<Option<&'static Scheme>> {
        let bytes = |id| tensor(body, id).map_or(&[][..], |tensor| tensor.bytes());
        let first = Blocks { rows: 1, ..self.clone() };
        for scheme in SCHEMES.iter().filter(|scheme| scheme.has_zeros == self.zeros.is_some()) {
            // Most schemes differ in the first row already.
            let start = first.quantise(values.get(..self.columns).unwrap_or_default(), scheme, body)?;
            if !bytes(self.numbers).starts_with(&start.numbers) || !bytes(self.scales).starts_with(&start.scales) {
                continue;
            }
            let packed = self.quantise(values, scheme, body)?;
            let same_zeros = packed.zeros.as_deref() == self.zeros.map(bytes);
            if packed.numbers == bytes(self.numbers) && packed.scales == bytes(self.scales) && same_zeros {
                return Ok(Some(scheme));
            }
        }
        Ok(None)
    }
}

impl BlockForm {
    /// Blocks of a row.
    pub fn count(&self) -> usize {
        self.columns.div_ceil(self.block)
    }

    /// Bytes of the zero points of a row.
    pub fn zero_bytes(&self) -> usize {
        (self.count() * self.bits as usize).div_ceil(8)
    }

    /// One of packed numbers.
    fn number(&self, bytes: &[u8], at: usize) -> u8 {
        match self.bits {
            4 => bytes[at / 2] >> (4 * (at % 2)) & 15,
            _ => bytes[at],
        }
    }

    /// The matrix as floats in row-major order, from packed numbers, a scale for each block and packed zero points.
    pub fn unpack(&self, numbers: &[u8], scales: &[f32], zeros: Option<&[u8]>) -> Vec<f32> {
        let number = |bytes: &[u8], at: usize| self.number(bytes, at);
        let half = 1 << (self.bits - 1);
        let mut values = Vec::with_capacity(self.rows * self.columns);
        for row in 0..self.rows {
            for block in 0..self.count() {
                let zero = zeros.map_or(half, |zeros| number(&zeros[row * self.zero_bytes()..], block));
                let (zero, scale) = (f32::from(zero), scales[row * self.count() + block]);
                let start = (row * self.count() + block) * self.block;
                let length = self.block.min(self.columns - block * self.block);
                values.extend((start..start + length).map(|at| (f32::from(number(numbers, at)) - zero) * scale));
            }
        }
        values
    }

    /// A matrix in this form. `importance` has the weight of the squared error in each column; without it all count alike.
    ///
    /// Errors: `Error::Invalid` for scales of a type that is no floating-point type.
    pub fn pack(&self, values: &[f32], scheme: &Scheme, dtype: DataType, importance: &[f32]) -> Result<Packed> {
        let most = ((1u32 << self.bits) - 1) as f32;
        let per_row = self.count() * self.block * self.bits as usize / 8;
        let mut packed = Packed {
            numbers: Vec::with_capacity(self.rows * per_row),
            scales: Vec::new(),
            zeros: scheme.has_zeros.then(Vec::new),
        };
        for row in values.chunks_exact(self.columns) {
            let (mut numbers, mut zeros) = (Vec::new(), Vec::new());
            let mut weights = importance.chunks(self.block);
            for block in row.chunks(self.block) {
                let (exact, zero) = (scheme.fit)(block, weights.next().unwrap_or(&[]), most);
                let bytes = from_floats(dtype, &[exact])?;
                let scale = match scheme.by_stored_scale {
                    true => floats(&Tensor::from_bytes(dtype, &[1], bytes.clone()))?.first().copied().unwrap_or(exact),
                    false => exact,
                };
                packed.scales.extend(bytes);
                let reciprocal = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                numbers.extend(block.iter().map(|number| round(number * reciprocal + zero).clamp(0.0, most) as u8));
                // What lies behind the end of a row is 0.
                numbers.resize(numbers.len().next_multiple_of(self.block), zero as u8);
                zeros.push(zero as u8);
            }
            packed.numbers.extend(self.packed(&numbers));
            if let Some(all) = &mut packed.zeros {
                all.extend(self.packed(&zeros));
            }
        }
        Ok(packed)
    }

    fn packed(&self, numbers: &[u8]) -> Vec<u8> {
        match self.bits {
            4 => numbers.chunks(2).map(|pair| pair[0] | pair.get(1).copied().unwrap_or(0) << 4).collect(),
            _ => numbers.to_vec(),
        }
    }
}
