//! A weight of the graph as rows, in each of the ways in which exporters lay a matrix out.

use crate::ir::Tensor;

/// How the elements of a weight are read as rows of the checkpoint's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightLayout {
    /// All elements are one row: vectors.
    Flat,
    /// Rows along the last axis.
    Rows,
    /// The first axis counts rows: convolutions.
    Leading,
    /// Columns of each matrix of the last two axes: products that read `[input, output]`.
    Columns,
}

impl WeightLayout {
    /// The layouts that a weight of this shape can have, without those that are the same.
    pub fn of(dims: &[u64]) -> Vec<WeightLayout> {
        let mut layouts = vec![WeightLayout::Flat];
        if dims.iter().filter(|&&size| size != 1).count() > 1 {
            layouts.push(WeightLayout::Rows);
            if dims.len() > 2 {
                layouts.push(WeightLayout::Leading);
            }
            layouts.push(WeightLayout::Columns);
        }
        layouts
    }

    /// Numbers in a row.
    pub fn row_length(self, dims: &[u64]) -> usize {
        let all: u64 = dims.iter().product();
        let length = match self {
            WeightLayout::Flat => all,
            WeightLayout::Rows => dims.last().copied().unwrap_or(1),
            WeightLayout::Leading => all / dims.first().copied().unwrap_or(1).max(1),
            WeightLayout::Columns => dims.iter().rev().nth(1).copied().unwrap_or(1),
        };
        length as usize
    }

    /// The elements row by row.
    pub fn rows(self, tensor: &Tensor) -> Vec<u8> {
        let bytes = tensor.bytes();
        match self {
            WeightLayout::Columns => transposed(bytes, &tensor.dims, tensor.dtype.bits() / 8),
            _ => bytes.to_vec(),
        }
    }

    /// The elements in the weight's own order, from those row by row.
    pub fn elements(self, rows: &[u8], dims: &[u64], width: usize) -> Vec<u8> {
        match self {
            WeightLayout::Columns => {
                let mut turned = dims.to_vec();
                let last = turned.len() - 1;
                turned.swap(last, last - 1);
                transposed(rows, &turned, width)
            }
            _ => rows.to_vec(),
        }
    }
}

/// The last two axes exchanged; `width` bytes an element.
fn transposed(bytes: &[u8], dims: &[u64], width: usize) -> Vec<u8> {
    let (Some(&columns), Some(&rows)) = (dims.last(), dims.iter().rev().nth(1)) else { return bytes.to_vec() };
    let (rows, columns) = (rows as usize, columns as usize);
    let mut out = Vec::with_capacity(bytes.len());
    if rows * columns == 0 {
        return out;
    }
    for matrix in bytes.chunks_exact(rows * columns * width) {
        for column in 0..columns {
            for row in 0..rows {
                let at = (row * columns + column) * width;
                out.extend_from_slice(&matrix[at..at + width]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_read_and_written_back_matrix_by_matrix() {
        let dims = [2, 2, 3];
        let tensor = Tensor::from_f32(&dims, &(0..12).map(|n| n as f32).collect::<Vec<_>>());
        let rows = WeightLayout::Columns.rows(&tensor);
        let numbers: Vec<f32> = rows.as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect();
        assert_eq!(numbers, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 6.0, 9.0, 7.0, 10.0, 8.0, 11.0]);
        assert_eq!(WeightLayout::Columns.row_length(&dims), 2);
        assert_eq!(WeightLayout::Columns.elements(&rows, &dims, 4), tensor.bytes());
    }

    #[test]
    fn a_vector_is_one_row_and_a_convolution_has_a_row_for_each_filter() {
        assert_eq!(WeightLayout::of(&[1, 1, 8]), [WeightLayout::Flat]);
        assert_eq!(WeightLayout::Flat.row_length(&[1, 1, 8]), 8);
        assert!(WeightLayout::of(&[4, 3, 2, 2]).contains(&WeightLayout::Leading));
        assert_eq!(WeightLayout::Leading.row_length(&[4, 3, 2, 2]), 12);
    }
}
