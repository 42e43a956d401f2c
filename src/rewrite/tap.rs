//! Adds the cosine similarities of the stream before and after packs of layers as small outputs of the graph.

use crate::analysis::Analysis;
use crate::base::{Error, Result};
use crate::ir::{AttributeKind, DataType, Dim, Model, Tensor, ValueId, ValueType};

use super::build::Builder;
use super::tidy;

/// Prefix of the output names; the pack size follows: `interlace.sim_1`.
pub const SIMILARITY_PREFIX: &str = "interlace.sim_";

/// A model whose only outputs are the cosine similarities of the stream before layer `i` with the stream before layer
/// `i + k`, for each pack size `k`: `interlace.sim_k` of shape `[n, T, B]` in float32, one row for each `i`.
///
/// The stream before layer `i` is the output of layer `i - 1`, and before layer 0 the input of layer 0. Features added
/// between layers (DeepStack) are not in it yet, as in the hidden states that Hugging Face records.
///
/// `n` is `L - k`, since the last layer is in no pack; with `include_last` the stream after the last layer counts too
/// and `n` is `L - k + 1`. Source: INTERLACE, arXiv 2511.19676, section 3; cos(a, b) = a.b / max(|a||b|, 1e-8).
///
/// Errors: `Error::Invalid` when a pack is zero or exceeds the number of layers.
pub fn tap_similarities(analysis: &Analysis, packs: &[usize], include_last: bool) -> Result<Model> {
    let mut model = analysis.model.clone();
    let layers = &analysis.map.layers;
    let behind = if include_last { layers.len() } else { layers.len().saturating_sub(1) };
    let mut streams: Vec<ValueId> = layers.first().map(|layer| layer.input).into_iter().collect();
    streams.extend(layers.iter().take(behind).map(|layer| layer.output));
    let build = Builder::new(&mut model, "tap");
    let mut taps = Taps { axes_as_input: build.opset() >= 13, build, axes: None };
    let mut floats = Vec::with_capacity(streams.len());
    let mut norms = Vec::with_capacity(streams.len());
    for &stream in &streams {
        let float = taps.build.node("Cast", &[stream], &[("to", AttributeKind::Int(DataType::Float as i64))]);
        let square = taps.dot(float, float);
        norms.push(taps.build.node("Sqrt", &[square], &[]));
        floats.push(float);
    }
    let epsilon = taps.build.constant("epsilon", Tensor::from_f32(&[], &[1e-8]));
    let mut outputs = Vec::new();
    for &pack in packs {
        let count = streams.len().checked_sub(pack).filter(|&count| count > 0 && pack > 0).ok_or_else(|| {
            Error::invalid(format!("pack of {pack} layers"), format!("does not fit into {} layers", layers.len()))
                .remedy("give `--packs` sizes below the number of layers")
        })?;
        // One division for all rows: in a small model the time of these nodes is their number.
        let products: Vec<ValueId> =
            floats.iter().zip(&floats[pack..]).map(|(&before, &after)| taps.dot(before, after)).collect();
        let products = taps.joined(&products);
        let (before, after) = (taps.joined(&norms[..count]), taps.joined(&norms[pack..]));
        let length = taps.build.node("Mul", &[before, after], &[]);
        let length = taps.build.node("Max", &[length, epsilon], &[]);
        let similarity = taps.build.node("Div", &[products, length], &[]);
        // All axes in reverse: one row for each pack, of whatever rank the stream is.
        let joined = taps.build.node("Transpose", &[similarity], &[]);
        let value = &mut taps.build.model.graph.values[joined.index()];
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

struct Taps<'a> {
    build: Builder<'a>,
    axes_as_input: bool,
    axes: Option<ValueId>,
}

impl Taps<'_> {
    /// Sum of products over the last axis: `[B, T, D]`, `[B, T, D]` -> `[B, T, 1]`.
    fn dot(&mut self, left: ValueId, right: ValueId) -> ValueId {
        let product = self.build.node("Mul", &[left, right], &[]);
        if !self.axes_as_input {
            return self.build.node("ReduceSum", &[product], &[("axes", AttributeKind::Ints(vec![-1]))]);
        }
        let axes = match self.axes {
            Some(id) => id,
            None => self.build.constant("last_axis", Tensor::from_i64(&[1], &[-1])),
        };
        self.axes = Some(axes);
        self.build.node("ReduceSum", &[product, axes], &[])
    }

    /// `n` values `[B, T, 1]` -> `[B, T, n]`.
    fn joined(&mut self, values: &[ValueId]) -> ValueId {
        self.build.node("Concat", values, &[("axis", AttributeKind::Int(-1))])
    }
}
