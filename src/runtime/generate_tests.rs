use crate::runtime::{TensorValue, argmax_last};

#[test]
fn argmax_takes_the_first_maximum_of_the_last_position() {
    let logits = TensorValue::new(&[2, 2, 3], vec![9.0f32, 0.0, 0.0, 1.0, 5.0, 5.0, 0.0, 0.0, 9.0, -3.0, -2.0, -1.0])
        .expect("tensor");
    assert_eq!(argmax_last(&logits, 2).expect("tokens"), [1, 2]);
}

#[test]
fn nan_logits_are_refused() {
    let logits = TensorValue::new(&[1, 1, 2], vec![f32::NAN, 1.0]).expect("tensor");
    let error = argmax_last(&logits, 1).expect_err("NaN").to_string();
    assert_eq!(error, "logits: contain a value that is not a number");
}
