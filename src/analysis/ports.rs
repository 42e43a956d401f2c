//! Matches cache inputs with cache outputs through the graph, and both with their layer. Every other output that reads
//! the stream becomes a tap.

use std::collections::{HashMap, HashSet};

use crate::base::{Error, Result};
use crate::ir::{Attribute, Body, Graph, GraphIndex, Node, ValueId};

use super::chain::Chain;
use super::dataflow::data_inputs;
use super::kinds::is_attention;
use super::layer::{KvPort, LayerMap, PortRole};
use super::owner::Owner;
use super::products::product;
use super::{operands, taps};

/// Cache ports of operators that compute a whole attention: (past input, present output) for key and value.
struct FusedPorts {
    domain: &'static str,
    op_type: &'static str,
    key: (usize, usize),
    value: Option<(usize, usize)>,
}

const FUSED_PORTS: &[FusedPorts] = &[
    FusedPorts { domain: "", op_type: "Attention", key: (4, 1), value: Some((5, 2)) },
    FusedPorts { domain: "com.microsoft", op_type: "GroupQueryAttention", key: (3, 1), value: Some((4, 2)) },
    FusedPorts { domain: "com.microsoft", op_type: "MultiHeadAttention", key: (6, 1), value: Some((7, 2)) },
    FusedPorts {
        domain: "com.microsoft",
        op_type: "DecoderMaskedMultiHeadAttention",
        key: (5, 1),
        value: Some((6, 2)),
    },
    FusedPorts { domain: "com.microsoft", op_type: "SparseAttention", key: (3, 1), value: Some((4, 2)) },
    FusedPorts { domain: "com.microsoft", op_type: "PagedAttention", key: (3, 1), value: Some((4, 2)) },
    FusedPorts { domain: "com.microsoft", op_type: "DecoderAttention", key: (6, 1), value: Some((7, 2)) },
    // Key and value are stacked in one tensor.
    FusedPorts { domain: "com.microsoft", op_type: "Attention", key: (4, 1), value: None },
    FusedPorts { domain: "com.microsoft", op_type: "DecoderMaskedSelfAttention", key: (4, 1), value: None },
    FusedPorts { domain: "com.microsoft", op_type: "QAttention", key: (8, 1), value: None },
];

/// The input whose state an output continues: in a recurrence, a short convolution or control flow.
fn carried(node: &Node, output: usize) -> Option<usize> {
    match (node.domain.as_str(), node.op_type.as_str()) {
        ("" | "com.microsoft", "LinearAttention" | "CausalConvWithState") => (output == 1).then_some(3),
        ("", "Scan") => {
            let scanned = node.attribute("num_scan_inputs").and_then(Attribute::as_int);
            let states = scanned.and_then(|count| node.inputs.len().checked_sub(usize::try_from(count).ok()?))?;
            (output < states).then_some(output)
        }
        ("", "Loop") => output.checked_add(2).filter(|&input| input < node.inputs.len()),
        // A cache of fixed size into which new entries are written.
        ("", "TensorScatter" | "ScatterND" | "ScatterElements" | "Scatter") => Some(0),
        _ => None,
    }
}

/// Operators between a cache port and its concatenation or attention.
const LAYOUT_OPS: &[&str] = &["Cast", "Identity", "Transpose", "Reshape"];

/// True for nodes that change only type or layout, including a concatenation of one tensor.
fn changes_only_layout(node: &Node) -> bool {
    LAYOUT_OPS.contains(&node.op_type.as_str()) || (node.op_type == "Concat" && node.inputs.len() == 1)
}

fn fused(node: &Node) -> Option<&'static FusedPorts> {
    FUSED_PORTS.iter().find(|row| row.domain == node.domain && row.op_type == node.op_type)
}

/// Fills `ports` of every layer, and `taps`.
///
/// A port is an output that continues a cache input. In a graph without cache inputs, outputs with the keys, values and
/// states that its layers compute are ports.
///
/// Errors: `Error::Invalid` when a cache input matches two outputs; `Error::Unsupported` when an unknown operator
/// produces a layer's cache.
pub fn assign(graph: &Graph, body: &Body, chain: &Chain, map: &mut LayerMap) -> Result<()> {
    let index = GraphIndex::of_body(body);
    let layer_of: HashMap<usize, usize> =
        map.layers.iter().flat_map(|layer| layer.path.iter().map(|&node| (node, layer.index))).collect();
    let shared = shared_inputs(body, &layer_of);
    let cached: Vec<HashSet<ValueId>> =
        map.layers.iter().map(|layer| operands::cached(body, &index, &layer.path)).collect();
    let tracer =
        Tracer { graph, body, index: &index, chain, layer_of: &layer_of, owners: &map.node_owners, shared: &shared };
    let others = body.outputs.iter().filter(|id| **id != map.result);
    let traces = others.map(|&output| Ok((output, tracer.trace_back(output)?))).collect::<Result<Vec<_>>>()?;
    let has_past = traces.iter().any(|(_, trace)| trace.as_ref().is_some_and(|trace| trace.past.is_some()));
    let mut taken: HashSet<ValueId> = HashSet::new();
    for (output, trace) in traces {
        let port = trace.filter(|trace| {
            let computed = |id: &ValueId| cached[trace.layer].contains(id);
            let without_past = trace.carried || copies(body, &index, output).iter().any(computed);
            trace.past.is_some() || (!has_past && without_past)
        });
        let Some(trace) = port else {
            map.taps.extend(taps::tap(body, &index, chain, &map.layers, &layer_of, output));
            continue;
        };
        if let Some(past) = trace.past
            && !taken.insert(past)
        {
            return Err(Error::invalid(
                format!("cache input `{}`", graph.name(past)),
                format!("leads to `{}` and to another output, so the matching output is ambiguous", graph.name(output)),
            )
            .remedy("export the graph without the output that is not the cache"));
        }
        let layer = &mut map.layers[trace.layer];
        let role = match trace.role {
            Some(role) => role,
            None => PortRole::State(layer.ports.iter().filter(|port| matches!(port.role, PortRole::State(_))).count()),
        };
        layer.ports.push(KvPort { role, past: trace.past, present: Some(output) });
    }
    for layer in &mut map.layers {
        settle_roles(body, &index, &mut layer.ports, &layer.path);
        let ports = &layer.ports;
        layer.shared_values.retain(|id| !ports.iter().any(|port| port.past == Some(*id)));
    }
    Ok(())
}

/// The value and the values of which it is a copy in another type or layout.
fn copies(body: &Body, index: &GraphIndex, value: ValueId) -> Vec<ValueId> {
    let mut found = vec![value];
    let mut value = value;
    while let Some((node, _)) = index.node_of(value) {
        let node = &body.nodes[node];
        match node.inputs.first().copied().flatten() {
            Some(inner) if changes_only_layout(node) => value = inner,
            _ => break,
        }
        found.push(value);
    }
    found
}

/// Inputs whose content more than one layer reads.
fn shared_inputs(body: &Body, layer_of: &HashMap<usize, usize>) -> HashSet<ValueId> {
    let mut readers: HashMap<ValueId, HashSet<usize>> = HashMap::new();
    for (&node, &layer) in layer_of {
        for input in data_inputs(body, node) {
            readers.entry(input).or_default().insert(layer);
        }
    }
    readers.into_iter().filter(|(_, layers)| layers.len() > 1).map(|(id, _)| id).collect()
}

struct Trace {
    layer: usize,
    past: Option<ValueId>,
    role: Option<PortRole>,
    /// True when an operator with a state (attention with a cache, recurrence, loop) produces the output.
    carried: bool,
}

struct Tracer<'a> {
    graph: &'a Graph,
    body: &'a Body,
    index: &'a GraphIndex,
    chain: &'a Chain,
    layer_of: &'a HashMap<usize, usize>,
    owners: &'a [Owner],
    shared: &'a HashSet<ValueId>,
}

impl Tracer<'_> {
    /// Searches backwards from an output for the layer that produces it and for the cache input that it continues.
    /// `None` for an output computed between layers.
    ///
    /// Errors: `Error::Unsupported` for an unknown operator of another domain whose second or later output is a cache.
    fn trace_back(&self, output: ValueId) -> Result<Option<Trace>> {
        let mut layer = None;
        let mut trace = Trace { layer: 0, past: None, role: None, carried: false };
        let mut open = vec![output];
        let mut seen = HashSet::new();
        while let Some(value) = open.pop() {
            // The stream is not a cache, so the search does not continue before it.
            if self.chain.is_stream(value) {
                continue;
            }
            let Some((number, position)) = self.index.node_of(value) else {
                let is_input = self.body.inputs.contains(&value) && !self.index.is_initializer(value);
                if is_input && !self.shared.contains(&value) && trace.past.is_none() {
                    trace.past = Some(value);
                }
                continue;
            };
            let node = &self.body.nodes[number];
            if node.reads_shape_only() || !seen.insert(number) {
                continue;
            }
            let owner = self.layer_of.get(&number).copied();
            if let (Some(found), Some(known)) = (owner, layer)
                && found != known
            {
                continue;
            }
            // Values that other layers use too (rotary tables, masks) are not this layer's cache.
            if layer.is_some() && owner.is_none() && self.owners[number].only() != layer && !changes_only_layout(node) {
                continue;
            }
            layer = layer.or(owner);
            if let Some(row) = fused(node) {
                let matching = [(PortRole::Key, Some(row.key)), (PortRole::Value, row.value)];
                for (kind, pair) in matching {
                    if let Some((input, made)) = pair
                        && made == position
                    {
                        trace.role = Some(kind);
                        trace.carried = true;
                        let past = node.inputs.get(input).copied().flatten();
                        trace.past = past.map(|id| origin(self.body, self.index, id));
                    }
                }
                break;
            }
            if let Some(input) = carried(node, position) {
                trace.carried |= position > 0 || node.bodies().next().is_some();
                open.extend(node.inputs.get(input).copied().flatten());
                continue;
            }
            self.refuse_unknown(number, position, output)?;
            // A product mixes tensors and a quantisation scale depends on a whole tensor: their inputs are the source
            // of new entries, not the cache.
            if product(node).is_some() || node.op_type == "DynamicQuantizeLinear" || node.op_type == "Softmax" {
                continue;
            }
            open.extend(node.present_inputs());
        }
        Ok(layer.map(|layer| Trace { layer, ..trace }))
    }

    /// Rejects an unknown fused operator with a second output that reads an input which nothing
    /// else reads: it keeps a cache.
    fn refuse_unknown(&self, number: usize, position: usize, output: ValueId) -> Result<()> {
        let node = &self.body.nodes[number];
        let own_input = |id: ValueId| {
            let id = origin(self.body, self.index, id);
            self.body.inputs.contains(&id) && !self.index.is_initializer(id) && !self.shared.contains(&id)
        };
        if node.domain.is_empty() || position == 0 || !node.present_inputs().any(own_input) {
            return Ok(());
        }
        Err(Error::unsupported(
            node.describe(self.graph),
            format!(
                "it outputs the cache `{}`, and the input that this cache continues is unknown",
                self.graph.name(output)
            ),
        )
        .remedy("export the graph with an attention operator whose cache is known, or with attention not fused"))
    }
}

/// The graph input from which casts and copies lead to the value.
fn origin(body: &Body, index: &GraphIndex, value: ValueId) -> ValueId {
    let mut value = value;
    while let Some((node, _)) = index.node_of(value) {
        let node = &body.nodes[node];
        match node.inputs.first().copied().flatten() {
            Some(inner) if changes_only_layout(node) => value = inner,
            _ => return value,
        }
    }
    value
}

/// The value before casts.
fn uncast(body: &Body, index: &GraphIndex, value: ValueId) -> ValueId {
    let mut value = value;
    while let Some((node, _)) = index.node_of(value) {
        let node = &body.nodes[node];
        match node.inputs.first().copied().flatten() {
            Some(inner) if node.op_type == "Cast" => value = inner,
            _ => break,
        }
    }
    value
}

/// Distinguishes keys from values when the cache is concatenated outside the attention: the port that leads to the
/// scores holds keys.
fn settle_roles(body: &Body, index: &GraphIndex, ports: &mut [KvPort], path: &[usize]) {
    let undecided: Vec<usize> =
        (0..ports.len()).filter(|&number| matches!(ports[number].role, PortRole::State(_))).collect();
    let mut open = Vec::new();
    for &number in path {
        let node = &body.nodes[number];
        if node.op_type == "Softmax" {
            open.extend(node.present_inputs());
        } else if is_attention(node) {
            open.extend(node.inputs.get(1).copied().flatten());
        }
    }
    if undecided.len() != 2 || open.is_empty() {
        return;
    }
    let mut before = HashSet::new();
    while let Some(value) = open.pop() {
        if before.insert(value)
            && let Some((node, _)) = index.node_of(value)
            && path.binary_search(&node).is_ok()
        {
            open.extend(data_inputs(body, node));
        }
    }
    // A cast behind a cache input or before a cache output is on no layer's path.
    let inputs: HashSet<ValueId> = before.iter().map(|id| origin(body, index, *id)).collect();
    let is_key = |port: &KvPort| {
        port.past.is_some_and(|id| inputs.contains(&id))
            || port.present.is_some_and(|id| before.contains(&id) || before.contains(&uncast(body, index, id)))
    };
    let keys: Vec<bool> = undecided.iter().map(|&number| is_key(&ports[number])).collect();
    if keys.iter().filter(|&&key| key).count() == 1 {
        for (&number, key) in undecided.iter().zip(keys) {
            ports[number].role = if key { PortRole::Key } else { PortRole::Value };
        }
        ports.sort_by_key(|port| port.role);
    }
}
