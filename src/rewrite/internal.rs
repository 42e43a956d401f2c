//! The domain of fused nodes, and the test for operators of the default domain.

use crate::ir::Node;

/// Domain of the nodes that fusions create in memory; never written to a file.
pub const INTERNAL_DOMAIN: &str = "interlace";

/// True when the node has this operator of the default domain.
pub(super) fn standard(node: &Node, op: &str) -> bool {
    node.op_type == op && node.domain.is_empty()
}
