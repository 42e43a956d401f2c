//! Graphs without transformer layers are refused, and the message says what was found.

use interlace::analysis::analyse;
use interlace::ir::{Attribute, AttributeKind, Model, Node, Tensor, Value, ValueId};

/// Builds graphs operator by operator.
#[derive(Default)]
struct Builder {
    model: Model,
}

impl Builder {
    fn value(&mut self, name: &str) -> ValueId {
        let name = self.model.graph.fresh_name(name);
        self.model.graph.add_value(Value { name, ..Value::default() })
    }

    fn input(&mut self, name: &str) -> ValueId {
        let id = self.value(name);
        self.model.graph.body.inputs.push(id);
        id
    }

    fn weight(&mut self, dims: &[u64]) -> ValueId {
        let count = dims.iter().product::<u64>() as usize;
        let id = self.value("weight");
        self.model.graph.body.initializers.push((id, Tensor::from_f32(dims, &vec![0.5; count])));
        id
    }

    fn node(&mut self, op_type: &str, inputs: &[ValueId]) -> ValueId {
        let output = self.value(op_type);
        self.model.graph.body.nodes.push(Node {
            op_type: op_type.into(),
            inputs: inputs.iter().copied().map(Some).collect(),
            outputs: vec![Some(output)],
            ..Node::default()
        });
        output
    }

    fn linear(&mut self, x: ValueId) -> ValueId {
        let weight = self.weight(&[8, 8]);
        self.node("MatMul", &[x, weight])
    }

    fn transposed(&mut self, x: ValueId) -> ValueId {
        let output = self.node("Transpose", &[x]);
        let node = self.model.graph.body.nodes.last_mut().unwrap();
        node.attributes.push(("perm".into(), Attribute::from(AttributeKind::Ints(vec![0, 2, 1]))));
        output
    }

    /// Attention over `memory`, added to `x`.
    fn attention(&mut self, x: ValueId, memory: ValueId) -> ValueId {
        let (query, key, value) = (self.linear(x), self.linear(memory), self.linear(memory));
        let turned = self.transposed(key);
        let scores = self.node("MatMul", &[query, turned]);
        let weights = self.node("Softmax", &[scores]);
        let mixed = self.node("MatMul", &[weights, value]);
        let mixed = self.linear(mixed);
        self.node("Add", &[x, mixed])
    }

    fn feed_forward(&mut self, x: ValueId) -> ValueId {
        let wide = self.linear(x);
        let active = self.node("Relu", &[wide]);
        let narrow = self.linear(active);
        self.node("Add", &[x, narrow])
    }

    fn finish(mut self, output: ValueId) -> Model {
        self.model.graph.body.outputs.push(output);
        self.model.opset_imports.insert(String::new(), 17);
        self.model.ir_version = 8;
        self.model
    }
}

fn refusal(model: &Model) -> String {
    interlace::ir::check(model).unwrap();
    analyse(model).map(|found| found.map.layers.len()).unwrap_err().to_string()
}

/// The stem and the residual stages of a small ResNet.
fn residual_network() -> Model {
    let mut build = Builder::default();
    let pixels = build.input("pixel_values");
    let kernel = build.weight(&[8, 3, 3, 3]);
    let mut x = build.node("Conv", &[pixels, kernel]);
    for _ in 0..4 {
        let (first, second) = (build.weight(&[8, 8, 3, 3]), build.weight(&[8, 8, 3, 3]));
        let inner = build.node("Conv", &[x, first]);
        let inner = build.node("Relu", &[inner]);
        let inner = build.node("Conv", &[inner, second]);
        let sum = build.node("Add", &[x, inner]);
        x = build.node("Relu", &[sum]);
    }
    let pooled = build.node("GlobalAveragePool", &[x]);
    build.finish(pooled)
}

#[test]
fn a_convolutional_network_is_refused() {
    let message = refusal(&residual_network());
    assert!(message.contains("convolution"), "{message}");
}

#[test]
fn a_convolutional_network_without_residuals_is_refused() {
    let mut build = Builder::default();
    let mut x = build.input("pixel_values");
    for _ in 0..4 {
        let kernel = build.weight(&[3, 3, 3, 3]);
        x = build.node("Conv", &[x, kernel]);
        x = build.node("Relu", &[x]);
    }
    let message = refusal(&build.finish(x));
    assert!(message.contains("no residual stream"), "{message}");
}

#[test]
fn repeated_segments_without_a_residual_stream_are_refused() {
    let mut build = Builder::default();
    let mut x = build.input("x");
    for _ in 0..6 {
        x = build.linear(x);
        x = build.node("Relu", &[x]);
    }
    let message = refusal(&build.finish(x));
    assert!(message.contains("no residual stream") && message.contains("`x`"), "{message}");
}

#[test]
fn residual_blocks_that_mix_no_tokens_are_refused() {
    let mut build = Builder::default();
    let mut x = build.input("x");
    for _ in 0..6 {
        x = build.feed_forward(x);
    }
    let message = refusal(&build.finish(x));
    assert!(message.contains("6 residual blocks") && message.contains("none with attention"), "{message}");
}

#[test]
fn the_decoder_of_an_encoder_decoder_is_refused() {
    let mut build = Builder::default();
    let (mut x, memory) = (build.input("decoder_hidden_states"), build.input("encoder_hidden_states"));
    for _ in 0..3 {
        x = build.attention(x, x);
        x = build.attention(x, memory);
        x = build.feed_forward(x);
    }
    let message = refusal(&build.finish(x));
    assert!(message.contains("cross-attention") && message.contains("encoder-decoder"), "{message}");
}

#[test]
fn an_encoder_and_its_decoder_in_one_graph_are_refused() {
    let mut build = Builder::default();
    let (mut memory, mut x) = (build.input("input_ids"), build.input("decoder_input_ids"));
    for _ in 0..3 {
        memory = build.attention(memory, memory);
        memory = build.feed_forward(memory);
    }
    for _ in 0..3 {
        x = build.attention(x, x);
        x = build.attention(x, memory);
        x = build.feed_forward(x);
    }
    let message = refusal(&build.finish(x));
    assert!(message.contains("cross-attention") || message.contains("encoder"), "{message}");
}

#[test]
fn a_cross_attention_over_cached_keys_is_refused() {
    let mut build = Builder::default();
    let mut x = build.input("inputs_embeds");
    for layer in 0..3 {
        x = build.attention(x, x);
        let key = build.input(&format!("past_key_values.{layer}.encoder.key"));
        let value = build.input(&format!("past_key_values.{layer}.encoder.value"));
        let query = build.linear(x);
        let turned = build.transposed(key);
        let scores = build.node("MatMul", &[query, turned]);
        let weights = build.node("Softmax", &[scores]);
        let mixed = build.node("MatMul", &[weights, value]);
        let mixed = build.linear(mixed);
        x = build.node("Add", &[x, mixed]);
        x = build.feed_forward(x);
    }
    let message = refusal(&build.finish(x));
    assert!(message.contains("cross-attention"), "{message}");
}

#[test]
fn a_fused_cross_attention_is_refused() {
    for cached in [false, true] {
        let mut build = Builder::default();
        let (mut x, memory) = (build.input("decoder_hidden_states"), build.input("encoder_hidden_states"));
        for _ in 0..3 {
            x = build.attention(x, x);
            let query = build.linear(x);
            let key = if cached { build.transposed(memory) } else { build.linear(memory) };
            let mixed = build.node("Attention", &[query, key, memory]);
            let mixed = build.linear(mixed);
            x = build.node("Add", &[x, mixed]);
            x = build.feed_forward(x);
        }
        let message = refusal(&build.finish(x));
        assert!(message.contains("cross-attention") && message.contains("Attention"), "{message}");
    }
}

#[test]
fn a_single_layer_is_refused() {
    let mut build = Builder::default();
    let x = build.input("x");
    let x = build.attention(x, x);
    let x = build.feed_forward(x);
    let message = refusal(&build.finish(x));
    assert!(message.contains("single layer"), "{message}");
}

#[test]
fn a_graph_without_outputs_or_without_inputs_is_refused() {
    let mut build = Builder::default();
    let x = build.input("x");
    build.linear(x);
    let model = build.model;
    assert!(analyse(&model).unwrap_err().to_string().contains("has no outputs"));

    let mut build = Builder::default();
    let weight = build.weight(&[8, 8]);
    let output = build.node("Relu", &[weight]);
    let message = refusal(&build.finish(output));
    assert!(message.contains("no input leads to output"), "{message}");
}

#[test]
fn a_transformer_of_the_same_builder_is_accepted() {
    let mut build = Builder::default();
    let mut x = build.input("inputs_embeds");
    for _ in 0..3 {
        x = build.attention(x, x);
        x = build.feed_forward(x);
    }
    let model = build.finish(x);
    assert_eq!(analyse(&model).unwrap().map.layers.len(), 3);
}
