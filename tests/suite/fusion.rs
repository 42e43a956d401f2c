//! Graphs whose attention and activations run as fused kernels give the same results and gradients.

use std::collections::HashMap;

use interlace::ir::ValueId;
use interlace::rewrite::{Fused, fuse_kernels};
use interlace::{onnx, torch};
use tch::{Kind, Tensor};

use super::interpreter::{feeds, fixture};

/// Compares logits, caches and the gradients of all matrices with and without fused kernels, in prefill and with a
/// cache.
#[test]
fn fused_graphs_give_the_same_results_and_gradients() {
    tch::set_num_threads(1);
    let layers = Fused { attention: 8, silu: 8 };
    for (file, expected, want) in [
        ("model/onnx/decoder_model_merged.onnx", "expected/nodrop.npz", Fused { attention: 16, silu: 16 }),
        ("zoo/smolvlm/ts17.onnx", "zoo/expected/smolvlm.nodrop.npz", layers),
        ("zoo/qwen3_vl/ts17.onnx", "zoo/expected/qwen3_vl.nodrop.npz", layers),
        ("zoo/llama/dyn18-ids.onnx", "zoo/expected/llama.nodrop.npz", layers),
        ("zoo/dyn18/qwen2_vl/decoder_model_merged.onnx", "zoo/expected/qwen2_vl.nodrop.npz", layers),
        // ONNX Runtime's optimiser has already fused the activation here.
        ("zoo/llama/optimum-O2.onnx", "zoo/expected/llama.nodrop.npz", Fused { attention: 8, silu: 0 }),
        ("zoo/optimum/llama-with-past/model.onnx", "zoo/expected/llama.nodrop.npz", layers),
        ("zoo/llama/ts17-noname.onnx", "zoo/expected/llama.nodrop.npz", layers),
        ("zoo/smolvlm/ts17-slim.onnx", "zoo/expected/smolvlm.nodrop.npz", layers),
        // In these graphs attention is one node already; the activation is not.
        ("zoo/qwen3_vl/dyn23.onnx", "zoo/expected/qwen3_vl.nodrop.npz", Fused { attention: 0, ..layers }),
        ("zoo/genai/llama-fp32-embeds/model.onnx", "zoo/expected/llama.nodrop.npz", Fused { attention: 0, ..layers }),
    ] {
        let model = onnx::load(&fixture(file)).expect(file);
        let (fused, count) = fuse_kernels(&model);
        assert_eq!(count, want, "{file}");
        let data: HashMap<String, Tensor> = Tensor::read_npz(fixture(expected)).expect(expected).into_iter().collect();
        let matrices =
            model.graph.body.initializers.iter().filter(|(_, tensor)| {
                tensor.dtype.is_float() && tensor.dims.len() == 2 && tensor.element_count() < 50_000
            });
        let trainable: Vec<ValueId> = matrices.map(|(id, _)| *id).take(24).collect();
        let options = torch::Options { trainable, ..Default::default() };
        let run = |model: &interlace::ir::Model| -> (Vec<Tensor>, Vec<Tensor>) {
            let program = torch::Program::compile(model, &options).expect(file);
            let inputs: Vec<(ValueId, Tensor)> =
                feeds(model, &data, "in", &HashMap::new()).into_iter().map(|(_, id, tensor)| (id, tensor)).collect();
            let results = program.run(&inputs, program.outputs()).expect(file);
            let logits = program.outputs().iter().position(|&id| program.name(id) == "logits").expect("logits");
            let factors = Tensor::arange(results[logits].numel() as i64, tch::kind::FLOAT_CPU).sin();
            let loss = (results[logits].reshape([-1]) * factors).sum(Kind::Float);
            let leaves: Vec<&Tensor> = program.parameters().iter().map(|parameter| &parameter.tensor).collect();
            let gradients = Tensor::run_backward(&[&loss], &leaves, false, false);
            (results, gradients)
        };
        let (plain, fused) = (run(&model), run(&fused));
        for (what, plain, fused) in [("output", plain.0, fused.0), ("gradient", plain.1, fused.1)] {
            assert!(!plain.is_empty() && plain.len() == fused.len(), "{file}: {} and {}", plain.len(), fused.len());
            for (number, (plain, fused)) in plain.iter().zip(&fused).enumerate() {
                assert_eq!((plain.size(), plain.kind()), (fused.size(), fused.kind()), "{file}: {what} {number}");
                let scale = plain.abs().max().double_value(&[]).max(1e-3);
                let worst = (plain - fused).abs().max().double_value(&[]) / scale;
                assert!(worst < 1e-5, "{file}: {what} {number} differs by {worst:e} of its largest value");
            }
        }
    }
}

/// An intermediate value that something else reads is not fused.
#[test]
fn a_value_with_other_readers_is_not_fused() {
    let mut model = onnx::load(&fixture("model/onnx/decoder_model_merged.onnx")).expect("model");
    let made_by = |op: &str| {
        let node = model.graph.body.nodes.iter().find(|node| node.op_type == op).expect("node");
        node.outputs[0].expect("output")
    };
    let read = [made_by("Softmax"), made_by("Sigmoid")];
    model.graph.body.outputs.extend(read);
    assert_eq!(fuse_kernels(&model).1, Fused { attention: 15, silu: 15 });
}
