//! Writes operators of ONNX Runtime's own domain as standard ones, for engines that have only these.

mod attention;
mod elementwise;
mod norms;
mod quantised;
mod site;

use std::collections::{HashMap, HashSet};

use crate::base::{Error, Result};
use crate::ir::{Body, DataType, Model, Node, Tensor, ValueId};

use super::{raise_opset, tidy};
use site::Site;

const MICROSOFT: &str = "com.microsoft";

/// Writes a node with standard operators.
type Write = fn(&Node, &mut Site<'_>) -> Result<()>;

/// An operator: domain, name, the version of the default operator set that its standard form needs, and its function.
type Row = (&'static str, &'static str, i64, Write);

const ROWS: &[Row] = &[
    ("", "SimplifiedLayerNormalization", 18, norms::simplified),
    (MICROSOFT, "SimplifiedLayerNormalization", 18, norms::simplified),
    (MICROSOFT, "SkipSimplifiedLayerNormalization", 18, norms::skip_simplified),
    (MICROSOFT, "SkipLayerNormalization", 18, norms::skip),
    (MICROSOFT, "QuickGelu", 18, elementwise::quick_gelu),
    (MICROSOFT, "Gelu", 18, elementwise::gelu),
    (MICROSOFT, "BiasGelu", 18, elementwise::gelu),
    (MICROSOFT, "FastGelu", 18, elementwise::fast_gelu),
    (MICROSOFT, "FusedMatMul", 18, elementwise::fused_mat_mul),
    (MICROSOFT, "MatMulNBits", 21, quantised::mat_mul_n_bits),
    (MICROSOFT, "GatherBlockQuantized", 21, quantised::gather_block_quantised),
    (MICROSOFT, "RotaryEmbedding", 18, attention::rotary_embedding),
    (MICROSOFT, "GroupQueryAttention", 18, attention::group_query_attention),
];

/// Names of the operators that are written with standard ones, sorted.
pub fn standardised() -> Vec<&'static str> {
    let mut names: Vec<&str> = ROWS.iter().map(|(_, name, ..)| *name).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn row_of(node: &Node) -> Option<&'static Row> {
    ROWS.iter().find(|(domain, name, ..)| *domain == node.domain && *name == node.op_type)
}

/// The model with standard operators alone. Its operator set is raised where they need a later version.
///
/// Errors: `Error::Unsupported` naming an operator of another domain that is not converted, or an attribute or input of
/// one that is; as [`raise_opset`].
pub fn standard_operators(model: &Model) -> Result<Model> {
    let mut least = 0;
    let mut weights = HashMap::new();
    let mut read: HashSet<ValueId> = HashSet::new();
    visit(&model.graph.body, &mut |body| {
        weights.extend(body.initializers.iter().map(|(id, tensor)| (*id, tensor.clone())));
        read.extend(&body.outputs);
        for node in &body.nodes {
            least = row_of(node).map_or(least, |(_, _, opset, _)| least.max(*opset));
            read.extend(node.present_inputs());
        }
    });
    let own = model.opset_imports.get("").copied().unwrap_or(1);
    let mut written = raise_opset(model, own.max(least))?;
    let mut body = std::mem::take(&mut written.graph.body);
    let mut added = Vec::new();
    let mut site = Site::new(&mut written.graph, &weights, &read, &mut added);
    let done = convert(&mut body, &mut site, &model.functions.iter().map(|f| (&*f.domain, &*f.name)).collect());
    body.initializers.append(&mut added);
    written.graph.body = body;
    done?;
    tidy::remove_dead_code(&mut written.graph.body);
    let mut domains: HashSet<String> = HashSet::new();
    visit(&written.graph.body, &mut |body| domains.extend(body.nodes.iter().map(|node| node.domain.clone())));
    domains.extend(written.functions.iter().flat_map(|function| function.opset_imports.keys().cloned()));
    domains.extend(written.functions.iter().map(|function| function.domain.clone()));
    written.opset_imports.retain(|domain, _| domain.is_empty() || domains.contains(domain));
    // 4-bit numbers are in the format since this version.
    let has_4_bits = |tensor: &Tensor| matches!(tensor.dtype, DataType::Uint4 | DataType::Int4);
    if written.graph.body.initializers.iter().any(|(_, tensor)| has_4_bits(tensor)) {
        written.ir_version = written.ir_version.max(10);
    }
    tidy::finish(&mut written)?;
    Ok(written)
}

fn visit(body: &Body, each: &mut impl FnMut(&Body)) {
    each(body);
    for inner in body.nodes.iter().flat_map(Node::bodies) {
        visit(inner, each);
    }
}

fn convert(body: &mut Body, site: &mut Site<'_>, functions: &HashSet<(&str, &str)>) -> Result<()> {
    let mut nodes = Vec::with_capacity(body.nodes.len());
    for mut node in std::mem::take(&mut body.nodes) {
        for inner in node.bodies_mut() {
            convert(inner, site, functions)?;
        }
        match row_of(&node) {
            Some((.., write)) => {
                site.enter(&node);
                write(&node, site)?;
                nodes.append(&mut site.nodes);
            }
            None if node.domain.is_empty() || functions.contains(&(node.domain.as_str(), node.op_type.as_str())) => {
                nodes.push(node);
            }
            None => {
                return Err(Error::unsupported(site.described(&node), "is not written with standard operators")
                    .remedy(format!("export the graph without it; written are {}", standardised().join(", "))));
            }
        }
    }
    body.nodes = nodes;
    Ok(())
}

/// A weight's tensor by its id.
type Weights = HashMap<ValueId, Tensor>;
