use super::*;
use crate::ir::{DataType, Dim};
use crate::runtime::Input;

fn prompt(ids: &[i64], image: &[usize], levels: usize) -> Embedded {
    let width = 2;
    let data = ids.iter().flat_map(|&id| [id as f32, -id as f32]).collect();
    let mut embedded = Embedded::text(ids, width, data, 0, 1);
    if !image.is_empty() {
        embedded.side.image = (0..ids.len()).map(|at| image.contains(&at)).collect();
        embedded.side.types = (0..ids.len()).map(|at| i64::from(image.contains(&at))).collect();
    }
    let rows = |level: usize| image.iter().flat_map(|&at| [(10 * level + at) as f32; 2]).collect();
    embedded.side.deepstack = (1..=levels).map(rows).collect();
    embedded
}

fn input(name: &str, shape: &[i64]) -> Input {
    let shape = shape.iter().map(|&size| if size < 0 { Dim::Unknown } else { Dim::Known(size) }).collect();
    let port = Port { name: name.into(), dtype: DataType::Float, shape };
    Input::all("graph", [&port]).unwrap().remove(0)
}

fn numbers(array: &Array) -> Vec<f32> {
    array.floats().unwrap().iter().copied().collect()
}

fn integers(array: &Array) -> Vec<i64> {
    array.ints().unwrap().iter().copied().collect()
}

/// The message of a refusal, which is an `Error::Invalid`.
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    error.to_string()
}

#[test]
fn shorter_rows_are_padded_on_the_left_before_decoding() {
    let (long, short) = (prompt(&[5, 6, 7], &[], 0), prompt(&[8, 9], &[], 0));
    let step = Step::prefill(&[&long, &short], true).unwrap();
    assert_eq!(integers(&step.input_ids().unwrap()), [5, 6, 7, 8, 8, 9]);
    assert_eq!(integers(&step.attention_mask()), [1, 1, 1, 0, 1, 1]);
    assert_eq!(integers(&step.position_ids(false).unwrap()), [0, 1, 2, 0, 0, 1]);
    let rows = step.position_ids(true).unwrap();
    assert_eq!(rows.shape(), [3, 2, 3]);
    let embeddings = numbers(&step.embeddings(Some(2)).unwrap());
    assert_eq!(embeddings, [5., -5., 6., -6., 7., -7., 8., -8., 8., -8., 9., -9.]);
}

#[test]
fn shorter_rows_are_padded_on_the_right_in_training() {
    let (long, short) = (prompt(&[5, 6, 7], &[], 0), prompt(&[8], &[], 0));
    let step = Step::padded_right(&[&long, &short]).unwrap();
    assert_eq!(integers(&step.input_ids().unwrap()), [5, 6, 7, 8, 8, 8]);
    assert_eq!(integers(&step.attention_mask()), [1, 1, 1, 1, 0, 0]);
    assert_eq!(integers(&step.position_ids(false).unwrap()), [0, 1, 2, 0, 1, 2]);
}

#[test]
fn a_step_after_a_cache_attends_to_the_cached_positions() {
    let next = Embedded::text(&[4], 0, Vec::new(), 7, 3);
    let step = Step::decode(&[&next, &next], &[vec![1, 1], vec![0, 1]], true).unwrap();
    assert_eq!(integers(&step.attention_mask()), [1, 1, 1, 0, 1, 1]);
    assert_eq!(integers(&step.cache_position()), [2]);
    assert_eq!(integers(&step.position_ids(true).unwrap()), [7; 6]);
    assert_eq!((step.past(), step.has_cache()), (Some(2), true));
    let error = refusal(Step::decode(&[&next], &[vec![1], vec![1]], true));
    assert_eq!(error, "step: 1 rows, masks of 2 cached rows");
    let error = refusal(step.embeddings(None));
    assert!(error.contains("holds token ids, the graph takes `inputs_embeds`"), "{error}");
}

#[test]
fn deepstack_features_are_placed_at_the_image_tokens() {
    let (long, short) = (prompt(&[5, 6, 7], &[1, 2], 2), prompt(&[8, 9], &[1], 2));
    let step = Step::prefill(&[&long, &short], true).unwrap();
    let mask = step.image_mask(2);
    assert!(matches!(&mask, Array::Bool(mask) if mask.iter().copied().eq([false, true, true, false, false, true])));
    assert_eq!(integers(&step.token_types()), [0, 1, 1, 0, 0, 1]);
    let names = ["deepstack_features_0", "deepstack_features_1"];
    let ports =
        names.map(|name| Port { name: name.into(), dtype: DataType::Float, shape: vec![Dim::Unknown, Dim::Known(2)] });
    let inputs = Input::all("graph", &ports).unwrap();
    assert_eq!(numbers(&inputs[1].make(&step).unwrap()), [21., 21., 22., 22., 21., 21.]);
    let stacked = input("deepstack_features", &[2, -1, 2]).make(&step).unwrap();
    assert_eq!(stacked.shape(), [2, 3, 2]);
    let by_token = input("deepstack_features", &[2, -1, -1, 2]).make(&step).unwrap();
    assert_eq!(by_token.shape(), [2, 2, 3, 2]);
    assert_eq!(numbers(&by_token)[..6], [0., 0., 11., 11., 12., 12.]);
    // Packed after each row of the embeddings.
    let packed = step.embeddings(Some(6)).unwrap();
    assert_eq!(numbers(&packed)[..12], [5., -5., 0., 0., 0., 0., 6., -6., 11., 11., 21., 21.]);
    let error = input("deepstack_features", &[3, -1, 2]).make(&step).unwrap_err().to_string();
    assert!(error.contains("takes 3 levels") && error.contains("there are 2"), "{error}");
}

#[test]
fn image_tokens_are_counted_per_picture() {
    let pixels = Array::Float(ArrayD::zeros(IxDyn(&[1, 3, 2, 2])));
    let picture = Arc::new(ImageArrays::new([(crate::prompt::PIXEL_VALUES, pixels)]).unwrap());
    let mut two = prompt(&[5, 6, 7, 8, 9], &[0, 1, 3, 4], 0);
    two.side.pictures = vec![Arc::clone(&picture), picture];
    let step = Step::prefill(&[&two], true).unwrap();
    let tokens = input("images_emb_mask", &[-1, -1, -1]).make(&step).unwrap();
    assert!(matches!(&tokens, Array::Bool(mask) if mask.shape() == [1, 2, 2] && mask.iter().all(|&real| real)));
    assert_eq!(input("pixel_values", &[-1, -1, 3, 2, 2]).make(&step).unwrap().shape(), [1, 2, 3, 2, 2]);
    two.side.image[0] = false;
    let step = Step::prefill(&[&two], true).unwrap();
    let error = refusal(input("images_emb_mask", &[-1, -1, -1]).make(&step));
    assert!(error.contains("3 image tokens of 1 prompts belong to 2 pictures"), "{error}");
}

#[test]
fn a_prompt_without_pictures_has_empty_deepstack_features() {
    let text = prompt(&[5, 6], &[], 0);
    let step = Step::prefill(&[&text], true).unwrap();
    assert_eq!(input("deepstack_features_0", &[-1, 4]).make(&step).unwrap().shape(), [0, 4]);
    assert_eq!(input("deepstack_visual_embeds", &[3, -1, 4]).make(&step).unwrap().shape(), [3, 0, 4]);
    assert_eq!(numbers(&input("deepstack_features_0", &[-1, -1, 2]).make(&step).unwrap()), [0.0; 4]);
    assert_eq!(input("image_features", &[-1, 4]).make(&step).unwrap().shape(), [0, 4]);
}

#[test]
fn per_layer_embeddings_take_the_shape_of_the_graph_input() {
    let mut text = prompt(&[5, 6], &[], 0);
    text.side.per_layer = (0..12).map(|n| n as f32).collect();
    let step = Step::prefill(&[&text], true).unwrap();
    assert_eq!(input("per_layer_inputs", &[-1, -1, 3, 2]).make(&step).unwrap().shape(), [1, 2, 3, 2]);
    let error = refusal(input("per_layer_inputs", &[-1, -1, 4, 2]).make(&step));
    assert!(error.contains("`per_layer_inputs`") && error.contains("there is one of 6 numbers"), "{error}");
    let none = Step::prefill(&[&prompt(&[5], &[], 0)], true).unwrap();
    let error = input("per_layer_inputs", &[-1, -1, 3, 2]).make(&none).unwrap_err().to_string();
    assert!(error.contains("`per_layer_inputs`") && error.contains("there is one of 0 numbers"), "{error}");
}

#[test]
fn a_slice_of_a_prompt_keeps_its_positions_and_features() {
    let whole = prompt(&[5, 6, 7, 8], &[1, 3], 1);
    let part = whole.slice(2..4);
    assert_eq!((part.len(), &part.input_ids[..], &part.positions[0][..]), (2, &[7, 8][..], &[2, 3][..]));
    assert_eq!((&part.side.image[..], &part.side.deepstack[0][..]), (&[false, true][..], &[13., 13.][..]));
}

#[test]
fn rows_with_inconsistent_content_are_refused() {
    let (image, text) = (prompt(&[5, 6], &[1], 2), prompt(&[5, 6], &[], 0));
    Step::prefill(&[&image, &text], true).unwrap();
    let mut broken = image.clone();
    broken.side.deepstack.pop();
    let error = refusal(Step::prefill(&[&image, &broken], true));
    assert!(error.contains("a row of 2 tokens holds 2 ids, 4 numbers of width 2"), "{error}");
    let mut short = text.clone();
    short.data.pop();
    let error = refusal(Step::prefill(&[&short], true));
    assert!(error.contains("a row of 2 tokens holds 2 ids, 3 numbers of width 2"), "{error}");
    assert_eq!(refusal(Step::prefill(&[], true)), "step: 0 rows of 0 tokens");
}
