//! The domain of nodes that only the interpreter has, and the test for operators of the default domain.

use crate::ir::Node;

/// Domain of the nodes that rewrites create in memory; never written to a file.
pub const INTERNAL_DOMAIN: &str = "interlace";

/// A weight `[K, N]` as floats, from numbers packed in blocks as `MatMulNBits` reads them.
pub const EXPANDED_BLOCKS: &str = "ExpandedBlocks";

/// `QuantizeLinear` and `DequantizeLinear` in one, with a gradient that passes straight through.
pub const ROUNDED: &str = "Rounded";

/// `DynamicQuantizeLinear` and back to floats in one, with a gradient that passes straight through.
pub const ROUNDED_DYNAMICALLY: &str = "RoundedDynamically";

/// True when the node has this operator of the default domain.
pub(super) fn standard(node: &Node, op: &str) -> bool {
    node.op_type == op && node.domain.is_empty()
}
