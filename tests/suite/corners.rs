//! Edge cases of operators that were wrong in an earlier version, each compared with ONNX Runtime.

use interlace::base::Device;
use interlace::ir::{AttributeKind, DataType};
use interlace::runtime::Runtime;

use super::properties::case::{Builder, Case, Outcome, Single};
use super::properties::source::{count, encode, float_list, int64, list};

const OPSET: i64 = 21;

fn op(name: &str) -> Single {
    Single::new("", name, OPSET)
}

/// The whole numbers from 1 on.
fn counted(dtype: DataType, shape: &[i64]) -> interlace::ir::Tensor {
    let values: Vec<f64> = (1..=count(shape)).map(|value| value as f64).collect();
    encode(dtype, shape, &values)
}

fn floats(values: &[f64]) -> interlace::ir::Tensor {
    encode(DataType::Float, &[values.len() as i64], values)
}

fn outcome(case: &Case) -> Outcome {
    tch::set_num_threads(1);
    case.compare(&Runtime::new(Device::Cpu).expect("ONNX Runtime"))
}

/// Checks that both engines agree, with fed inputs and with inputs as initializers.
fn agrees(make: impl Fn() -> Single) {
    for fixed in [false, true] {
        let case = make().case(|| fixed);
        assert_eq!(outcome(&case), Outcome::Agrees, "{}", case.describe());
    }
}

#[test]
fn average_pool_counts_auto_pad_like_explicit_pads() {
    for mode in ["SAME_UPPER", "SAME_LOWER", "VALID"] {
        for (kernel, stride) in [(3, 1), (2, 1), (3, 2), (4, 3)] {
            for counts in [0, 1] {
                agrees(|| {
                    op("AveragePool")
                        .input(counted(DataType::Float, &[1, 1, 4]))
                        .ints("kernel_shape", &[kernel])
                        .ints("strides", &[stride])
                        .text("auto_pad", mode)
                        .int("count_include_pad", counts)
                        .output(DataType::Float)
                });
            }
        }
    }
}

#[test]
fn a_pool_window_beyond_the_pads_counts_only_the_pads() {
    for counts in [0, 1] {
        agrees(|| {
            op("AveragePool")
                .input(counted(DataType::Float, &[1, 1, 5, 6]))
                .ints("kernel_shape", &[3, 3])
                .ints("strides", &[3, 2])
                .ints("pads", &[1, 0, 1, 2])
                .int("ceil_mode", 1)
                .int("count_include_pad", counts)
                .output(DataType::Float)
        });
    }
}

#[test]
fn integer_tensors_are_max_pooled_with_pads() {
    for dtype in [DataType::Int8, DataType::Uint8] {
        agrees(|| {
            op("MaxPool")
                .input(encode(dtype, &[1, 1, 4], &[3.0, 1.0, 4.0, 1.0]))
                .ints("kernel_shape", &[2])
                .ints("pads", &[1, 1])
                .output(dtype)
        });
    }
}

#[test]
fn integer_tensors_are_resized_with_fractional_weights() {
    for dtype in [DataType::Uint8, DataType::Int8, DataType::Int32] {
        for scale in [2.0, 0.6, 3.5] {
            agrees(|| {
                op("Resize")
                    .input(encode(dtype, &[1, 1, 1, 4], &[1.0, 4.0, 9.0, 127.0]))
                    .absent()
                    .input(float_list(&[1.0, 1.0, 1.0, scale]))
                    .text("mode", "linear")
                    .output(dtype)
            });
        }
    }
}

#[test]
fn resize_computes_output_sizes_in_f32() {
    for mode in ["nearest", "linear"] {
        agrees(|| {
            op("Resize")
                .input(counted(DataType::Float, &[1, 1, 1, 3]))
                .absent()
                .input(float_list(&[1.0, 1.0, 1.0, 2.333_333_3]))
                .text("mode", mode)
                .output(DataType::Float)
        });
    }
}

/// A loop with this many iterations, whose scan output is concatenated to an earlier tensor.
fn joined(trips: i64, declared: Option<&[i64]>) -> Case {
    let mut b = Builder::new(OPSET);
    b.input("trips", DataType::Int64, Some(&[]));
    b.input("before", DataType::Int64, Some(&[1, 2]));
    b.constant("x", list(&[3, 4]));
    b.typed("turn", DataType::Int64, Some(&[]));
    b.typed("going", DataType::Bool, Some(&[]));
    let nodes = vec![
        b.node("Identity", &["going"], &["still"], Vec::new()),
        b.node("Add", &["x", "turn"], &["one"], Vec::new()),
    ];
    b.typed("still", DataType::Bool, Some(&[]));
    if let Some(shape) = declared {
        b.typed("one", DataType::Int64, Some(shape));
    }
    let body = b.body(&["turn", "going"], &["still", "one"], nodes);
    let scanned = b.node("Loop", &["trips", ""], &["all"], vec![("body", AttributeKind::Graph(body))]);
    let join = b.node("Concat", &["before", "all"], &["y"], vec![("axis", AttributeKind::Int(0))]);
    b.push(scanned);
    b.push(join);
    b.output("y", DataType::Int64);
    let feeds = vec![("trips".into(), int64(&[], &[trips])), ("before".into(), int64(&[1, 2], &[1, 2]))];
    Case { model: b.model, feeds, reference: None, tolerance: 0.0, steps: 0 }
}

#[test]
fn a_loop_without_iterations_gives_empty_outputs_of_the_right_type() {
    for declared in [Some(&[2i64][..]), None] {
        for trips in [0, 1, 3] {
            let case = joined(trips, declared);
            assert_eq!(outcome(&case), Outcome::Agrees, "{trips} trips, declared {declared:?}");
        }
    }
}

#[test]
fn a_backward_slice_from_before_the_start_takes_the_first_element() {
    let least = i64::from(i32::MIN);
    for (start, end, step) in [(-10, least, -1), (-10, least, -2), (-4, -9, -1), (9, least, -1), (-1, i64::MAX, -1)] {
        agrees(|| {
            op("Slice")
                .input(counted(DataType::Float, &[3]))
                .input(list(&[start]))
                .input(list(&[end]))
                .input(list(&[0]))
                .input(list(&[step]))
                .output(DataType::Float)
        });
    }
}

#[test]
fn a_4_bit_zero_point_limits_the_quantised_range() {
    for (dtype, zero) in [(DataType::Uint4, 0.0), (DataType::Uint4, 7.0), (DataType::Int4, 0.0), (DataType::Int4, -3.0)]
    {
        agrees(|| {
            op("QuantizeLinear")
                .input(floats(&[-20.0, -8.0, -0.5, 0.5, 3.0, 7.0, 15.0, 20.0]))
                .input(encode(DataType::Float, &[], &[1.0]))
                .fixed(encode(dtype, &[], &[zero]))
                .output(dtype)
        });
        // Without a zero point, an attribute gives the type.
        agrees(|| {
            op("QuantizeLinear")
                .input(floats(&[-20.0, 3.0, 20.0]))
                .input(encode(DataType::Float, &[], &[0.5]))
                .int("output_dtype", dtype as i64)
                .output(dtype)
        });
    }
}

/// The bytes of a tensor do not say whether it holds 4-bit numbers.
#[test]
fn a_zero_point_of_unknown_bit_width_is_refused() {
    let refusal = |declared: bool| {
        let mut b = Builder::new(OPSET);
        b.input("x", DataType::Float, Some(&[3]));
        b.constant("scale", encode(DataType::Float, &[], &[1.0]));
        b.constant("zero", encode(DataType::Uint4, &[], &[7.0]));
        let same = b.node("Identity", &["zero"], &["known"], Vec::new());
        if declared {
            b.typed("known", DataType::Uint4, Some(&[]));
        }
        let quantised = b.node("QuantizeLinear", &["x", "scale", "known"], &["y"], Vec::new());
        b.push(same);
        b.push(quantised);
        b.output("y", DataType::Uint4);
        let compiled = interlace::torch::Program::compile(&b.model, &interlace::torch::Options::default());
        compiled.err().map(|error| error.to_string())
    };
    assert_eq!(refusal(true), None);
    let text = refusal(false).expect("refused");
    assert!(text.contains("does not say the element type of input 2"), "{text}");
}

#[test]
fn blocks_of_a_vector_have_their_own_scales() {
    for name in ["QuantizeLinear", "DequantizeLinear"] {
        let float = name == "QuantizeLinear";
        let (from, to) = if float { (DataType::Float, DataType::Uint8) } else { (DataType::Uint8, DataType::Float) };
        agrees(|| {
            op(name)
                .input(counted(from, &[5]))
                .input(floats(&[0.5, 0.25, 2.0]))
                .input(encode(DataType::Uint8, &[3], &[1.0, 2.0, 3.0]))
                .int("axis", 0)
                .int("block_size", 2)
                .output(to)
        });
    }
}

#[test]
fn an_exclusive_cumsum_does_not_subtract() {
    for values in [&[f64::INFINITY, 1.0][..], &[1e8, 1.0, 1.0], &[1.0, f64::INFINITY, 2.0]] {
        for reverse in [0, 1] {
            agrees(|| {
                op("CumSum")
                    .input(floats(values))
                    .input(int64(&[], &[0]))
                    .int("exclusive", 1)
                    .int("reverse", reverse)
                    .output(DataType::Float)
            });
        }
    }
}

#[test]
fn a_local_window_of_size_n_attends_to_n_keys() {
    let window = 3;
    for steps in [window, window + 1, window + 2] {
        let values = |seed: i64, heads: i64| {
            let shape = [1, steps, heads * 8];
            let values: Vec<f64> = (0..count(&shape)).map(|at| ((at as i64 * 7 + seed) % 11) as f64 / 11.0).collect();
            encode(DataType::Float, &shape, &values)
        };
        agrees(|| {
            Single::new("com.microsoft", "GroupQueryAttention", OPSET)
                .input(values(1, 2))
                .input(values(2, 1))
                .input(values(3, 1))
                .absent()
                .absent()
                .input(encode(DataType::Int32, &[1], &[steps as f64 - 1.0]))
                .input(encode(DataType::Int32, &[], &[steps as f64]))
                .int("num_heads", 2)
                .int("kv_num_heads", 1)
                .int("local_window_size", window)
                .output(DataType::Float)
                .output(DataType::Float)
                .output(DataType::Float)
        });
    }
}

#[test]
fn ties_between_experts_select_the_last_experts() {
    for chosen in [1, 2] {
        agrees(|| {
            Single::new("com.microsoft", "MoE", OPSET)
                .input(encode(DataType::Float, &[1, 2], &[0.5, -1.0]))
                .input(encode(DataType::Float, &[1, 4], &[1.0, 2.0, 2.0, 2.0]))
                .input(counted(DataType::Float, &[4, 2, 2]))
                .absent()
                .input(counted(DataType::Float, &[4, 2, 2]))
                .int("k", chosen)
                .text("activation_type", "identity")
                .output(DataType::Float)
        });
    }
}

#[test]
fn a_4_bit_embedding_narrower_than_a_block_is_read() {
    agrees(|| {
        Single::new("com.microsoft", "GatherBlockQuantized", OPSET)
            .fixed(counted(DataType::Uint8, &[3, 16]))
            .input(list(&[2, -3]))
            .input(encode(DataType::Float, &[3, 1], &[0.5, 0.25, 0.125]))
            .int("bits", 4)
            .int("block_size", 32)
            .int("quantize_axis", 1)
            .output(DataType::Float)
    });
}

#[test]
fn a_transposed_convolution_is_padded_to_the_requested_size() {
    let of = || {
        op("ConvTranspose")
            .input(counted(DataType::Float, &[1, 1, 3, 4]))
            .input(counted(DataType::Float, &[1, 2, 3, 3]))
            .ints("strides", &[2, 2])
            .output(DataType::Float)
    };
    for mode in ["SAME_UPPER", "SAME_LOWER", "VALID"] {
        agrees(|| of().text("auto_pad", mode));
    }
    agrees(|| of().ints("output_shape", &[6, 8]));
    agrees(|| of().ints("pads", &[1, 0, 0, 1]));
}

/// Scales for which the position is, up to the last bits of f32, a whole number or halfway between two.
#[test]
fn a_symmetric_resize_selects_the_pixels_of_onnx_runtime() {
    for (size, scale) in [(2, 0.75), (3, 0.6), (7, 0.6), (12, 1.7), (12, 2.7), (7, 2.333_333_3), (12, 0.9), (10, 1.1)] {
        for nearest in ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"] {
            agrees(|| {
                op("Resize")
                    .input(counted(DataType::Float, &[1, 1, 1, size]))
                    .absent()
                    .input(float_list(&[1.0, 1.0, 1.0, scale]))
                    .text("mode", "nearest")
                    .text("coordinate_transformation_mode", "half_pixel_symmetric")
                    .text("nearest_mode", nearest)
                    .output(DataType::Float)
            });
        }
    }
}

#[test]
fn nearest_resize_treats_positions_within_1e_6_of_a_tie_as_a_tie() {
    for nearest in ["round_prefer_floor", "round_prefer_ceil"] {
        for off in [0.0, 5e-7, -5e-7, 2e-6, -2e-6, 1e-4, -1e-4] {
            agrees(|| {
                op("Resize")
                    .input(counted(DataType::Float, &[1, 1, 1, 12]))
                    .absent()
                    .input(float_list(&[1.0, 1.0, 1.0, (3.0 / (1.5 + off)) as f32]))
                    .text("mode", "nearest")
                    .text("coordinate_transformation_mode", "asymmetric")
                    .text("nearest_mode", nearest)
                    .output(DataType::Float)
            });
        }
    }
}

#[test]
fn grid_sample_rounds_ties_between_pixels_before_reflection() {
    let grid: Vec<f64> = (-7..=7).flat_map(|place| [f64::from(place) / 4.0, 0.25]).collect();
    for corners in [0, 1] {
        agrees(|| {
            op("GridSample")
                .input(counted(DataType::Float, &[1, 1, 4, 4]))
                .input(encode(DataType::Float, &[1, 15, 1, 2], &grid))
                .text("mode", "nearest")
                .text("padding_mode", "reflection")
                .int("align_corners", corners)
                .output(DataType::Float)
        });
    }
}

/// Cases in which ONNX Runtime deviates from ONNX, and the interpreter follows ONNX.
#[test]
fn known_deviations_of_onnx_runtime_from_onnx_still_exist() {
    // ONNX: with SAME, an axis of 8 with stride 3 gives 3 windows. ONNX Runtime ignores the dilation in the pads: 2.
    let pool = op("MaxPool")
        .input(counted(DataType::Float, &[1, 1, 8]))
        .ints("kernel_shape", &[4])
        .ints("strides", &[3])
        .ints("dilations", &[2])
        .text("auto_pad", "SAME_UPPER")
        .output(DataType::Float);
    // ONNX: with an axis of 3 and stride 3, the window begins at the first element. In ONNX Runtime it begins at the
    // second.
    let apart = op("AveragePool")
        .input(counted(DataType::Float, &[1, 1, 3]))
        .ints("kernel_shape", &[1])
        .ints("strides", &[3])
        .text("auto_pad", "SAME_UPPER")
        .output(DataType::Float);
    // ONNX: interpolating between -50 and -50 gives -50. With antialiasing, ONNX Runtime clips to the range of uint8:
    // 0.
    let resize = op("Resize")
        .input(encode(DataType::Int8, &[1, 1, 1, 4], &[-50.0; 4]))
        .absent()
        .input(float_list(&[1.0, 1.0, 1.0, 0.5]))
        .text("mode", "linear")
        .int("antialias", 1)
        .output(DataType::Int8);
    // ONNX: a masked score is minus infinity. In ONNX Runtime it is the lowest float.
    let heads = || encode(DataType::Float, &[1, 1, 2, 8], &[0.5; 16]);
    let attention = Single::new("", "Attention", 23)
        .input(heads())
        .input(heads())
        .input(heads())
        .int("is_causal", 1)
        .int("qk_matmul_output_mode", 2)
        .output(DataType::Float)
        .unwanted()
        .unwanted()
        .output(DataType::Float);
    // ONNX: the 9 outputs at scale 1.1 sample the input at 0.136 and so on. ONNX Runtime copies if the size is
    // unchanged.
    let copied = op("Resize")
        .input(counted(DataType::Float, &[1, 1, 1, 9]))
        .absent()
        .input(float_list(&[1.0, 1.0, 1.0, 1.1]))
        .text("mode", "nearest")
        .text("nearest_mode", "floor")
        .output(DataType::Float);
    let known = [
        (copied, "output 0: 1e0 at 1, in ONNX Runtime 2e0"),
        (attention, "output 1: -inf at 1, in ONNX Runtime -3.4028234663852886e38"),
        (pool, "output 0: Float[1, 1, 3], in ONNX Runtime float32[1, 1, 2]"),
        (apart, "output 0: 1e0 at 0, in ONNX Runtime 2e0"),
        (resize, "output 0: -50 at 0, in ONNX Runtime 0"),
    ];
    for (single, found) in known {
        assert_eq!(outcome(&single.case(|| false)), Outcome::Differs(found.into()));
    }
}
