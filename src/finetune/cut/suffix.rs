//! The part of a decoder that training runs: from the first trained layer to the logits, split at the residual stream.
//!
//! The graph alone determines which values a piece reads besides the stream, and from which value on the head is
//! position-wise, so that it can run at the answer positions only.

use std::collections::HashSet;

use crate::analysis::{head_input, position_wise_from};
use crate::base::{Error, Result};
use crate::ir::{Graph, GraphIndex, Node, ValueId, captured};

/// Split of the trained part of a graph. A piece is one layer, or the head.
#[derive(Clone, Debug)]
pub struct Suffix {
    /// Residual stream before the first trained layer, between layers, and after the last layer.
    pub streams: Vec<ValueId>,
    /// Values that pieces read and that depend on the content of graph inputs (masks, positions), but neither on the
    /// residual stream or its shape nor on trained weights. They are computed once per batch.
    pub side: Vec<ValueId>,
    /// Graph inputs that any piece reads.
    pub inputs: Vec<ValueId>,
    /// Initializers that any piece reads.
    pub weights: HashSet<ValueId>,
    /// True when a piece reads values computed from the tokens besides the residual stream, such as an embedding per
    /// layer or features packed after the embeddings in each row.
    pub reads_tokens: bool,
    /// Trained initializers that each piece reads: one list per layer, then the head's.
    pub trained: Vec<Vec<ValueId>>,
    /// Input of the head, or the logits themselves when the head is not a product with a constant.
    pub head_input: ValueId,
    /// A value from which each position is computed independently: inside the last layer, usually the stream before its
    /// MLP, or else [`Suffix::head_input`].
    pub rows_from: ValueId,
    pub logits: ValueId,
}

impl Suffix {
    /// Splits `graph` at `streams`, which are in layer order. `inner` are the values of the stream inside the last layer,
    /// `tokens` the inputs that hold token ids or embeddings, `trained` the initializers to train.
    ///
    /// Errors: `Error::Unsupported` when a piece reads a value computed inside an earlier one; `Error::Invalid` when no
    /// piece reads one of the trained initializers.
    pub fn find(
        graph: &Graph,
        streams: &[ValueId],
        inner: &[ValueId],
        logits: ValueId,
        tokens: &[ValueId],
        trained: &HashSet<ValueId>,
    ) -> Result<Self> {
        let index = GraphIndex::new(graph);
        let nodes = &graph.body.nodes;
        let head_input = head_input(graph, logits);
        let places: Vec<ValueId> = inner.iter().chain(streams.last()).copied().collect();
        let rows_from = position_wise_from(graph, &places, logits).unwrap_or(head_input);

        let mut pieces: Vec<(ValueId, ValueId)> = streams.windows(2).map(|pair| (pair[0], pair[1])).collect();
        pieces.extend(streams.last().map(|&last| (last, logits)));
        let inputs: HashSet<ValueId> = graph.body.inputs.iter().copied().collect();
        let mut side = Vec::new();
        let mut seen = HashSet::new();
        let mut read = HashSet::new();
        let mut trained_by_piece = Vec::new();
        let mut reads_tokens = false;
        for (from, to) in pieces {
            let piece = needed_nodes(&index, nodes, from, to);
            let own: HashSet<ValueId> = piece.iter().flat_map(|&number| reads(&nodes[number])).collect();
            // Nodes that read only the shape of an earlier stream do not need the stream itself. Graph inputs are
            // available to every piece.
            let by_content = piece.iter().map(|&number| &nodes[number]).filter(|node| !node.reads_shape_only());
            let by_content: HashSet<ValueId> = by_content.flat_map(reads).collect();
            let earlier = streams.iter().take_while(|&&stream| stream != from);
            let earlier = earlier.copied().find(|stream| by_content.contains(stream) && !inputs.contains(stream));
            if let Some(earlier) = earlier {
                return Err(Error::unsupported(
                    format!("the graph between `{}` and `{}`", graph.name(from), graph.name(to)),
                    format!("reads what a layer behind `{}` computes inside, such as shared keys", graph.name(earlier)),
                )
                .remedy("finetune layers behind the last one that others read from"));
            }
            trained_by_piece.push(
                graph
                    .body
                    .initializers
                    .iter()
                    .map(|(id, _)| *id)
                    .filter(|id| own.contains(id) && trained.contains(id))
                    .collect(),
            );
            read.extend(own);
            let flows = |sources: HashSet<ValueId>| reach(nodes, &piece, sources, false);
            let leaks = flows(tokens.iter().copied().filter(|&token| token != from).collect());
            reads_tokens |= leaks.contains(&to);
            // A mask sliced to the length of a layer's own keys belongs to the layer. The whole mask is shared by all
            // layers.
            let stream = reach(nodes, &piece, HashSet::from([from]), true);
            let weights = flows(trained.clone());
            // Values computed from the tokens alone are also computed once.
            let content = flows(graph.body.inputs.iter().copied().filter(|&id| id != from).collect());
            for &number in &piece {
                let node = &nodes[number];
                if !node.present_outputs().any(|id| stream.contains(&id)) {
                    continue;
                }
                for id in reads(node) {
                    let once = content.contains(&id)
                        && !stream.contains(&id)
                        && !weights.contains(&id)
                        && !inputs.contains(&id);
                    if once && seen.insert(id) {
                        side.push(id);
                    }
                }
            }
        }
        if let Some(&id) = trained.iter().find(|&id| !read.contains(id)) {
            let problem = "is to be trained, but nothing after the first trained layer reads it";
            return Err(Error::invalid(format!("initializer `{}`", graph.name(id)), problem));
        }
        let inputs = graph.body.inputs.iter().copied().filter(|id| read.contains(id)).collect();
        let initializers = graph.body.initializers.iter().map(|(id, _)| *id);
        let weights = initializers.filter(|id| read.contains(id)).collect();
        Ok(Suffix {
            streams: streams.to_vec(),
            side,
            inputs,
            weights,
            reads_tokens,
            trained: trained_by_piece,
            head_input,
            rows_from,
            logits,
        })
    }
}

/// Number of nodes that read a value, in their bodies or outside.
pub fn reader_count(nodes: &[Node], id: ValueId) -> usize {
    nodes.iter().filter(|node| reads(node).any(|read| read == id)).count()
}

/// Values that a node reads, including those that its bodies capture.
pub fn reads(node: &Node) -> impl Iterator<Item = ValueId> + '_ {
    node.present_inputs().chain(node.bodies().flat_map(captured))
}

/// Indices of the nodes between two values, in execution order.
pub fn nodes_between(graph: &Graph, from: ValueId, to: ValueId) -> Vec<usize> {
    needed_nodes(&GraphIndex::new(graph), &graph.body.nodes, from, to)
}

/// Indices of the nodes that compute `to` when `from` is given, in execution order.
fn needed_nodes(index: &GraphIndex, nodes: &[Node], from: ValueId, to: ValueId) -> Vec<usize> {
    let mut found = HashSet::new();
    let mut pending = vec![to];
    while let Some(id) = pending.pop() {
        if id == from {
            continue;
        }
        if let Some((number, _)) = index.node_of(id)
            && found.insert(number)
        {
            pending.extend(reads(&nodes[number]));
        }
    }
    let mut numbers: Vec<usize> = found.into_iter().collect();
    numbers.sort_unstable();
    numbers
}

/// The sources and the values that depend on their content through the nodes of `piece`. With `shapes`, also values
/// that depend on their shape only.
fn reach(nodes: &[Node], piece: &[usize], mut sources: HashSet<ValueId>, shapes: bool) -> HashSet<ValueId> {
    for &number in piece {
        let node = &nodes[number];
        if (shapes || !node.reads_shape_only()) && reads(node).any(|id| sources.contains(&id)) {
            sources.extend(node.present_outputs());
        }
    }
    sources
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{DataType, Tensor, Value};

    /// Builds a graph node by node, as `output = op(inputs)`. Names that begin with `w` are initializers.
    struct Builder {
        graph: Graph,
    }

    impl Builder {
        fn new(inputs: &[&str]) -> Self {
            let mut builder = Builder { graph: Graph::default() };
            for name in inputs {
                let id = builder.id(name);
                builder.graph.body.inputs.push(id);
            }
            builder
        }

        fn id(&mut self, name: &str) -> ValueId {
            match self.graph.values.iter().position(|value| value.name == name) {
                Some(position) => {
                    let found = self.graph.body.nodes.iter().flat_map(Node::present_outputs);
                    let known = found.chain(self.graph.body.inputs.iter().copied());
                    let weights = self.graph.body.initializers.iter().map(|(id, _)| *id);
                    known.chain(weights).find(|id| id.index() == position).unwrap()
                }
                None => self.graph.add_value(Value { name: name.into(), ..Value::default() }),
            }
        }

        fn node(mut self, output: &str, op: &str, inputs: &[&str]) -> Self {
            let mut ids = Vec::new();
            for name in inputs {
                let id = self.id(name);
                if name.starts_with('w') && self.graph.body.initializer(id).is_none() {
                    self.graph.body.initializers.push((id, Tensor::from_f32(&[1], &[1.0])));
                }
                ids.push(Some(id));
            }
            let output = self.id(output);
            let node = Node {
                name: op.into(),
                op_type: op.into(),
                inputs: ids,
                outputs: vec![Some(output)],
                ..Node::default()
            };
            self.graph.body.nodes.push(node);
            self
        }

        fn finish(mut self, output: &str) -> Graph {
            let id = self.id(output);
            self.graph.body.outputs.push(id);
            self.graph
        }
    }

    fn ids(graph: &Graph, names: &[&str]) -> Vec<ValueId> {
        let all = graph.body.nodes.iter().flat_map(|node| node.present_inputs().chain(node.present_outputs()));
        let all: Vec<ValueId> = all.chain(graph.body.inputs.iter().copied()).collect();
        names.iter().map(|name| *all.iter().find(|id| graph.name(**id) == *name).unwrap()).collect()
    }

    fn names<'g>(graph: &'g Graph, ids: &[ValueId]) -> Vec<&'g str> {
        ids.iter().map(|&id| graph.name(id)).collect()
    }

    fn network() -> Builder {
        Builder::new(&["inputs_embeds", "attention_mask", "unused"])
            .node("shape", "Shape", &["inputs_embeds"])
            .node("cast", "Cast", &["attention_mask"])
            .node("causal", "ConstantOfShape", &["shape"])
            .node("mask", "Where", &["cast", "causal"])
            .node("h1", "Block", &["inputs_embeds", "mask", "w0"])
            .node("h2", "Block", &["h1", "mask", "causal", "w1"])
            .node("h3", "Block", &["h2", "mask", "w2"])
            .node("norm", "SimplifiedLayerNormalization", &["h3", "w_norm"])
            .node("product", "MatMul", &["norm", "w_head"])
            .node("logits", "Mul", &["product", "w_scale"])
    }

    fn find(graph: &Graph, streams: &[&str], trained: &[&str]) -> Result<Suffix> {
        let streams = ids(graph, streams);
        let logits = ids(graph, &["logits"])[0];
        let tokens = ids(graph, &["inputs_embeds"]);
        Suffix::find(graph, &streams, &[], logits, &tokens, &ids(graph, trained).into_iter().collect())
    }

    #[test]
    fn masks_are_computed_once_and_the_head_is_cut_at_its_product() {
        let graph = network().finish("logits");
        let suffix = find(&graph, &["h1", "h2", "h3"], &["w1", "w2"]).unwrap();
        assert_eq!(names(&graph, &suffix.side), ["mask"]);
        assert_eq!(names(&graph, &suffix.inputs), ["inputs_embeds", "attention_mask"]);
        assert_eq!(graph.name(suffix.head_input), "norm");
        let trained: Vec<_> = suffix.trained.iter().map(|ids| names(&graph, ids)).collect();
        assert_eq!(trained, [vec!["w1"], vec!["w2"], vec![]]);
    }

    #[test]
    fn a_mask_sliced_to_the_keys_of_a_layer_belongs_to_that_layer() {
        let graph = Builder::new(&["inputs_embeds", "attention_mask"])
            .node("mask", "Cast", &["attention_mask"])
            .node("h1", "Block", &["inputs_embeds", "mask", "w0"])
            .node("keys", "MatMul", &["h1", "w_k"])
            .node("length", "Shape", &["keys"])
            .node("cut", "Slice", &["mask", "length"])
            .node("h2", "Block", &["h1", "cut", "w1"])
            .node("logits", "MatMul", &["h2", "w_head"])
            .finish("logits");
        let suffix = find(&graph, &["h1", "h2"], &["w1"]).unwrap();
        assert_eq!(names(&graph, &suffix.side), ["mask"]);
    }

    #[test]
    fn a_layer_that_reads_the_token_embeddings_directly_is_found() {
        let graph = Builder::new(&["inputs_embeds"])
            .node("h1", "Block", &["inputs_embeds", "w0"])
            .node("h2", "Block", &["h1", "inputs_embeds", "w1"])
            .node("logits", "MatMul", &["h2", "w_head"])
            .finish("logits");
        assert!(find(&graph, &["h1", "h2"], &["w1"]).unwrap().reads_tokens);
        assert!(!find(&graph, &["inputs_embeds", "h2"], &["w1"]).unwrap().reads_tokens);
    }

    #[test]
    fn keys_shared_with_a_later_layer_are_refused() {
        let graph = Builder::new(&["inputs_embeds"])
            .node("h1", "Block", &["inputs_embeds", "w0"])
            .node("keys", "MatMul", &["h1", "w_k"])
            .node("h2", "Block", &["h1", "keys", "w1"])
            .node("h3", "Block", &["h2", "keys", "w2"])
            .node("logits", "MatMul", &["h3", "w_head"])
            .finish("logits");
        let error = find(&graph, &["h1", "h2", "h3"], &["w1"]).unwrap_err().to_string();
        assert!(error.contains("`h2` and `h3`") && error.contains("behind `h1`"), "{error}");
        assert!(find(&graph, &["h2", "h3"], &["w2"]).unwrap().reads_tokens);
    }

    #[test]
    fn a_head_with_more_than_a_product_runs_on_all_positions() {
        let graph = Builder::new(&["inputs_embeds"])
            .node("h1", "Block", &["inputs_embeds", "w0"])
            .node("product", "MatMul", &["h1", "w_head"])
            .node("logits", "Softmax", &["product"])
            .finish("logits");
        let suffix = find(&graph, &["inputs_embeds", "h1"], &["w0"]).unwrap();
        assert_eq!(suffix.head_input, suffix.logits);
    }

    #[test]
    fn a_trained_weight_outside_the_trained_layers_is_refused() {
        let graph = network().finish("logits");
        let error = find(&graph, &["h1", "h2", "h3"], &["w0"]).unwrap_err().to_string();
        assert!(error.contains("`w0`"), "{error}");
        assert_eq!(graph.body.initializers[0].1.dtype, DataType::Float);
    }
}
