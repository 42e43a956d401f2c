//! The next token of the loop: the likeliest, or one drawn by temperature and seed, with standard operators alone.
//!
//! ONNX's own random operators take their seed as an attribute. The number drawn here is a function of the request's seed
//! and the iteration: two rounds of an affine map and a fifth power modulo the prime `2^31 - 1`. Both are one-to-one there
//! (5 does not divide `2^31 - 2`), so that over all seeds every number is equally frequent.

use crate::ir::{AttributeKind, Body, DataType, Tensor, ValueId};
use crate::rewrite::{JoinScope, Joined};

use super::super::nodes::{cast, graph_input, ints, scalar};

/// Softmax temperature, a scalar input that is 0 where it is not given: the likeliest token.
pub const TEMPERATURE: &str = "temperature";
/// Seed of the drawn tokens, a scalar input that is 0 where it is not given.
pub const SEED: &str = "seed";

/// The prime `2^31 - 1`; products of two smaller numbers fit into 63 bits.
const MODULUS: i64 = (1 << 31) - 1;
/// Factor and summand of each round's affine map. The factors are the multipliers of Park and Miller (Communications of
/// the ACM 31, 1988, and 36, 1993); the summands only keep 0 from mapping to itself.
const ROUNDS: [(i64, i64); 2] = [(48271, 1_013_904_223), (16807, 1_664_525)];

/// Inputs of a request that decide how tokens are drawn.
#[derive(Clone, Copy)]
pub struct Sampling {
    temperature: ValueId,
    seed: ValueId,
}

impl Sampling {
    /// Adds both inputs with their defaults.
    pub fn inputs(joined: &mut Joined) -> Self {
        let temperature = graph_input(joined, TEMPERATURE, DataType::Float, &[]);
        let seed = graph_input(joined, SEED, DataType::Int64, &[]);
        let defaults = [(temperature, Tensor::from_f32(&[], &[0.0])), (seed, Tensor::from_i64(&[], &[0]))];
        joined.model.graph.body.initializers.extend(defaults);
        Sampling { temperature, seed }
    }

    /// The token of `iteration` from logits f32 `[1, 1, V]`: i64 `[1, 1]`.
    pub fn token(self, body: &mut JoinScope<'_>, logits: ValueId, iteration: ValueId) -> ValueId {
        let zero = body.joined.constant("cold", Tensor::from_f32(&[], &[0.0]));
        let warm = body.op("warm", "Greater", &[self.temperature, zero], &[]);
        let drawn = self.drawn(body, logits, iteration);
        let likeliest = likeliest(body, logits);
        let token = body.joined.value("token");
        body.control("If", &[warm], &[token], vec![("then_branch", drawn), ("else_branch", likeliest)]);
        token
    }

    /// The first token whose cumulated probability exceeds a number drawn from `[0, 1)`.
    fn drawn(self, outer: &mut JoinScope<'_>, logits: ValueId, iteration: ValueId) -> Body {
        let mut scope = JoinScope::new(&mut *outer.joined);
        let body = &mut scope;
        let temperature = cast(body, self.temperature, DataType::Float, DataType::Double);
        let logits = cast(body, logits, DataType::Float, DataType::Double);
        let scaled = body.op("scaled", "Div", &[logits, temperature], &[]);
        let shares = body.op("shares", "Softmax", &[scaled], &[("axis", AttributeKind::Int(-1))]);
        let axis = scalar(body, "vocabulary_axis", 2);
        let cumulated = body.op("cumulated", "CumSum", &[shares, axis], &[]);
        let number = self.uniform(body, iteration);
        // Rounding leaves the last sum a little off 1.
        let last = ints(body, "last", &[-1]);
        let total = body.op("total", "Gather", &[cumulated, last], &[("axis", AttributeKind::Int(2))]);
        let bound = body.op("bound", "Mul", &[number, total], &[]);
        let passed = body.op("passed", "LessOrEqual", &[cumulated, bound], &[]);
        let passed = cast(body, passed, DataType::Bool, DataType::Int64);
        let axes = ints(body, "vocabulary_axes", &[2]);
        let token = body.op("drawn", "ReduceSum", &[passed, axes], &[("keepdims", AttributeKind::Int(0))]);
        Body { name: "drawn".into(), nodes: scope.nodes, outputs: vec![token], ..Body::default() }
    }

    /// A number in `(0, 1)`, f64 `[]`.
    fn uniform(self, body: &mut JoinScope<'_>, iteration: ValueId) -> ValueId {
        let modulus = scalar(body, "modulus", MODULUS);
        let mut number = body.op("seed_residue", "Mod", &[self.seed, modulus], &[]);
        for (round, (factor, summand)) in ROUNDS.into_iter().enumerate() {
            let (factor, summand) = (scalar(body, "factor", factor), scalar(body, "summand", summand));
            number = body.op("multiple", "Mul", &[number, factor], &[]);
            number = body.op("moved", "Add", &[number, summand], &[]);
            if round == 0 {
                number = body.op("numbered", "Add", &[number, iteration], &[]);
            }
            number = body.op("residue", "Mod", &[number, modulus], &[]);
            let mut power = number;
            for _ in 0..2 {
                power = body.op("square", "Mul", &[power, power], &[]);
                power = body.op("square_residue", "Mod", &[power, modulus], &[]);
            }
            number = body.op("fifth_power", "Mul", &[power, number], &[]);
            number = body.op("power_residue", "Mod", &[number, modulus], &[]);
        }
        let number = cast(body, number, DataType::Int64, DataType::Double);
        let half = body.joined.constant("half", f64_scalar(0.5));
        let centre = body.op("centre", "Add", &[number, half], &[]);
        let whole = body.joined.constant("whole", f64_scalar(MODULUS as f64));
        body.op("uniform", "Div", &[centre, whole], &[])
    }
}

/// The token with the largest logit.
fn likeliest(outer: &mut JoinScope<'_>, logits: ValueId) -> Body {
    let mut scope = JoinScope::new(&mut *outer.joined);
    let along = [("axis", AttributeKind::Int(-1)), ("keepdims", AttributeKind::Int(0))];
    let token = scope.op("likeliest", "ArgMax", &[logits], &along);
    Body { name: "likeliest".into(), nodes: scope.nodes, outputs: vec![token], ..Body::default() }
}

fn f64_scalar(value: f64) -> Tensor {
    Tensor::from_bytes(DataType::Double, &[], value.to_le_bytes().to_vec())
}
