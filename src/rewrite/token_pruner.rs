//! The token pruner: a graph that chooses which image tokens of a prompt a decoder reads (DART).
//!
//! Of the `n` tokens of each picture `ceil(keep * n)` stay. The first ones are pivots: those with the largest L1 norm. Then
//! each pivot in turn, image tokens first and text tokens behind them, keeps the tokens that are least similar to it by cosine
//! similarity, an equal share of what is left. Text tokens all stay. Of equal numbers the earlier token counts as larger norm
//! and as less similar.
//!
//! Source: DART (Duplication-Aware Reduction of Tokens), arXiv 2502.11494, on input embeddings.

use crate::base::Result;
use crate::ir::{AttributeKind, Body, DataType, Dim, Model, Tensor, ValueId, ValueType};

use super::join::{JoinScope, Joined};

/// `[1, T, D]`: embeddings of a prompt with the features of its pictures.
pub const PRUNER_EMBEDS: &str = "inputs_embeds";
/// bool `[1, T]`: true at image tokens.
pub const PRUNER_IMAGE_MASK: &str = "image_mask";
/// bool `[1, T]`: true at text tokens that may be pivots, those of the question.
pub const PRUNER_PIVOT_MASK: &str = "pivot_mask";
/// int64 `[P]`: image tokens of each picture, in the order of the prompt.
pub const PRUNER_PICTURE_TOKENS: &str = "picture_tokens";
/// int64 `[K]`: positions of the tokens that stay, ascending, text tokens among them.
pub const PRUNER_KEPT_TOKENS: &str = "kept_tokens";

/// Pivots among a picture's tokens, and as many among text tokens.
const PIVOTS: i64 = 4;
/// Denominator of the part of the tokens that stays.
const UNIT: i64 = 1_000_000;
/// Least length of a vector in a cosine similarity.
const EPSILON: f32 = 1e-8;
/// More than the difference of two cosine similarities.
const TAKEN: f32 = 4.0;

/// The graph that keeps this part of each picture's tokens, `keep` above 0 and at most 1, to a millionth. `dtype` is the type of
/// the embeddings.
///
/// Errors: as `ir::check`.
pub fn token_pruner(keep: f64, dtype: DataType) -> Result<Model> {
    let mut joined = Joined::default();
    joined.model.ir_version = 8;
    joined.model.opset_imports.insert(String::new(), 13);
    joined.model.producer_name = "interlace".into();
    joined.model.graph.body.name = "token_pruner".into();
    let sequence = || Dim::Symbol("sequence".into());
    let mut input = |name: &str, dtype: DataType, shape: Vec<Dim>| {
        let id = joined.value(name);
        joined.model.graph.values[id.index()].ty = Some(ValueType::Tensor { dtype, shape: Some(shape) });
        joined.model.graph.body.inputs.push(id);
        id
    };
    let one = || Dim::Known(1);
    let embeds = input(PRUNER_EMBEDS, dtype, vec![one(), sequence(), Dim::Symbol("hidden".into())]);
    let image_mask = input(PRUNER_IMAGE_MASK, DataType::Bool, vec![one(), sequence()]);
    let pivot_mask = input(PRUNER_PIVOT_MASK, DataType::Bool, vec![one(), sequence()]);
    let pictures = input(PRUNER_PICTURE_TOKENS, DataType::Int64, vec![Dim::Symbol("pictures".into())]);
    let mut main = Nodes::new(JoinScope::new(&mut joined));
    let tokens = Tokens::of(&mut main, embeds, pivot_mask);
    let places = main.places(image_mask);
    let flags = over_pictures(&mut main, &tokens, places, pictures, (keep * UNIT as f64).round().max(1.0) as i64);
    let shape = main.op("Shape", &[tokens.norms], &[]);
    let all = main.filled(shape, 1.0);
    let stays = main.op("ScatterElements", &[all, places, flags], &[]);
    let kept = main.op("NonZero", &[stays], &[]);
    let flat = main.ints(&[-1]);
    let kept = main.op("Reshape", &[kept, flat], &[]);
    let nodes = main.scope.nodes;
    let graph = &mut joined.model.graph;
    let shape = Some(vec![Dim::Symbol("kept".into())]);
    graph.values[kept.index()].name = PRUNER_KEPT_TOKENS.into();
    graph.values[kept.index()].ty = Some(ValueType::Tensor { dtype: DataType::Int64, shape });
    graph.body.nodes = nodes;
    graph.body.outputs.push(kept);
    crate::ir::check(&joined.model)?;
    Ok(joined.model)
}

/// All tokens of a prompt, and the text tokens that are pivots.
struct Tokens {
    /// `[T, D]` embeddings of length 1.
    units: ValueId,
    /// `[T]` L1 norms.
    norms: ValueId,
    /// `[Q, D]`.
    text_pivots: ValueId,
    /// `[1]`: Q.
    text_count: ValueId,
}

impl Tokens {
    fn of(main: &mut Nodes<'_>, embeds: ValueId, pivot_mask: ValueId) -> Self {
        let rows = main.op("Cast", &[embeds], &[("to", AttributeKind::Int(DataType::Float as i64))]);
        let (batch, width) = (main.ints(&[0]), main.ints(&[1]));
        let rows = main.op("Squeeze", &[rows, batch], &[]);
        let sizes = main.op("Abs", &[rows], &[]);
        let norms = main.op("ReduceSum", &[sizes, width], &[("keepdims", AttributeKind::Int(0))]);
        let squares = main.op("Mul", &[rows, rows], &[]);
        let squares = main.op("ReduceSum", &[squares, width], &[]);
        let lengths = main.op("Sqrt", &[squares], &[]);
        let epsilon = main.constant(Tensor::from_f32(&[], &[EPSILON]));
        let lengths = main.op("Max", &[lengths, epsilon], &[]);
        let units = main.op("Div", &[rows, lengths], &[]);
        let text = main.places(pivot_mask);
        let (most, count) = (main.ints(&[PIVOTS]), main.op("Shape", &[text], &[]));
        let text_count = main.op("Min", &[most, count], &[]);
        let text_norms = main.op("Gather", &[norms, text], &[]);
        let largest = main.largest(text_norms, text_count);
        let largest = main.op("Gather", &[text, largest], &[]);
        let text_pivots = main.op("Gather", &[units, largest], &[]);
        Tokens { units, norms, text_pivots, text_count }
    }
}

/// For every image token 1 if it stays, else 0: `[N]` in order.
fn over_pictures(main: &mut Nodes<'_>, tokens: &Tokens, places: ValueId, pictures: ValueId, keep: i64) -> ValueId {
    let units = main.op("Gather", &[tokens.units, places], &[]);
    let norms = main.op("Gather", &[tokens.norms, places], &[]);
    let (zero, unit, rest, keep) = (main.ints(&[0]), main.ints(&[UNIT]), main.ints(&[UNIT - 1]), main.ints(&[keep]));
    let (none, begun) = (main.constant(Tensor::from_f32(&[0], &[])), main.begun());
    let count = main.op("Size", &[pictures], &[]);
    let (number, condition) = (main.body_input(DataType::Int64, 0), main.body_input(DataType::Bool, 0));
    let (start, flags) = (main.body_input(DataType::Int64, 1), main.body_input(DataType::Float, 1));
    let mut body = Nodes::new(JoinScope::new(&mut *main.scope.joined));
    let cell = body.ints(&[1]);
    let number_cell = body.op("Reshape", &[number, cell], &[]);
    let size = body.op("Gather", &[pictures, number_cell], &[]);
    let end = body.op("Add", &[start, size], &[]);
    let units = body.op("Slice", &[units, start, end, zero], &[]);
    let norms = body.op("Slice", &[norms, start, end, zero], &[]);
    let quota = body.op("Mul", &[size, keep], &[]);
    let quota = body.op("Add", &[quota, rest], &[]);
    let quota = body.op("Div", &[quota, unit], &[]);
    let taken = of_one_picture(&mut body, tokens, (units, norms), (size, quota));
    let longer = body.op("Concat", &[flags, taken], &[("axis", AttributeKind::Int(0))]);
    let go_on = body.op("Identity", &[condition], &[]);
    let nodes = body.scope.nodes;
    let inputs = vec![number, condition, start, flags];
    let body = Body { name: "picture".into(), inputs, outputs: vec![go_on, end, longer], nodes, ..Body::default() };
    let (after, flags) = (main.scope.joined.value("after"), main.scope.joined.value("stays"));
    main.scope.control("Loop", &[count, begun, zero, none], &[after, flags], vec![("body", body)]);
    flags
}

/// For every token of a picture 1 if it stays, else 0: `[n]`.
fn of_one_picture(
    scope: &mut Nodes<'_>,
    tokens: &Tokens,
    (units, norms): (ValueId, ValueId),
    (size, quota): (ValueId, ValueId),
) -> ValueId {
    let most = scope.ints(&[PIVOTS]);
    let own = scope.op("Min", &[most, quota], &[]);
    let pivots = scope.largest(norms, own);
    let (zeros, ones) = (scope.filled(size, 0.0), scope.filled(own, 1.0));
    let taken = scope.op("ScatterElements", &[zeros, pivots, ones], &[]);
    let pivots = scope.op("Gather", &[units, pivots], &[]);
    let pivots = scope.op("Concat", &[pivots, tokens.text_pivots], &[("axis", AttributeKind::Int(0))]);
    let columns = scope.op("Transpose", &[units], &[("perm", AttributeKind::Ints(vec![1, 0]))]);
    let similar = scope.op("MatMul", &[pivots, columns], &[]);
    let similar = scope.op("Neg", &[similar], &[]);
    let left = scope.op("Sub", &[quota, own], &[]);
    let turns = scope.op("Add", &[own, tokens.text_count], &[]);
    // With fewer tokens left than pivots, the last pivots choose none.
    let turns = scope.op("Min", &[turns, left], &[]);

    let (turn, condition) = (scope.body_input(DataType::Int64, 0), scope.body_input(DataType::Bool, 0));
    let (left_here, taken_here) = (scope.body_input(DataType::Int64, 1), scope.body_input(DataType::Float, 1));
    let mut body = Nodes::new(JoinScope::new(&mut *scope.scope.joined));
    let one = body.ints(&[1]);
    let turns_left = body.op("Sub", &[turns, turn], &[]);
    let share = body.op("Add", &[left_here, turns_left], &[]);
    let share = body.op("Sub", &[share, one], &[]);
    let share = body.op("Div", &[share, turns_left], &[]);
    let weight = body.constant(Tensor::from_f32(&[], &[TAKEN]));
    let own = body.op("Gather", &[similar, turn], &[]);
    let out = body.op("Mul", &[taken_here, weight], &[]);
    let own = body.op("Sub", &[own, out], &[]);
    let chosen = body.largest(own, share);
    let ones = body.filled(share, 1.0);
    let taken_now = body.op("ScatterElements", &[taken_here, chosen, ones], &[]);
    let left_now = body.op("Sub", &[left_here, share], &[]);
    let go_on = body.op("Identity", &[condition], &[]);
    let nodes = body.scope.nodes;
    let inputs = vec![turn, condition, left_here, taken_here];
    let outputs = vec![go_on, left_now, taken_now];
    let body = Body { name: "pivot".into(), inputs, outputs, nodes, ..Body::default() };
    let (begun, scalar) = (scope.begun(), scope.ints(&[]));
    let count = scope.op("Reshape", &[turns, scalar], &[]);
    let (after, stays) = (scope.scope.joined.value("after"), scope.scope.joined.value("stays"));
    scope.scope.control("Loop", &[count, begun, left, taken], &[after, stays], vec![("body", body)]);
    stays
}

/// Nodes of one scope, with shorthands.
struct Nodes<'a> {
    scope: JoinScope<'a>,
}

impl<'a> Nodes<'a> {
    fn new(scope: JoinScope<'a>) -> Self {
        Nodes { scope }
    }

    fn op(&mut self, op_type: &str, inputs: &[ValueId], attributes: &[(&str, AttributeKind)]) -> ValueId {
        self.scope.op(&op_type.to_lowercase(), op_type, inputs, attributes)
    }

    fn constant(&mut self, tensor: Tensor) -> ValueId {
        self.scope.joined.constant("constant", tensor)
    }

    fn ints(&mut self, values: &[i64]) -> ValueId {
        self.constant(Tensor::from_i64(&[values.len() as u64], values))
    }

    /// The condition with which a loop begins.
    fn begun(&mut self) -> ValueId {
        self.constant(Tensor::from_bytes(DataType::Bool, &[], vec![1u8]))
    }

    /// A value that a loop gives its body.
    fn body_input(&mut self, dtype: DataType, rank: usize) -> ValueId {
        let id = self.scope.joined.value("step");
        let shape = Some(vec![Dim::Unknown; rank]);
        self.scope.joined.model.graph.values[id.index()].ty = Some(ValueType::Tensor { dtype, shape });
        id
    }

    /// Positions at which a mask `[1, T]` is true.
    fn places(&mut self, mask: ValueId) -> ValueId {
        let places = self.op("NonZero", &[mask], &[]);
        let axis = self.constant(Tensor::from_i64(&[], &[1]));
        self.op("Gather", &[places, axis], &[])
    }

    /// Positions of the `count` `[1]` largest numbers.
    fn largest(&mut self, values: ValueId, count: ValueId) -> ValueId {
        let (numbers, places) = (self.scope.joined.value("numbers"), self.scope.joined.value("largest"));
        self.scope.control("TopK", &[values, count], &[numbers, places], Vec::new());
        places
    }

    /// A tensor of this shape with one number everywhere.
    fn filled(&mut self, shape: ValueId, value: f32) -> ValueId {
        let value = ("value", AttributeKind::Tensor(Tensor::from_f32(&[1], &[value])));
        self.op("ConstantOfShape", &[shape], &[value])
    }
}
