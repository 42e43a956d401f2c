//! Similarities of the residual stream with itself some layers on, as small outputs of the graph itself.

use crate::analysis::Analysis;
use crate::base::{Error, Result};
use crate::ir::{Attribute, AttributeKind, DataType, Dim, Model, Node, Tensor, Value, ValueId, ValueType};

use super::tidy;

/// Output names are this and the pack size: `interlace.sim_1`.
pub const SIMILARITY_PREFIX: &str = "interlace.sim_";

/// A model whose only outputs are the cosine similarities of the stream before layer `i` with the stream before layer
/// `i + k`, for each pack size `k`: `interlace.sim_k` of shape `[n, B, T]` in float32, one row for each `i`.
///
/// `n` is `L - k`, the last layer being in no pack; with `include_last` the stream behind the last layer counts too
/// and `n` is `L - k + 1`. Source: INTERLACE, arXiv 2511.19676, section 3; cos(a, b) = a.b / max(|a||b|, 1e-8).
///
/// Errors: `Error::Invalid` when a pack is zero or larger than the layers allow.
pub fn tap_similarities(analysis: &Analysis, packs: &[usize], include_last: bool) -> Result<Model> {
    let mut model = analysis.model.clone();
    let layers = &analysis.map.layers;
    let mut streams: Vec<ValueId> = layers.iter().map(|layer| layer.input).collect();
    if include_last {
        streams.extend(layers.last().map(|layer| layer.output));
    }
    let opset = model.opset_imports.get("").copied().unwrap_or(1);
    let mut build = Builder { model: &mut model, axes_as_input: opset >= 13, axes: None, unsqueeze_axes: None };
    let mut floats = Vec::with_capacity(streams.len());
    let mut norms = Vec::with_capacity(streams.len());
    for &stream in &streams {
        let float = build.node("Cast", &[stream], &[("to", AttributeKind::Int(DataType::Float as i64))]);
        let square = build.dot(float, float);
        norms.push(build.node("Sqrt", &[square], &[]));
        floats.push(float);
    }
    let epsilon = build.constant("epsilon", Tensor::from_f32(&[], &[1e-8]));
    let mut outputs = Vec::new();
    for &pack in packs {
        let count = streams.len().checked_sub(pack).filter(|&count| count > 0 && pack > 0).ok_or_else(|| {
            Error::invalid(format!("pack of {pack} layers"), format!("does not fit into {} layers", layers.len()))
        })?;
        let mut rows = Vec::with_capacity(count);
        for first in 0..count {
            let product = build.dot(floats[first], floats[first + pack]);
            let length = build.node("Mul", &[norms[first], norms[first + pack]], &[]);
            let length = build.node("Max", &[length, epsilon], &[]);
            let similarity = build.node("Div", &[product, length], &[]);
            rows.push(build.unsqueeze(similarity));
        }
        let joined = build.node("Concat", &rows, &[("axis", AttributeKind::Int(0))]);
        let value = &mut build.model.graph.values[joined.index()];
        value.name = format!("{SIMILARITY_PREFIX}{pack}");
        let shape = vec![Dim::Known(count as i64), Dim::Unknown, Dim::Unknown];
        value.ty = Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(shape) });
        outputs.push(joined);
    }
    model.graph.body.outputs = outputs;
    tidy::remove_dead_code(&mut model.graph.body);
    tidy::finish(&mut model)?;
    Ok(model)
}

struct Builder<'a> {
    model: &'a mut Model,
    axes_as_input: bool,
    axes: Option<ValueId>,
    unsqueeze_axes: Option<ValueId>,
}

impl Builder<'_> {
    fn value(&mut self) -> ValueId {
        let graph = &mut self.model.graph;
        let name = format!("interlace.tap.{}", graph.values.len());
        graph.add_value(Value { name, ..Value::default() })
    }

    fn node(&mut self, op_type: &str, inputs: &[ValueId], attributes: &[(&str, AttributeKind)]) -> ValueId {
        let output = self.value();
        self.model.graph.body.nodes.push(Node {
            op_type: op_type.into(),
            inputs: inputs.iter().copied().map(Some).collect(),
            outputs: vec![Some(output)],
            attributes: attributes
                .iter()
                .map(|(name, kind)| (name.to_string(), Attribute::from(kind.clone())))
                .collect(),
            ..Node::default()
        });
        output
    }

    fn constant(&mut self, name: &str, tensor: Tensor) -> ValueId {
        let name = format!("interlace.tap.{name}");
        let id = self.model.graph.add_value(Value { name, ..Value::default() });
        self.model.graph.body.initializers.push((id, tensor));
        id
    }

    /// Sum of products over the last axis: `[B, T, D]`, `[B, T, D]` -> `[B, T]`.
    fn dot(&mut self, left: ValueId, right: ValueId) -> ValueId {
        let product = self.node("Mul", &[left, right], &[]);
        let keepdims = ("keepdims", AttributeKind::Int(0));
        if !self.axes_as_input {
            return self.node("ReduceSum", &[product], &[("axes", AttributeKind::Ints(vec![-1])), keepdims]);
        }
        let axes = match self.axes {
            Some(id) => id,
            None => self.constant("last_axis", Tensor::from_i64(&[1], &[-1])),
        };
        self.axes = Some(axes);
        self.node("ReduceSum", &[product, axes], &[keepdims])
    }

    fn unsqueeze(&mut self, value: ValueId) -> ValueId {
        if !self.axes_as_input {
            return self.node("Unsqueeze", &[value], &[("axes", AttributeKind::Ints(vec![0]))]);
        }
        let axes = match self.unsqueeze_axes {
            Some(id) => id,
            None => self.constant("first_axis", Tensor::from_i64(&[1], &[0])),
        };
        self.unsqueeze_axes = Some(axes);
        self.node("Unsqueeze", &[value, axes], &[])
    }
}
