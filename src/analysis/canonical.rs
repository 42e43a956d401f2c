//! Splits fused skip-norms: the sum becomes a value and the norm a node.
//!
//! `SkipLayerNormalization` and `SkipSimplifiedLayerNormalization` (com.microsoft) add two tensors and normalise the
//! sum, so that a layer's last addition is inside the next layer's first node. After the split each layer boundary is
//! one value. Metadata on the nodes records the fusion, so that a rewrite can restore it.

use std::collections::HashSet;

use crate::ir::{Attribute, AttributeKind, DataType, Model, Node, Value, ValueId};

/// The metadata key on the addition and the norm that came from one fused node.
pub const FUSED_MARK: &str = "interlace.skip_norm";

/// The metadata key on the norm that holds the names of the fused node's outputs from the second on, one per line,
/// empty for an omitted output. A model-local function with the operator's name may require all of them.
pub const FUSED_OUTPUTS: &str = "interlace.skip_norm.outputs";

const MICROSOFT: &str = "com.microsoft";

/// One fusion: the operator, the plain norm in it, and the input of its optional bias.
pub struct FusedNorm {
    /// Operator of the domain `com.microsoft`.
    pub fused: &'static str,
    /// Operator of the default domain that normalises the sum.
    pub plain: &'static str,
    /// The plain norm's name in the default domain from this opset on.
    pub standard: Option<(i64, &'static str)>,
    /// Inputs of the fused node that the norm takes, after the two that are added.
    pub norm_inputs: &'static [usize],
    /// The input that is added to the sum.
    pub bias_input: usize,
}

impl FusedNorm {
    /// The row of a fused operator by name.
    pub fn by_name(name: &str) -> Option<&'static FusedNorm> {
        FUSED_NORMS.iter().find(|row| row.fused == name)
    }

    /// The plain norm's name under an opset.
    pub fn plain_for(&self, opset: i64) -> &'static str {
        match self.standard {
            Some((since, name)) if opset >= since => name,
            _ => self.plain,
        }
    }
}

const FUSED_NORMS: &[FusedNorm] = &[
    FusedNorm {
        fused: "SkipSimplifiedLayerNormalization",
        plain: "SimplifiedLayerNormalization",
        standard: Some((23, "RMSNormalization")),
        norm_inputs: &[2],
        bias_input: 3,
    },
    FusedNorm {
        fused: "SkipLayerNormalization",
        plain: "LayerNormalization",
        standard: None,
        norm_inputs: &[2, 3],
        bias_input: 4,
    },
];

/// Splits every skip-norm of the top-level body whose mean and variance outputs are unread. Returns their number.
pub fn unfuse_skip_norms(model: &mut Model) -> usize {
    let opset = model.opset_imports.get("").copied().unwrap_or(1);
    let graph = &mut model.graph;
    let mut read: HashSet<ValueId> = graph.body.outputs.iter().copied().collect();
    for node in &graph.body.nodes {
        read.extend(node.present_inputs());
        for body in node.bodies() {
            read.extend(body.nodes.iter().flat_map(|inner| inner.present_inputs()));
        }
    }
    let nodes = std::mem::take(&mut graph.body.nodes);
    let mut out = Vec::with_capacity(nodes.len());
    let mut count = 0;
    for node in nodes {
        let row = FusedNorm::by_name(&node.op_type).filter(|_| node.domain == MICROSOFT);
        let output = |position: usize| node.outputs.get(position).copied().flatten();
        let statistics_read = [1, 2].into_iter().filter_map(output).any(|id| read.contains(&id));
        let (Some(row), Some(Some(left)), Some(Some(right)), Some(normed), false) =
            (row, node.inputs.first(), node.inputs.get(1), output(0), statistics_read)
        else {
            out.push(node);
            continue;
        };
        count += 1;
        let ty = graph.value(normed).ty.clone().or_else(|| graph.value(*left).ty.clone());
        let names: Vec<&str> =
            (1..node.outputs.len()).map(|position| output(position).map_or("", |id| graph.name(id))).collect();
        let outputs = (FUSED_OUTPUTS.to_string(), names.join("\n"));
        let mark = vec![(FUSED_MARK.to_string(), format!("{MICROSOFT}.{}", row.fused))];
        let mut value = |stem: &str| {
            let name = graph.fresh_name(stem);
            graph.add_value(Value { name, ty: ty.clone(), ..Value::default() })
        };
        let stem = if node.name.is_empty() { "skip_norm".to_string() } else { node.name.clone() };
        let bias = node.inputs.get(row.bias_input).copied().flatten();
        let sum = match output(3) {
            Some(id) => id,
            None => value(&format!("{stem}/sum")),
        };
        let add = |name: String, inputs: [ValueId; 2], output: ValueId, metadata| Node {
            name,
            op_type: "Add".into(),
            inputs: inputs.map(Some).to_vec(),
            outputs: vec![Some(output)],
            metadata,
            ..Node::default()
        };
        match bias {
            Some(bias) => {
                let partial = value(&format!("{stem}/partial_sum"));
                out.push(add(format!("{stem}/add"), [*left, *right], partial, Vec::new()));
                out.push(add(format!("{stem}/add_bias"), [partial, bias], sum, mark.clone()));
            }
            None => out.push(add(format!("{stem}/add"), [*left, *right], sum, mark.clone())),
        }
        let epsilon = node.attribute("epsilon").and_then(Attribute::as_float).unwrap_or(1e-12);
        let int = |value: i64| Attribute::from(AttributeKind::Int(value));
        let mut inputs = vec![Some(sum)];
        inputs.extend(row.norm_inputs.iter().filter_map(|&position| node.inputs.get(position).copied()));
        out.push(Node {
            name: node.name.clone(),
            op_type: row.plain_for(opset).into(),
            inputs,
            outputs: vec![Some(normed)],
            attributes: vec![
                ("axis".into(), int(-1)),
                ("epsilon".into(), Attribute::from(AttributeKind::Float(epsilon))),
                ("stash_type".into(), int(DataType::Float as i64)),
            ],
            doc_string: node.doc_string.clone(),
            metadata: node.metadata.iter().cloned().chain(mark).chain([outputs]).collect(),
            ..Node::default()
        });
    }
    graph.body.nodes = out;
    count
}
