//! Kinds of blocks: token mixing by attention, by a state or by convolution, or work on each token separately.

use std::collections::HashSet;

use crate::ir::{Body, GraphIndex, Node, ValueId};

use super::chain::Chain;
use super::dataflow::from_weights;
use super::products::product;

/// Kind of token mixing in a block's branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixing {
    /// Queries and keys of the same sequence. `window` is in tokens, where the graph states one.
    Attention { window: Option<i64> },
    /// A recurrent state with an input and an output, without attention.
    State,
    /// A convolution whose last inputs are kept as a state between calls, without a recurrence.
    StatefulConvolution,
    /// A convolution, without attention or a state.
    Convolution,
    /// Cross-attention: keys of another sequence. Holds the node that computes the attention.
    Cross(usize),
    /// Each token separately, through one set of weights or through selected experts.
    None { experts: bool },
}

impl Mixing {
    /// True for kinds that mix tokens. Each such block begins a layer.
    pub fn is_mixer(self) -> bool {
        !matches!(self, Mixing::None { .. })
    }

    /// One or two words for messages and tables.
    pub fn label(self) -> &'static str {
        match self {
            Mixing::Attention { window: None } => "attention",
            Mixing::Attention { window: Some(_) } => "sliding attention",
            Mixing::State => "linear attention",
            Mixing::StatefulConvolution => "short convolution",
            Mixing::Convolution => "convolution",
            Mixing::Cross(_) => "cross-attention",
            Mixing::None { experts: false } => "mlp",
            Mixing::None { experts: true } => "moe",
        }
    }
}

/// Operators that compute a whole attention; their keys are inputs 1 and later.
const ATTENTION: &[(&str, &str)] = &[
    ("", "Attention"),
    ("com.microsoft", "Attention"),
    ("com.microsoft", "GroupQueryAttention"),
    ("com.microsoft", "MultiHeadAttention"),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"),
    ("com.microsoft", "PackedAttention"),
    ("com.microsoft", "PackedMultiHeadAttention"),
    ("com.microsoft", "PagedAttention"),
    ("com.microsoft", "SparseAttention"),
    ("com.microsoft", "QAttention"),
    ("com.microsoft", "LongformerAttention"),
];

/// Operators that occur in blocks with selected experts only.
const EXPERTS: &[(&str, &str)] = &[("", "TopK"), ("com.microsoft", "MoE"), ("com.microsoft", "QMoE")];

/// Convolutions of every form.
const CONVOLUTIONS: &[&str] =
    &["Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv", "NhwcFusedConv", "CausalConvWithState"];

/// Operators that carry a state from step to step.
const RECURRENCES: &[&str] = &["LinearAttention", "Scan", "Loop"];

/// True for operators that compute a whole attention.
pub fn is_attention(node: &Node) -> bool {
    ATTENTION.contains(&(node.domain.as_str(), node.op_type.as_str()))
}

/// True for operators that occur in blocks with token mixing.
pub fn can_mix(node: &Node) -> bool {
    let name = node.op_type.as_str();
    is_attention(node) || name == "Softmax" || RECURRENCES.contains(&name) || CONVOLUTIONS.contains(&name)
}

/// Attention window in tokens, the query's own token included, where the operator states one.
pub fn window(node: &Node) -> Option<i64> {
    let int = |name: &str| node.attribute(name).and_then(crate::ir::Attribute::as_int);
    let named = int("local_window_size").filter(|&size| size > 0);
    named.or_else(|| int("left_window_size").filter(|&before| before >= 0).map(|before| before.saturating_add(1)))
}

/// Classifies the nodes between two values of the stream. `has_state` is true when a cache or state
/// belongs to these nodes alone.
pub fn mixing(body: &Body, index: &GraphIndex, chain: &Chain, nodes: &[usize], has_state: bool) -> Mixing {
    let path: HashSet<usize> = nodes.iter().copied().collect();
    let on_path = |value: ValueId| index.node_of(value).is_some_and(|(node, _)| path.contains(&node));
    // Keys computed inside an earlier layer belong to this sequence too.
    let own = |value: ValueId| on_path(value) || from_inside_a_layer(body, index, chain, value);
    // The window of the attention, once one is found.
    let mut attention: Option<Option<i64>> = None;
    for &number in nodes {
        let node = &body.nodes[number];
        if is_attention(node) {
            // Input 1 of com.microsoft's `Attention` is a weight.
            let key = node.inputs.get(1).copied().flatten();
            if key.is_some_and(|key| !own(key) && !from_weights(body, index, key)) {
                return Mixing::Cross(number);
            }
            attention = Some(window(node));
        } else if node.op_type == "Softmax" {
            match softmax_source(body, index, number, &on_path, &own) {
                Some(Origin::Both) => attention = attention.or(Some(None)),
                Some(Origin::Foreign) => return Mixing::Cross(number),
                Some(Origin::Weight) | None => {}
            }
        }
    }
    if let Some(window) = attention {
        return Mixing::Attention { window };
    }
    let convolves = nodes.iter().any(|&number| CONVOLUTIONS.contains(&body.nodes[number].op_type.as_str()));
    if has_state {
        // A recurrence multiplies what it computed from the stream with itself, or lets its state decay by an
        // exponential; a convolution multiplies only with weights.
        let recurs = nodes.iter().map(|&number| &body.nodes[number]).any(|node| {
            let factors = product(node).and_then(|row| row.factors(node));
            factors.is_some_and(|factors| factors.iter().all(|&id| on_path(id)))
                || RECURRENCES.contains(&node.op_type.as_str())
                || node.op_type == "Exp"
        });
        return if convolves && !recurs { Mixing::StatefulConvolution } else { Mixing::State };
    }
    if convolves {
        return Mixing::Convolution;
    }
    let selects_experts = |node: &Node| EXPERTS.contains(&(node.domain.as_str(), node.op_type.as_str()));
    Mixing::None { experts: nodes.iter().any(|&number| selects_experts(&body.nodes[number])) }
}

/// True when a value is computed inside a block, and not from the stream alone.
fn from_inside_a_layer(body: &Body, index: &GraphIndex, chain: &Chain, value: ValueId) -> bool {
    let mut open = vec![value];
    let mut seen = HashSet::new();
    while let Some(value) = open.pop() {
        let Some((node, _)) = index.node_of(value).filter(|_| !chain.is_stream(value)) else { continue };
        if chain.level[node].is_some() {
            return true;
        }
        if chain.reached[node] && seen.insert(node) {
            open.extend(body.nodes[node].present_inputs());
        }
    }
    false
}

/// Limit on the nodes searched between a softmax and the product of its scores; masks and scales need about twenty.
const SCORE_NODES: usize = 200;

/// Origin of the two operands of the product before a softmax.
enum Origin {
    /// Both from the stream: queries and keys.
    Both,
    /// One is a weight: a router.
    Weight,
    /// One is computed from another input: keys of another sequence.
    Foreign,
}

/// Origin of the operands of the products before a softmax; `None` when there is no product on the path. A product with
/// both operands from the stream decides; else one with an operand from another input.
fn softmax_source(
    body: &Body,
    index: &GraphIndex,
    softmax: usize,
    on_path: &dyn Fn(ValueId) -> bool,
    own: &dyn Fn(ValueId) -> bool,
) -> Option<Origin> {
    // Back from the softmax through scaling, masking and concatenation to the product that made the scores.
    let mut open: Vec<ValueId> = body.nodes[softmax].inputs.first().copied().flatten().into_iter().collect();
    let mut seen = HashSet::new();
    let mut found = None;
    while let Some(value) = open.pop() {
        let Some((number, _)) = index.node_of(value).filter(|_| on_path(value)) else { continue };
        if !seen.insert(number) || seen.len() > SCORE_NODES {
            continue;
        }
        let node = &body.nodes[number];
        let Some(factors) = product(node).and_then(|row| row.factors(node)) else {
            open.extend(node.present_inputs());
            continue;
        };
        if factors.iter().all(|&id| own(id)) {
            return Some(Origin::Both);
        }
        let foreign = factors.iter().any(|&id| !own(id) && !from_weights(body, index, id));
        if foreign || found.is_none() {
            found = Some(if foreign { Origin::Foreign } else { Origin::Weight });
        }
    }
    found
}
