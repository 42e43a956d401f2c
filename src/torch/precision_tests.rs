//! Which operators of a program in bf16 compute in f32.

use tch::Device;

use super::*;

/// Normalisations written as several nodes, of a stream in bf16: each row has the length that it has in f32, as with the
/// operator of one node, though each number is rounded; and the stream goes on in bf16.
#[test]
fn normalisations_of_several_nodes_are_computed_in_f32() {
    const WIDTH: i64 = 512;
    let base = || {
        let scale: Vec<f32> = (0..WIDTH).map(|n| 1.0 + 0.3 * (n as f32).sin()).collect();
        Builder::new()
            .input("x", DataType::Float)
            .ints("last", &[-1])
            .weight("two", &[], &[2.0])
            .weight("eps", &[1], &[1e-5])
            .weight("scale", &[WIDTH as u64], &scale)
            .weight("bias", &[WIDTH as u64], &[0.1; WIDTH as usize])
    };
    let mean = |builder: Builder, x: &str, to: &str| builder.node("ReduceMean", &[x, "last"], &[to]);
    let root = |builder: Builder, square: &str| {
        mean(builder, square, "mean").node("Add", &["mean", "eps"], &["shifted"]).node("Sqrt", &["shifted"], &["root"])
    };
    let rms = [
        base().node("SimplifiedLayerNormalization", &["x", "scale"], &["n"]),
        root(base().node("Pow", &["x", "two"], &["square"]), "square").node("Div", &["x", "root"], &["unit"]).node(
            "Mul",
            &["unit", "scale"],
            &["n"],
        ),
        root(base().node("Mul", &["x", "x"], &["square"]), "square")
            .node("Reciprocal", &["root"], &["inverse"])
            .node("Mul", &["inverse", "x"], &["unit"])
            .node("Mul", &["scale", "unit"], &["n"]),
    ];
    let centred = |builder| mean(builder, "x", "middle").node("Sub", &["x", "middle"], &["c"]);
    let layer = [
        base().node("LayerNormalization", &["x", "scale", "bias"], &["n"]),
        root(centred(base()).node("Pow", &["c", "two"], &["square"]), "square")
            .node("Div", &["c", "root"], &["unit"])
            .node("Mul", &["unit", "scale"], &["scaled"])
            .node("Add", &["scaled", "bias"], &["n"]),
    ];
    // Numbers without a pattern, in rows of very different lengths.
    let place = Tensor::arange(16 * WIDTH, (Kind::Float, Device::Cpu));
    let noise = ((place * 12.9898).sin() * 43758.547).frac().reshape([16, WIDTH]) + 0.1;
    let length = Tensor::arange(16, (Kind::Float, Device::Cpu)).reshape([16, 1]).exp() * 0.01;
    let x = (noise * length).to_kind(Kind::BFloat16);
    for model in rms.into_iter().chain(layer) {
        let model = model.node("Add", &["x", "n"], &["y"]).output("n").output("y").model;
        let run = |x: Tensor, autocast| {
            let options = Options { autocast, ..Default::default() };
            let program = Program::compile(&model, &options).expect("compile");
            program.run(&[(program.value("x").expect("x"), x)], program.outputs()).expect("run")
        };
        let exact = run(x.to_kind(Kind::Float), None).remove(0);
        let low = run(x.shallow_clone(), Some(Kind::BFloat16));
        assert!(low.iter().all(|value| value.kind() == Kind::BFloat16), "{low:?}");
        let apart = low[0].to_kind(Kind::Float) - &exact;
        let rounded = apart.norm().double_value(&[]) / exact.norm().double_value(&[]);
        assert!(rounded < 2f64.powi(-8), "{rounded}");
        // The part of the error along each row: above 2^-9.5 where means and roots are rounded.
        let along = (&apart * &exact).sum_dim_intlist(-1, false, Kind::Float)
            / exact.square().sum_dim_intlist(-1, false, Kind::Float);
        let along = along.abs().max().double_value(&[]);
        assert!(along < 2f64.powi(-10), "{along}");
    }
}

/// The lowest f32 number as a mask is not infinite in bf16: a row that sees nothing has equal weights, not NaN.
#[test]
fn a_mask_stays_finite_in_16_bits() {
    let model = Builder::new()
        .input("x", DataType::Float)
        .weight("mask", &[2, 2], &[0.0, f32::MIN, f32::MIN, f32::MIN])
        .node("Add", &["x", "mask"], &["masked"])
        .node("Softmax", &["masked"], &["y"])
        .output("y")
        .model;
    let options = Options { autocast: Some(Kind::BFloat16), ..Default::default() };
    let program = Program::compile(&model, &options).expect("compile");
    let x = vector(&[0.5, -1.0, 2.0, 2.0]).reshape([2, 2]).to_kind(Kind::BFloat16);
    let y = program.run(&[(program.value("x").expect("x"), x)], program.outputs()).expect("run").remove(0);
    assert_eq!(floats(&y.to_kind(Kind::Float)), [1.0, 0.0, 0.5, 0.5]);
}
