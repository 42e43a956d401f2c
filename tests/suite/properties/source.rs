//! Random shapes, numbers and choices.

use interlace::ir::{self, DataType};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::case::{Case, Single};

/// The source of random choices for the cases of one row.
pub struct Source {
    rng: ChaCha8Rng,
    domain: &'static str,
    op: &'static str,
    /// Version of the default domain.
    pub version: i64,
    /// True if floats of any type are bfloat16.
    ///
    /// ONNX Runtime's CPU kernels support bfloat16 for casts and for operators that move data. Cases of other operators
    /// have no reference.
    pub in_bfloat16: bool,
}

pub const INTEGERS: &[DataType] = &[DataType::Int64, DataType::Int32, DataType::Int8, DataType::Uint8, DataType::Int16];

impl Source {
    pub fn new(domain: &'static str, op: &'static str, version: i64, seed: u64) -> Self {
        Source { rng: ChaCha8Rng::seed_from_u64(seed), domain, op, version, in_bfloat16: false }
    }

    /// The operator of the row, without inputs and attributes.
    pub fn single(&self) -> Single {
        Single::new(self.domain, self.op, self.version)
    }

    /// A case of one operator; sometimes one of its inputs is an initializer.
    pub fn case(&mut self, single: Single) -> Case {
        let share = self.pick(&[0.0, 0.0, 0.5, 1.0]);
        single.case(|| self.chance(share))
    }

    /// Below `count`.
    pub fn below(&mut self, count: usize) -> usize {
        self.rng.random_range(0..count)
    }

    /// From `low` to `high`, both included.
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        self.rng.random_range(low..=high)
    }

    pub fn chance(&mut self, share: f64) -> bool {
        self.rng.random_bool(share)
    }

    pub fn flag(&mut self) -> i64 {
        self.between(0, 1)
    }

    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    /// True in one case of two.
    pub fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        if self.chance(0.5) { Some(make(self)) } else { None }
    }

    pub fn float(&mut self, low: f64, high: f64) -> f64 {
        self.rng.random_range(low..=high)
    }

    /// Axes from 1 to 5 long.
    pub fn shape(&mut self, least: usize, most: usize) -> Vec<i64> {
        let rank = least + self.below(most - least + 1);
        (0..rank).map(|_| self.between(1, 5)).collect()
    }

    /// A shape that sometimes has an empty axis.
    pub fn any_shape(&mut self, least: usize, most: usize) -> Vec<i64> {
        let mut shape = self.shape(least, most);
        if !shape.is_empty() && self.chance(0.06) {
            let axis = self.below(shape.len());
            shape[axis] = 0;
        }
        shape
    }

    /// A shape of the same rank or less that broadcasts with the given one.
    pub fn part_of(&mut self, shape: &[i64]) -> Vec<i64> {
        let skip = if self.chance(0.4) { self.below(shape.len() + 1) } else { 0 };
        shape[skip..].iter().map(|&dim| if self.chance(0.3) { 1 } else { dim }).collect()
    }

    /// An axis of this rank, counted from either end.
    pub fn axis(&mut self, rank: usize) -> i64 {
        self.between(-(rank as i64), rank as i64 - 1)
    }

    /// Distinct axes of this rank, counted from either end.
    pub fn axes(&mut self, rank: usize) -> Vec<i64> {
        let mut axes = Vec::new();
        for axis in 0..rank as i64 {
            if self.chance(0.5) {
                axes.push(if self.chance(0.3) { axis - rank as i64 } else { axis });
            }
        }
        if self.chance(0.2) {
            axes.reverse();
        }
        axes
    }

    pub fn float_type(&mut self) -> DataType {
        use DataType::{Bfloat16, Double, Float, Float16};
        let picked = self.pick(&[Float, Float, Float, Float, Double, Float16]);
        if self.in_bfloat16 { Bfloat16 } else { picked }
    }

    pub fn number_type(&mut self) -> DataType {
        if self.chance(0.5) { self.float_type() } else { self.pick(INTEGERS) }
    }

    /// Floats in a range. In one case of two, if the range is wide enough, multiples of a quarter, so that ties occur.
    pub fn floats(&mut self, dtype: DataType, shape: &[i64], low: f64, high: f64) -> ir::Tensor {
        let grid = high - low >= 1.0 && self.chance(0.5);
        let values: Vec<f64> = (0..count(shape))
            .map(|_| {
                let value = self.float(low, high);
                if grid { ((value * 4.0).round() / 4.0).clamp(low, high) } else { value }
            })
            .collect();
        encode(dtype, shape, &values)
    }

    pub fn normal(&mut self, shape: &[i64]) -> ir::Tensor {
        self.floats(DataType::Float, shape, -2.0, 2.0)
    }

    /// Integers in a range, both ends included.
    pub fn ints(&mut self, dtype: DataType, shape: &[i64], low: i64, high: i64) -> ir::Tensor {
        let values: Vec<f64> = (0..count(shape)).map(|_| self.between(low, high) as f64).collect();
        encode(dtype, shape, &values)
    }

    pub fn bools(&mut self, shape: &[i64]) -> ir::Tensor {
        self.ints(DataType::Bool, shape, 0, 1)
    }

    /// Numbers of any type: floats from -3 to 3, small integers, or bools.
    pub fn numbers(&mut self, dtype: DataType, shape: &[i64]) -> ir::Tensor {
        match dtype {
            DataType::Bool => self.bools(shape),
            DataType::Uint8 => self.ints(dtype, shape, 0, 20),
            dtype if dtype.is_float() => self.floats(dtype, shape, -3.0, 3.0),
            dtype => self.ints(dtype, shape, -9, 9),
        }
    }
}

pub fn count(shape: &[i64]) -> usize {
    shape.iter().product::<i64>() as usize
}

/// int64 numbers in this shape.
pub fn int64(shape: &[i64], values: &[i64]) -> ir::Tensor {
    let dims: Vec<u64> = shape.iter().map(|&dim| dim as u64).collect();
    ir::Tensor::from_i64(&dims, values)
}

/// A 1-D tensor of int64.
pub fn list(values: &[i64]) -> ir::Tensor {
    int64(&[values.len() as i64], values)
}

/// A 1-D tensor of f32.
pub fn float_list(values: &[f32]) -> ir::Tensor {
    ir::Tensor::from_f32(&[values.len() as u64], values)
}

/// Numbers as a tensor of this type; 4-bit numbers are packed.
pub fn encode(dtype: DataType, shape: &[i64], values: &[f64]) -> ir::Tensor {
    let dims: Vec<u64> = shape.iter().map(|&dim| dim as u64).collect();
    let bytes: Vec<u8> = match dtype {
        DataType::Float => values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
        DataType::Double => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DataType::Float16 => values.iter().flat_map(|&x| half::f16::from_f64(x).to_le_bytes()).collect(),
        DataType::Bfloat16 => values.iter().flat_map(|&x| half::bf16::from_f64(x).to_le_bytes()).collect(),
        DataType::Int64 => values.iter().flat_map(|&x| (x as i64).to_le_bytes()).collect(),
        DataType::Int32 => values.iter().flat_map(|&x| (x as i32).to_le_bytes()).collect(),
        DataType::Int16 => values.iter().flat_map(|&x| (x as i16).to_le_bytes()).collect(),
        DataType::Int8 => values.iter().flat_map(|&x| (x as i8).to_le_bytes()).collect(),
        DataType::Uint8 | DataType::Bool => values.iter().map(|&x| x as u8).collect(),
        DataType::Uint4 | DataType::Int4 => values
            .chunks(2)
            .map(|pair| (pair[0] as i8 as u8 & 15) | ((pair.get(1).map_or(0, |&x| x as i8 as u8) & 15) << 4))
            .collect(),
        other => panic!("no numbers of {other}"),
    };
    ir::Tensor::from_bytes(dtype, &dims, bytes)
}
