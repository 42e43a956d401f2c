//! Cases of matrix products, and of quantised numbers.

use interlace::ir::{self, AttributeKind, DataType};
use interlace::rewrite::{EXPANDED_BLOCKS, INTERNAL_DOMAIN, ROUNDED, ROUNDED_DYNAMICALLY};

use super::Generator;
use super::attention::in_parts;
use super::case::{Case, Single};
use super::source::{Source, count, encode};

const MS: &str = "com.microsoft";
const FLOAT: DataType = DataType::Float;

/// Equations with the length of every letter from 1 to 4; `...` is one axis of 2.
const EQUATIONS: &[&str] = &[
    "ij,jk->ik",
    "bij,bjk->bik",
    "ij->ji",
    "ij->i",
    "ij->",
    "i,j->ij",
    "bhid,bhjd->bhij",
    "...ij,...jk->...ik",
    "ij,jk",
    "i,i->",
    "bij, jk -> bik",
    "ijk,ijk->ij",
    "ij,ij,jk->ik",
    "ii->i",
    "bhij,bhjd->bihd",
];

fn einsum(s: &mut Source) -> Case {
    let equation = s.pick(EQUATIONS);
    let sizes: Vec<i64> = (0..26).map(|_| s.between(1, 4)).collect();
    let left = equation.split("->").next().unwrap_or("").replace("...", ".");
    let mut single = s.single().text("equation", equation);
    for term in left.split(',') {
        let letters = term.bytes().filter(|byte| *byte != b' ');
        let shape: Vec<i64> =
            letters.map(|byte| if byte == b'.' { 2 } else { sizes[usize::from(byte - b'a')] }).collect();
        single = single.input(s.normal(&shape));
    }
    let single = single.output(FLOAT);
    s.case(single)
}

fn gemm(s: &mut Source, fused: bool) -> Case {
    let dtype = if fused { FLOAT } else { s.pick(&[FLOAT, FLOAT, DataType::Double, DataType::Float16]) };
    let (m, k, n) = (s.between(1, 4), s.between(1, 5), s.between(1, 4));
    let (left, right) = (s.flag(), s.flag());
    let a = if left == 1 { [k, m] } else { [m, k] };
    let b = if right == 1 { [n, k] } else { [k, n] };
    let bias = s.part_of(&[m, n]);
    let bias = if s.version < 11 || s.chance(0.7) { Some(s.floats(dtype, &bias, -2.0, 2.0)) } else { None };
    let mut single = s
        .single()
        .input(s.floats(dtype, &a, -2.0, 2.0))
        .input(s.floats(dtype, &b, -2.0, 2.0))
        .maybe(bias)
        .int("transA", left)
        .int("transB", right)
        .output(dtype)
        .tolerance(if dtype == DataType::Float16 { 2e-2 } else { 1e-4 });
    if s.chance(0.5) {
        single = single.float("alpha", s.float(-1.5, 1.5)).float("beta", s.float(-1.5, 1.5));
    }
    if fused && s.chance(0.8) {
        single = single.text("activation", s.pick(&["Relu", "Sigmoid", "Tanh"]));
    }
    s.case(single)
}

/// Two shapes that NumPy's `matmul` multiplies.
fn product_shapes(s: &mut Source) -> (Vec<i64>, Vec<i64>) {
    let (m, k, n) = (s.between(1, 4), s.between(1, 5), s.between(1, 4));
    let batch = s.shape(0, 2);
    let (left, right) = (s.part_of(&batch), s.part_of(&batch));
    let a = if s.chance(0.1) { vec![k] } else { [left, vec![m, k]].concat() };
    let b = if s.chance(0.1) { vec![k] } else { [right, vec![k, n]].concat() };
    (a, b)
}

fn matmul(s: &mut Source) -> Case {
    let (a, b) = product_shapes(s);
    let dtype = s.pick(&[FLOAT, FLOAT, DataType::Double, DataType::Int32, DataType::Int64]);
    let single = s.single().input(s.numbers(dtype, &a)).input(s.numbers(dtype, &b)).output(dtype);
    s.case(single)
}

fn fused_matmul(s: &mut Source) -> Case {
    let (m, k, n) = (s.between(1, 4), s.between(1, 5), s.between(1, 4));
    let batch = s.shape(1, 2);
    let shape = |rows: i64, columns: i64, turned: bool, batched: bool| -> Vec<i64> {
        let (rows, columns) = if turned { (columns, rows) } else { (rows, columns) };
        if batched { [&[rows], &batch[..], &[columns]].concat() } else { [&batch[..], &[rows, columns]].concat() }
    };
    let (left, right, left_batch, right_batch) = (s.flag(), s.flag(), s.pick(&[0, 0, 1]), s.pick(&[0, 0, 1]));
    let a = shape(m, k, left == 1, left_batch == 1);
    let b = shape(k, n, right == 1, right_batch == 1);
    let mut single = s.single().input(s.normal(&a)).input(s.normal(&b)).int("transA", left).int("transB", right);
    if left_batch + right_batch > 0 {
        single = single.int("transBatchA", left_batch).int("transBatchB", right_batch);
    }
    if s.chance(0.5) {
        single = single.float("alpha", s.float(-1.5, 1.5));
    }
    let single = single.output(FLOAT);
    s.case(single)
}

/// Layout of scales and zero points over a tensor.
struct Grain {
    shape: Vec<i64>,
    scales: Vec<i64>,
    axis: Option<i64>,
    block: i64,
}

/// One scale for all elements, one for each index of an axis, or one for each block of it.
fn grain(s: &mut Source, blocks: bool) -> Grain {
    let shape = s.shape(1, 4);
    let rank = shape.len();
    let axis = s.axis(rank);
    let at = axis.rem_euclid(rank as i64) as usize;
    match s.below(if blocks { 3 } else { 2 }) {
        0 => Grain { shape, scales: if s.chance(0.5) { vec![] } else { vec![1] }, axis: None, block: 0 },
        1 => Grain { scales: vec![shape[at]], shape, axis: Some(axis), block: 0 },
        _ => {
            let block = s.between(1, 3);
            let mut scales = shape.clone();
            scales[at] = (shape[at] + block - 1) / block;
            Grain { shape, scales, axis: Some(axis), block }
        }
    }
}

impl Grain {
    fn write(&self, single: Single) -> Single {
        let single = single.maybe_int("axis", self.axis);
        if self.block > 0 { single.int("block_size", self.block) } else { single }
    }
}

/// Range of a quantised type.
fn range(dtype: DataType) -> (i64, i64) {
    match dtype {
        DataType::Uint8 => (0, 255),
        DataType::Int8 => (-128, 127),
        DataType::Int16 => (-32768, 32767),
        DataType::Uint4 => (0, 15),
        DataType::Int4 => (-8, 7),
        _ => (-100_000, 100_000),
    }
}

fn is_4_bits(dtype: DataType) -> bool {
    matches!(dtype, DataType::Uint4 | DataType::Int4)
}

/// An input of a type that may have to be an initializer.
fn given(single: Single, tensor: ir::Tensor) -> Single {
    if is_4_bits(tensor.dtype) { single.fixed(tensor) } else { single.input(tensor) }
}

fn quantized_types(s: &Source, newer: bool) -> Vec<DataType> {
    let mut types = vec![DataType::Uint8, DataType::Int8];
    if newer && s.version >= 21 {
        types.extend([DataType::Int16, DataType::Uint4, DataType::Int4]);
    }
    types
}

fn dequantize(s: &mut Source, standard: bool) -> Case {
    let mut types = quantized_types(s, standard);
    types.push(DataType::Int32);
    let dtype = s.pick(&types);
    let mut g = grain(s, standard && s.version >= 21);
    if standard && s.version < 13 {
        (g.scales, g.axis) = (vec![], None);
    }
    let (low, high) = range(dtype);
    let x = s.ints(dtype, &g.shape, low, high);
    let zero = if dtype == DataType::Int32 { None } else { s.maybe(|s| s.ints(dtype, &g.scales, low, high)) };
    let mut single = given(s.single(), x).input(s.floats(FLOAT, &g.scales, 0.01, 1.0));
    single = match zero {
        Some(zero) => given(single, zero),
        None => single,
    };
    let single = g.write(single).output(FLOAT);
    s.case(single)
}

fn quantize(s: &mut Source, standard: bool) -> Case {
    let types = quantized_types(s, standard);
    let dtype = s.pick(&types);
    let mut g = grain(s, standard && s.version >= 21);
    if standard && s.version < 13 {
        (g.scales, g.axis) = (vec![], None);
    }
    let (low, high) = range(dtype);
    let type_given = standard && s.version >= 21 && s.chance(0.4);
    let zero = if type_given && s.chance(0.5) || dtype == DataType::Uint8 && s.chance(0.3) { None } else { Some(()) };
    // Scales that are powers of 2 produce ties.
    let scales: Vec<f64> = (0..count(&g.scales))
        .map(|_| if s.chance(0.5) { s.pick(&[0.125, 0.25, 0.5]) } else { s.float(0.01, 0.6) })
        .collect();
    let mut single = s.single().input(s.floats(FLOAT, &g.shape, -9.0, 9.0)).input(encode(FLOAT, &g.scales, &scales));
    if zero.is_some() {
        single = given(single, s.ints(dtype, &g.scales, low, high));
    }
    if type_given {
        single = single.int("output_dtype", dtype as i64);
    }
    let dtype = if zero.is_none() && !type_given { DataType::Uint8 } else { dtype };
    let single = g.write(single).output(dtype);
    s.case(single)
}

fn dynamic_quantize(s: &mut Source) -> Case {
    let shape = s.shape(1, 3);
    let (low, high) = s.pick(&[(-3.0, 3.0), (0.5, 4.0), (-7.0, -1.0), (0.0, 0.0)]);
    let x = s.floats(FLOAT, &shape, low, high);
    let single = s.single().input(x).output(DataType::Uint8).output(FLOAT).output(DataType::Uint8);
    s.case(single)
}

fn matmul_integer(s: &mut Source) -> Case {
    let (mut a, mut b) = product_shapes(s);
    if a.len() < 2 || b.len() < 2 {
        (a, b) = (vec![2, 3], vec![3, 4]);
    }
    let types = s.pick(&[
        (DataType::Uint8, DataType::Uint8),
        (DataType::Uint8, DataType::Int8),
        (DataType::Int8, DataType::Int8),
    ]);
    let one = |s: &mut Source, dtype: DataType, shape: &[i64]| {
        let (low, high) = range(dtype);
        s.ints(dtype, shape, low, high)
    };
    let left = s.maybe(|s| one(s, types.0, &[]));
    let columns = b[b.len() - 1];
    let right = s.maybe(|s| if s.chance(0.5) { one(s, types.1, &[]) } else { one(s, types.1, &[columns]) });
    let single = s
        .single()
        .input(one(s, types.0, &a))
        .input(one(s, types.1, &b))
        .maybe(left)
        .maybe(right)
        .output(DataType::Int32);
    s.case(single)
}

fn matmul_nbits(s: &mut Source) -> Case {
    let (bits, block) = (s.pick(&[4, 8]), s.pick(&[16, 32]));
    let (k, n) = (s.pick(&[16, 24, 32, 40, 64]), s.between(1, 6));
    let blocks = (k + block - 1) / block;
    let mut x = s.shape(0, 1);
    x.extend([s.between(1, 3), k]);
    let packed = block * bits / 8;
    let zero_bytes = (blocks * bits + 7) / 8;
    let zero = s.maybe(|s| {
        if s.chance(0.7) {
            s.ints(DataType::Uint8, &[n, zero_bytes], 0, 255)
        } else {
            s.floats(FLOAT, &[n, blocks], 0.0, 15.0)
        }
    });
    let bias = s.maybe(|s| s.normal(&[n]));
    let mut single = s
        .single()
        .input(s.normal(&x))
        .fixed(s.ints(DataType::Uint8, &[n, blocks, packed], 0, 255))
        .fixed(s.floats(FLOAT, &[n, blocks], 0.001, 0.02));
    single = match zero {
        Some(zero) => single.fixed(zero),
        None => single.absent(),
    };
    let single = single
        .absent()
        .maybe(bias)
        .int("K", k)
        .int("N", n)
        .int("bits", bits)
        .int("block_size", block)
        .output(FLOAT)
        .tolerance(1e-3);
    s.case(single)
}

fn gather_block_quantized(s: &mut Source) -> Case {
    let block = s.pick(&[16, 32]);
    let (rows, blocks) = (s.between(1, 5), s.between(1, 2));
    let width = block * blocks;
    let dtype = s.pick(&[DataType::Uint8, DataType::Uint8, DataType::Uint4, DataType::Int4]);
    let bits = if dtype == DataType::Uint8 { s.pick(&[4, 8]) } else { 4 };
    let packed = if dtype == DataType::Uint8 { width * bits / 8 } else { width };
    let (low, high) = range(dtype);
    let shape = s.shape(0, 2);
    let index_type = s.pick(&[DataType::Int64, DataType::Int32]);
    let index = s.ints(index_type, &shape, -rows, rows - 1);
    let zero_width = if dtype == DataType::Uint8 { (blocks * bits + 7) / 8 } else { blocks };
    let zero = s.maybe(|s| s.ints(dtype, &[rows, zero_width], low, high));
    let mut single = s.single().fixed(s.ints(dtype, &[rows, packed], low, high)).input(index).input(s.floats(
        FLOAT,
        &[rows, blocks],
        0.01,
        0.5,
    ));
    if let Some(zero) = zero {
        single = single.fixed(zero);
    }
    let mut single = single.int("block_size", block).int("quantize_axis", 1).output(FLOAT);
    if dtype == DataType::Uint8 {
        single = single.int("bits", bits);
    }
    s.case(single)
}

/// The weight of `MatMulNBits` as floats; the reference multiplies the identity by it.
fn expanded_blocks(s: &mut Source) -> Case {
    let (bits, block) = (s.pick(&[4, 8]), s.pick(&[16, 32]));
    let (k, n) = (s.pick(&[16, 24, 32, 40, 64]), s.between(1, 6));
    let blocks = (k + block - 1) / block;
    let zero = s.maybe(|s| s.ints(DataType::Uint8, &[n, (blocks * bits + 7) / 8], 0, 255));
    let sizes = [("K", k), ("N", n), ("bits", bits), ("block_size", block)];
    let single = s.single().fixed(s.ints(DataType::Uint8, &[n, blocks, block * bits / 8], 0, 255)).fixed(s.floats(
        FLOAT,
        &[n, blocks],
        0.001,
        0.02,
    ));
    let has_zero = zero.is_some();
    let single = match zero {
        Some(zero) => single.fixed(zero),
        None => single,
    };
    let single = sizes.iter().fold(single, |single, (name, value)| single.int(name, *value)).output(FLOAT);
    let mut case = s.case(single);
    in_parts(&mut case, s.version, |b| {
        let identity: Vec<f32> = (0..k * k).map(|at| if at / k == at % k { 1.0 } else { 0.0 }).collect();
        b.constant("identity", ir::Tensor::from_f32(&[k as u64, k as u64], &identity));
        let inputs: &[&str] = if has_zero { &["identity", "in0", "in1", "in2"] } else { &["identity", "in0", "in1"] };
        let attributes = sizes.iter().map(|(name, value)| (*name, AttributeKind::Int(*value))).collect();
        let product = b.node("com.microsoft:MatMulNBits", inputs, &["out0"], attributes);
        b.push(product);
    });
    case
}

/// `QuantizeLinear` and `DequantizeLinear` in one.
fn rounded(s: &mut Source) -> Case {
    let shape = s.shape(1, 3);
    let dtype = s.pick(&[DataType::Uint8, DataType::Int8]);
    let (low, high) = range(dtype);
    let scale = if s.chance(0.5) { s.pick(&[0.125, 0.25, 0.5]) } else { s.float(0.01, 0.6) };
    let single = s
        .single()
        .input(s.floats(FLOAT, &shape, -9.0, 9.0))
        .input(encode(FLOAT, &[], &[scale]))
        .input(s.ints(dtype, &[], low, high))
        .output(FLOAT);
    let mut case = s.case(single);
    in_parts(&mut case, s.version, |b| {
        let number = b.node("QuantizeLinear", &["in0", "in1", "in2"], &["number"], Vec::new());
        let back = b.node("DequantizeLinear", &["number", "in1", "in2"], &["out0"], Vec::new());
        b.push(number);
        b.push(back);
    });
    case
}

/// `DynamicQuantizeLinear` and the way back to floats in one.
fn rounded_dynamically(s: &mut Source) -> Case {
    let shape = s.shape(1, 3);
    let (low, high) = s.pick(&[(-3.0, 3.0), (0.5, 4.0), (-7.0, -1.0), (0.0, 0.0)]);
    let single = s.single().input(s.floats(FLOAT, &shape, low, high)).output(FLOAT);
    let mut case = s.case(single);
    in_parts(&mut case, s.version, |b| {
        let number = b.node("DynamicQuantizeLinear", &["in0"], &["number", "scale", "zero"], Vec::new());
        let back = b.node("DequantizeLinear", &["number", "scale", "zero"], &["out0"], Vec::new());
        b.push(number);
        b.push(back);
    });
    case
}

pub const ROWS: &[Generator] = &[
    ("", "Einsum", einsum),
    ("", "Gemm", |s| gemm(s, false)),
    ("", "MatMul", matmul),
    (MS, "FusedGemm", |s| gemm(s, true)),
    (MS, "FusedMatMul", fused_matmul),
    ("", "DequantizeLinear", |s| dequantize(s, true)),
    ("", "DynamicQuantizeLinear", dynamic_quantize),
    ("", "MatMulInteger", matmul_integer),
    ("", "QuantizeLinear", |s| quantize(s, true)),
    (MS, "DequantizeLinear", |s| dequantize(s, false)),
    (MS, "GatherBlockQuantized", gather_block_quantized),
    (MS, "MatMulNBits", matmul_nbits),
    (MS, "QuantizeLinear", |s| quantize(s, false)),
    (INTERNAL_DOMAIN, EXPANDED_BLOCKS, expanded_blocks),
    (INTERNAL_DOMAIN, ROUNDED, rounded),
    (INTERNAL_DOMAIN, ROUNDED_DYNAMICALLY, rounded_dynamically),
];
