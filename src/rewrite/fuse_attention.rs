//! Replaces an attention of single operators by one node, which an engine can run as one kernel.
//!
//! The pattern is `MatMul(q, k')`, scaled before or after by constants, plus a mask, `Softmax` with or without a guard
//! against rows of NaN, and `MatMul` with `v`. Keys and values may be repeated for groups of heads by `Unsqueeze`,
//! `Expand` and `Reshape`. With any other node in between, or a second reader of a step, the nodes stay unchanged.

use crate::ir::{Attribute, AttributeKind, Graph, GraphIndex, Model, Node, ValueId};

use super::internal::{INTERNAL_DOMAIN, standard};

/// The node that replaces one attention.
///
/// Inputs: q `[B, H, S, D]`; k `[B, G, T, D]`, or `[B, G, D, T]` when attribute `transposed` is 1; v `[B, G, T, E]`;
/// the mask, which is added to the scores; then, for grouped heads, the shapes to which k was expanded and reshaped,
/// and those of v. Attribute `scale` multiplies the scores before the mask.
pub const FUSED_ATTENTION: &str = "FusedAttention";

/// Adds a node to `fused`, a copy of `model`, for every attention of `model`. Returns their number.
pub(super) fn fuse_attention(model: &Model, fused: &mut Model) -> usize {
    let matcher = Matcher { graph: &model.graph, index: GraphIndex::new(&model.graph) };
    let opset = model.opset_imports.get("").copied().unwrap_or(1);
    let mut count = 0;
    for (number, node) in model.graph.body.nodes.iter().enumerate() {
        if standard(node, "Softmax")
            && let Some((place, made)) = matcher.attention(number, opset)
        {
            fused.graph.body.nodes[place] = made;
            count += 1;
        }
    }
    count
}

struct Matcher<'g> {
    graph: &'g Graph,
    index: GraphIndex,
}

/// A product of q and k' without its constant factors.
struct Scores {
    q: ValueId,
    k: ValueId,
    scale: f64,
}

/// Keys or values before the repetition for groups of heads, and the two shapes of the repetition.
struct Repeated {
    source: ValueId,
    expand: ValueId,
    reshape: ValueId,
}

impl Matcher<'_> {
    /// The fused node for the attention around a softmax, and the number of the node that it replaces.
    fn attention(&self, softmax: usize, opset: i64) -> Option<(usize, Node)> {
        let node = self.node(softmax)?;
        let axis = node.attribute("axis").map(|axis| axis.as_int());
        let last = match axis {
            Some(axis) => axis == Some(-1) || axis == Some(3),
            None => opset >= 13,
        };
        if !last || node.attributes.iter().any(|(name, _)| name != "axis") {
            return None;
        }
        let (scores, mask) = self.masked(input(node, 0)?)?;
        let (product, v) = self.product(output(node)?)?;
        let turned = self.made_by(scores.k, "Transpose").filter(|turn| permutation(turn) == Some(&[0, 1, 3, 2]));
        let (k, transposed) = match turned {
            Some(turn) => (input(turn, 0)?, false),
            None => (scores.k, true),
        };
        // Both or neither: attention has one number of groups.
        let repeated = if transposed { None } else { self.repeated(k).zip(self.repeated(v)) };
        let (k, v, shapes) = match repeated {
            Some((of_k, of_v)) => {
                (of_k.source, of_v.source, vec![of_k.expand, of_k.reshape, of_v.expand, of_v.reshape])
            }
            None => (k, v, Vec::new()),
        };
        let mut inputs = vec![Some(scores.q), Some(k), Some(v), mask];
        inputs.extend(shapes.into_iter().map(Some));
        let attribute = |name: &str, kind: AttributeKind| (name.to_string(), Attribute::from(kind));
        let place = self.node(product)?;
        let made = Node {
            name: place.name.clone(),
            op_type: FUSED_ATTENTION.into(),
            domain: INTERNAL_DOMAIN.into(),
            inputs,
            outputs: place.outputs.clone(),
            attributes: vec![
                attribute("scale", AttributeKind::Float(scores.scale as f32)),
                attribute("transposed", AttributeKind::Int(i64::from(transposed))),
            ],
            ..Node::default()
        };
        Some((product, made))
    }

    /// Scores, with the mask if one is added.
    fn masked(&self, id: ValueId) -> Option<(Scores, Option<ValueId>)> {
        if let Some(add) = self.made_by(id, "Add").filter(|_| self.read_once(id)) {
            let (left, right) = (input(add, 0)?, input(add, 1)?);
            let found = self.scores(left).map(|scores| (scores, Some(right)));
            return found.or_else(|| self.scores(right).map(|scores| (scores, Some(left))));
        }
        self.scores(id).map(|scores| (scores, None))
    }

    fn scores(&self, id: ValueId) -> Option<Scores> {
        if !self.read_once(id) {
            return None;
        }
        let (product, outer) = self.unscaled(id);
        if !self.read_once(product) {
            return None;
        }
        let node = self.made_by(product, "MatMul")?;
        let (q, of_q) = self.unscaled(input(node, 0)?);
        let (k, of_k) = self.unscaled(input(node, 1)?);
        let scale = outer * of_q * of_k;
        // The scale is stored in f32, like its factors.
        (scale.is_finite() && scale != 0.0).then_some(Scores { q, k, scale })
    }

    /// A value without its constant factor or divisor.
    fn unscaled(&self, id: ValueId) -> (ValueId, f64) {
        let scaled = || -> Option<(ValueId, f64)> {
            if let Some(node) = self.made_by(id, "Mul") {
                let (left, right) = (input(node, 0)?, input(node, 1)?);
                return match (self.number(left), self.number(right)) {
                    (None, Some(factor)) => Some((left, factor)),
                    (Some(factor), None) => Some((right, factor)),
                    _ => None,
                };
            }
            let node = self.made_by(id, "Div")?;
            Some((input(node, 0)?, 1.0 / self.number(input(node, 1)?)?))
        };
        scaled().unwrap_or((id, 1.0))
    }

    /// The product that is the only reader of the probabilities, and its other factor.
    fn product(&self, probabilities: ValueId) -> Option<(usize, ValueId)> {
        let readers = self.index.uses(probabilities);
        if self.index.output_position(probabilities).is_some() {
            return None;
        }
        if readers.len() == 1 {
            return self.product_of(probabilities);
        }
        // Where(IsNaN(p), 0, p): a fully masked row gives zeros.
        let reader = |op: &str| {
            let mut nodes = readers.iter().filter_map(|reader| self.node(reader.node));
            nodes.find(|node| standard(node, op)).filter(|_| readers.len() == 2)
        };
        let (guard, choice) = (reader("IsNaN")?, reader("Where")?);
        let condition = input(choice, 0)?;
        let fits = Some(condition) == output(guard)
            && input(choice, 2) == Some(probabilities)
            && self.number(input(choice, 1)?) == Some(0.0)
            && self.read_once(condition);
        if fits { self.product_of(output(choice)?) } else { None }
    }

    /// The product that is the only reader of this value, as its left factor, and the right factor.
    fn product_of(&self, left: ValueId) -> Option<(usize, ValueId)> {
        let reader = self.index.uses(left).first().filter(|reader| reader.input == Some(0) && self.read_once(left))?;
        let node = self.node(reader.node).filter(|node| standard(node, "MatMul"))?;
        Some((reader.node, input(node, 1)?))
    }

    /// The value that is repeated for groups of heads by `Reshape(Expand(Unsqueeze(x, 2), ..), ..)`.
    fn repeated(&self, id: ValueId) -> Option<Repeated> {
        let reshape = self.made_by(id, "Reshape")?;
        let expand = self.made_by(input(reshape, 0)?, "Expand")?;
        let unsqueeze = self.made_by(input(expand, 0)?, "Unsqueeze")?;
        let axes = match input(unsqueeze, 1) {
            Some(axes) => self.constant(axes)?.to_i64s()?,
            None => unsqueeze.attribute("axes")?.as_ints()?.to_vec(),
        };
        let (source, expand, reshape) = (input(unsqueeze, 0)?, input(expand, 1)?, input(reshape, 1)?);
        (axes == [2]).then_some(Repeated { source, expand, reshape })
    }

    fn node(&self, number: usize) -> Option<&Node> {
        self.graph.body.nodes.get(number)
    }

    /// The node that produces the value, if it has this operator of the default domain.
    fn made_by(&self, id: ValueId, op: &str) -> Option<&Node> {
        let node = self.node(self.index.node_of(id)?.0)?;
        standard(node, op).then_some(node)
    }

    /// True when the value has exactly one reader, a node input.
    fn read_once(&self, id: ValueId) -> bool {
        matches!(self.index.uses(id), [only] if only.input.is_some()) && self.index.output_position(id).is_none()
    }

    /// A constant of one element.
    fn number(&self, id: ValueId) -> Option<f64> {
        let tensor = self.constant(id)?;
        if tensor.element_count() == 1 && tensor.dtype.is_float() { tensor.to_f64s()?.first().copied() } else { None }
    }

    fn constant(&self, id: ValueId) -> Option<&crate::ir::Tensor> {
        // An initializer that is also an input is a default value, not a constant.
        if self.graph.body.inputs.contains(&id) {
            return None;
        }
        match self.made_by(id, "Constant") {
            Some(node) => node.attribute("value")?.as_tensor(),
            None => self.graph.body.initializer(id),
        }
    }
}

fn input(node: &Node, position: usize) -> Option<ValueId> {
    node.inputs.get(position).copied().flatten()
}

fn output(node: &Node) -> Option<ValueId> {
    node.outputs.first().copied().flatten()
}

fn permutation(node: &Node) -> Option<&[i64]> {
    node.attribute("perm")?.as_ints()
}
