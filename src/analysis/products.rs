//! Operators that multiply matrices: one row each.

use crate::ir::{Node, ValueId};

/// One operator.
pub struct Product {
    op_type: &'static str,
    /// Number of the input that is the second factor; the first factor is input 0.
    second: usize,
    /// True when each row of the first factor determines the same row of the result, for any rank, unless
    /// the factor is transposed.
    by_row: bool,
}

const fn row(op_type: &'static str, second: usize, by_row: bool) -> Product {
    Product { op_type, second, by_row }
}

/// All operators that multiply matrices.
const PRODUCTS: &[Product] = &[
    row("MatMul", 1, true),
    row("FusedMatMul", 1, true),
    row("MatMulInteger", 1, true),
    row("MatMulNBits", 1, true),
    row("MatMulBnb4", 1, true),
    row("DynamicQuantizeMatMul", 1, true),
    row("MatMulIntegerToFloat", 1, true),
    row("QLinearMatMul", 3, true),
    row("Gemm", 1, false),
    row("FusedGemm", 1, false),
    row("QGemm", 3, false),
    row("Einsum", 1, false),
];

/// The row of a node, if it multiplies matrices.
pub fn product(node: &Node) -> Option<&'static Product> {
    PRODUCTS.iter().find(|row| row.op_type == node.op_type)
}

impl Product {
    /// True when `node` treats each row of its first factor independently.
    pub fn by_row(&self, node: &Node) -> bool {
        let turned = |name: &str| node.attribute(name).and_then(crate::ir::Attribute::as_int).unwrap_or(0) != 0;
        self.by_row && !turned("transA") && !turned("transBatchA")
    }

    /// The factors of `node`; `None` when one is missing.
    pub fn factors(&self, node: &Node) -> Option<[ValueId; 2]> {
        let input = |number: usize| node.inputs.get(number).copied().flatten();
        Some([input(0)?, input(self.second)?])
    }
}
