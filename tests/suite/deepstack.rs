//! Features that are added after the first layers (DeepStack): their place after pruning, and how decoders receive
//! them.

use std::path::Path;

use interlace::analysis::analyse;
use interlace::base::Device;
use interlace::ir::{DataType, Dim, Model, Node, Value, ValueType};
use interlace::onnx;
use interlace::rewrite::{drop_layers, has_additions, shift_additions};
use interlace::runtime::{Decoder, Embedded, Runtime, SessionOptions, Step};

const HIDDEN: usize = 64;
const TIME: usize = 5;

fn plain() -> Model {
    onnx::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo/smolvlm/ts17.onnx")).expect("a model")
}

/// The graph in which feature `n` is added after the layer with the `n`-th of these indices.
fn with_features(model: &Model, behind: &[usize]) -> Model {
    let mut model = analyse(model).expect("layers").model;
    for (level, &layer) in behind.iter().enumerate() {
        // Analysed again each time, because an added feature changes the stream after its layer.
        let map = analyse(&model).expect("layers").map;
        let glue = map.glue.iter().find(|glue| glue.after == Some(layer));
        let stream = glue.map_or(map.layers[layer].output, |glue| glue.to);
        let graph = &mut model.graph;
        let shape = vec![Dim::Unknown, Dim::Unknown, Dim::Known(HIDDEN as i64)];
        let ty = Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(shape) });
        let name = format!("deepstack_features_{level}");
        let feature = graph.add_value(Value { name, ty: ty.clone(), ..Value::default() });
        let sum = graph.add_value(Value { name: format!("sum_{level}"), ty, ..Value::default() });
        graph.body.inputs.push(feature);
        for input in graph.body.nodes.iter_mut().flat_map(|node| node.inputs.iter_mut().flatten()) {
            if *input == stream {
                *input = sum;
            }
        }
        let made = |node: &Node| node.present_outputs().any(|output| output == stream);
        let place = graph.body.nodes.iter().position(made).expect("its node") + 1;
        let node = Node {
            op_type: "Add".into(),
            inputs: vec![Some(stream), Some(feature)],
            outputs: vec![Some(sum)],
            ..Node::default()
        };
        graph.body.nodes.insert(place, node);
    }
    model
}

fn noise(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|at| ((at * 37 + seed * 101 + 11) % 97) as f32 / 48.5 - 1.0).collect()
}

/// A prompt of two image tokens with features of three levels.
fn prompt() -> Embedded {
    let mut prompt = Embedded::text(&[0; TIME], HIDDEN, noise(TIME * HIDDEN, 0), 0, 1);
    prompt.side.image = vec![false, true, true, false, false];
    prompt.side.deepstack = (1..=3).map(|level| noise(2 * HIDDEN, level)).collect();
    prompt.side.levels = vec![0, 1, 2];
    prompt
}

fn logits(model: &Model, prompt: &Embedded) -> Vec<f32> {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let session = runtime.session_of(model, &SessionOptions::default()).expect("a session");
    let mut decoder = Decoder::new(session, Some(16)).expect("a decoder");
    let step = Step::prefill(&[prompt], false).expect("a step");
    decoder.step(&step, None).expect("logits").0.to_f32().expect("floats").into_owned()
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn deepstack_features_keep_their_place_or_move_to_the_first_kept_layers() {
    let dense = analyse(&with_features(&plain(), &[0, 1, 2])).expect("layers");
    assert!(has_additions(&dense.map));
    let plain = analyse(&plain()).expect("layers");
    let text = Embedded::text(&[0; TIME], HIDDEN, noise(TIME * HIDDEN, 0), 0, 1);
    for dropped in [&[1usize][..], &[0, 2], &[3, 5], &[1, 2, 3, 4, 5, 6]] {
        let without = drop_layers(&plain, dropped).expect("a graph");
        let kept: Vec<usize> = (0..8).filter(|layer| !dropped.contains(layer)).collect();

        let keep = drop_layers(&dense, dropped).expect("a graph");
        // A feature after a dropped layer is added after the last kept layer before it.
        let behind: Vec<Option<usize>> = (0..3).map(|layer| kept.iter().rposition(|&kept| kept <= layer)).collect();
        if let Some(behind) = behind.into_iter().collect::<Option<Vec<usize>>>() {
            let want = logits(&with_features(&without, &behind), &prompt());
            let far = apart(&logits(&keep, &prompt()), &want);
            assert!(far <= 1e-5, "keep {dropped:?}: {far}");
        }

        let shift = drop_layers(&shift_additions(&dense, dropped).expect("moved"), dropped).expect("a graph");
        let behind: Vec<usize> = (0..3.min(kept.len())).collect();
        let want = logits(&with_features(&without, &behind), &prompt());
        let far = apart(&logits(&shift, &prompt()), &want);
        assert!(far <= 1e-5, "shift {dropped:?}: {far}");

        let moved = apart(&logits(&shift, &prompt()), &logits(&keep, &prompt()));
        assert_eq!(moved > 1e-3, dropped.iter().any(|&layer| layer < 3), "{dropped:?}: {moved}");
        assert!(
            apart(&logits(&shift, &text), &logits(&without, &text)) <= 1e-5,
            "{dropped:?}: a prompt without pictures has no features"
        );
    }
}

#[test]
fn deepstack_features_kept_by_an_earlier_pruning_cannot_be_moved() {
    let dense = analyse(&with_features(&plain(), &[0, 1, 2])).expect("layers");
    let pruned = analyse(&drop_layers(&dense, &[1]).expect("a graph")).expect("layers");
    let error = shift_additions(&pruned, &[3]).expect_err("two features after layer 0").to_string();
    assert!(error.contains("behind layers [0, 0, 1]") && error.contains("--deepstack keep"), "{error}");
}

#[test]
fn deepstack_levels_are_matched_by_number_and_extra_levels_refused() {
    let model = with_features(&plain(), &[0, 1]);
    let want = logits(&model, &prompt());
    // The decoder ignores the third level. The level numbers identify the first two.
    let mut two = prompt();
    two.side.deepstack.pop();
    two.side.levels.pop();
    assert_eq!(logits(&model, &two), want);
    // Levels with the encoder's layer numbers are matched by their order.
    two.side.levels = vec![5, 11];
    assert_eq!(logits(&model, &two), want);
    let mut three = prompt();
    three.side.levels = vec![5, 11, 17];
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let decoder = Decoder::new(runtime.session_of(&model, &SessionOptions::default()).expect("a session"), Some(16));
    let step = Step::prefill(&[&three], false).expect("a step");
    let error = decoder.expect("a decoder").feeds(&step).expect_err("three levels").to_string();
    assert!(error.contains("takes 2 levels") && error.contains("there are 3"), "{error}");
}
