//! Products and look-ups with weights in blocks of a few bits.

use crate::base::Result;
use crate::ir::{AttributeKind, DataType, Node, Tensor, ValueId};

use super::site::{Site, int, optional};

/// `A` times a weight that `DequantizeLinear` makes of the same packed numbers.
///
/// Shapes: B `[N, blocks, block_size * bits / 8]`, scales `[N, blocks]`, zero points `[N, blocks]` packed by row.
/// Source: ONNX Runtime, com.microsoft MatMulNBits-1; ONNX DequantizeLinear-21.
pub(super) fn mat_mul_n_bits(node: &Node, site: &mut Site<'_>) -> Result<()> {
    site.only(node, &["K", "N", "bits", "block_size", "accuracy_level", "weight_prepacked"], 6)?;
    let [inner, rows, bits, block] =
        [("K", 0), ("N", 0), ("bits", 4), ("block_size", 0)].map(|(name, default)| int(node, name, default));
    let a = site.input(node, 0)?;
    let packed_type = match bits {
        4 => DataType::Uint4,
        8 => DataType::Uint8,
        _ => return Err(site.refuse(node, &format!("has numbers of {bits} bits"))),
    };
    if optional(node, 4).is_some() || int(node, "weight_prepacked", 0) != 0 {
        return Err(site.refuse(node, "has columns in another order"));
    }
    if inner < 1 || rows < 1 || block < 1 {
        return Err(site.refuse(node, "has no sizes"));
    }
    let blocks = inner.div_euclid(block) + i64::from(inner % block != 0);
    let dims = [rows as u64, (blocks * block) as u64];
    let (packed, scales) = (site.input(node, 1)?, site.input(node, 2)?);
    let (Some(packed), Some(scales)) = (site.weight(packed).cloned(), site.weight(scales).cloned()) else {
        return Err(site.refuse(node, "has a weight that is computed in the graph"));
    };
    let expected = dims[0] * dims[1] * bits as u64 / 8;
    if packed.byte_len() != expected || scales.element_count() != dims[0] * blocks as u64 {
        return Err(site.refuse(node, "has a weight of another size than its attributes"));
    }
    let zeros = match optional(node, 3) {
        None => vec![if bits == 4 { 8 } else { 128 }; (rows * blocks) as usize],
        Some(zeros) => match site.weight(zeros).filter(|tensor| tensor.dtype == DataType::Uint8) {
            Some(tensor) => unpacked(tensor.bytes(), rows as usize, blocks as usize, bits),
            None => return Err(site.refuse(node, "has zero points that are no constant of uint8")),
        },
    };
    let zeros = Tensor::from_bytes(packed_type, &[dims[0], blocks as u64], repacked(&zeros, bits));
    let packed = site.constant(Tensor { dtype: packed_type, dims: dims.to_vec(), ..packed });
    let scales = site.constant(Tensor { dims: vec![dims[0], blocks as u64], ..scales });
    let zeros = site.constant(zeros);
    let attributes = [("axis", AttributeKind::Int(1)), ("block_size", AttributeKind::Int(block))];
    let mut weight = site.op("DequantizeLinear", &[packed, scales, zeros], &attributes);
    if blocks * block != inner {
        weight = site.slice(weight, 1, 0, inner);
    }
    let weight = site.transpose(weight, &[1, 0]);
    let output = site.output(node)?;
    match optional(node, 5) {
        None => site.give(output, "MatMul", &[a, weight], &[]),
        Some(bias) => {
            let product = site.op("MatMul", &[a, weight], &[]);
            site.give(output, "Add", &[product, bias], &[]);
        }
    }
    Ok(())
}

/// One number per byte, from rows that begin at a byte each.
fn unpacked(bytes: &[u8], rows: usize, columns: usize, bits: i64) -> Vec<u8> {
    if bits == 8 {
        return bytes.to_vec();
    }
    let width = columns.div_ceil(2);
    let number = |row: usize, column: usize| {
        let byte = bytes.get(row * width + column / 2).copied().unwrap_or(0);
        if column.is_multiple_of(2) { byte & 15 } else { byte >> 4 }
    };
    (0..rows).flat_map(|row| (0..columns).map(move |column| number(row, column))).collect()
}

/// Numbers in a row as ONNX packs a tensor, the first in the low bits.
fn repacked(numbers: &[u8], bits: i64) -> Vec<u8> {
    if bits == 8 {
        return numbers.to_vec();
    }
    numbers.chunks(2).map(|pair| pair[0] | (pair.get(1).copied().unwrap_or(0) << 4)).collect()
}

/// Rows of a table in blocks: the packed rows are looked up, then made floats.
///
/// Shapes: data `[V, D * bits / 8]` of uint8, scales `[V, D / block_size]`, zero points packed by row.
/// Source: ONNX Runtime, com.microsoft GatherBlockQuantized-1.
pub(super) fn gather_block_quantised(node: &Node, site: &mut Site<'_>) -> Result<()> {
    site.only(node, &["bits", "block_size", "gather_axis", "quantize_axis"], 4)?;
    let (bits, block) = (int(node, "bits", 4), int(node, "block_size", 128));
    let (data, ids, scales) = (site.input(node, 0)?, site.input(node, 1)?, site.input(node, 2)?);
    let dims = site.dims(data);
    let (Some(DataType::Uint8), Some(&[_, bytes])) = (site.dtype(data), dims.as_deref()) else {
        return Err(site.refuse(node, "has a table that is not of uint8 with two known sizes"));
    };
    let axes = (int(node, "gather_axis", 0), int(node, "quantize_axis", 1));
    if ![4, 8].contains(&bits) || ![(0, 1), (0, -1)].contains(&axes) {
        return Err(
            site.refuse(node, &format!("has numbers of {bits} bits, gathered and quantised along axes {axes:?}"))
        );
    }
    let width = bytes * 8 / bits;
    if block < 1 || width % block != 0 {
        return Err(site.refuse(node, "has rows of no whole number of blocks"));
    }
    let blocks = width / block;
    let rows = site.op("Gather", &[data, ids], &[("axis", AttributeKind::Int(0))]);
    let numbers = floats(site, rows, bits, &[-1, blocks, block], scales);
    let zeros = match optional(node, 3) {
        None => site.float_like(if bits == 4 { 8.0 } else { 128.0 }, scales),
        Some(zeros) => {
            let rows = site.op("Gather", &[zeros, ids], &[("axis", AttributeKind::Int(0))]);
            let padded = if bits == 4 { blocks + blocks % 2 } else { blocks };
            let zeros = floats(site, rows, bits, &[-1, padded, 1], scales);
            site.slice(zeros, 1, 0, blocks)
        }
    };
    let scales = site.op("Gather", &[scales, ids], &[("axis", AttributeKind::Int(0))]);
    let scales = site.reshape(scales, &[-1, blocks, 1]);
    let moved = site.op("Sub", &[numbers, zeros], &[]);
    let scaled = site.op("Mul", &[moved, scales], &[]);
    let (shape, width) = (site.op("Shape", &[ids], &[]), site.ints(&[width]));
    let shape = site.concat(&[shape, width], 0);
    let output = site.output(node)?;
    site.give(output, "Reshape", &[scaled, shape], &[]);
    Ok(())
}

/// Packed bytes as numbers of the type of `like`.
fn floats(site: &mut Site<'_>, packed: ValueId, bits: i64, shape: &[i64], like: ValueId) -> ValueId {
    let mut numbers = packed;
    if bits == 4 {
        let byte = |value: u8| Tensor::from_bytes(DataType::Uint8, &[], vec![value]);
        let (mask, shift) = (site.constant(byte(15)), site.constant(byte(4)));
        let low = site.op("BitwiseAnd", &[packed, mask], &[]);
        let right = [("direction", AttributeKind::String(b"RIGHT".to_vec()))];
        let high = site.op("BitShift", &[packed, shift], &right);
        let last = site.ints(&[-1]);
        let pair = [low, high].map(|half| site.op("Unsqueeze", &[half, last], &[]));
        numbers = site.concat(&pair, -1);
    }
    let numbers = site.reshape(numbers, shape);
    let numbers = site.cast(numbers, DataType::Float);
    site.like(numbers, like)
}
