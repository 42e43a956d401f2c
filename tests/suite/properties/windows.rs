//! Cases of convolution, pooling, resizing and sampling.

use interlace::ir::DataType;

use super::Generator;
use super::case::{Case, Single};
use super::source::{Source, float_list, list};

/// Geometry of a window: sizes of the input and of the kernel, and its steps.
struct Window {
    size: Vec<i64>,
    kernel: Vec<i64>,
    strides: Vec<i64>,
    dilations: Vec<i64>,
    pads: Vec<i64>,
    auto_pad: &'static str,
}

/// A window that fits its input; pads are smaller than the kernel.
fn window(s: &mut Source, dilated: bool) -> Window {
    let axes = 1 + s.below(3);
    let most = if axes == 3 { 2 } else { 4 };
    let mut w = Window { size: vec![], kernel: vec![], strides: vec![], dilations: vec![], pads: vec![], auto_pad: "" };
    w.auto_pad = s.pick(&["", "", "", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]);
    for _ in 0..axes {
        let kernel = s.between(1, most);
        let dilation = if dilated { s.pick(&[1, 1, 2]) } else { 1 };
        let extent = dilation * (kernel - 1) + 1;
        w.kernel.push(kernel);
        w.dilations.push(dilation);
        w.strides.push(s.between(1, 3));
        w.size.push(s.between(extent, extent + 4));
    }
    if ["", "NOTSET"].contains(&w.auto_pad) {
        w.pads = (0..2 * axes).map(|at| s.between(0, w.kernel[at % axes] - 1)).collect();
        if s.chance(0.3) {
            w.pads.fill(0);
        }
    }
    w
}

impl Window {
    /// The attributes of the window. Those without effect are sometimes omitted.
    fn write(&self, s: &mut Source, mut single: Single, kernel_needed: bool) -> Single {
        if kernel_needed || s.chance(0.5) {
            single = single.ints("kernel_shape", &self.kernel);
        }
        let plain = |list: &[i64]| list.iter().all(|&value| value == 1);
        if !plain(&self.strides) || s.chance(0.3) {
            single = single.ints("strides", &self.strides);
        }
        if !plain(&self.dilations) {
            single = single.ints("dilations", &self.dilations);
        }
        if self.pads.iter().any(|&pad| pad != 0) {
            single = single.ints("pads", &self.pads);
        }
        if self.auto_pad.is_empty() { single } else { single.text("auto_pad", self.auto_pad) }
    }
}

fn convolution(s: &mut Source) -> Case {
    let w = window(s, true);
    let (group, inputs, outputs) = (s.pick(&[1, 1, 2, 3]), s.between(1, 2), s.between(1, 2));
    let mut x = vec![s.between(1, 2), inputs * group];
    x.extend(&w.size);
    let mut weight = vec![outputs * group, inputs];
    weight.extend(&w.kernel);
    let bias = s.maybe(|s| s.normal(&[outputs * group]));
    let mut single = s.single().input(s.normal(&x)).input(s.normal(&weight)).maybe(bias).output(DataType::Float);
    single = w.write(s, single, false);
    if group != 1 || s.chance(0.3) {
        single = single.int("group", group);
    }
    s.case(single)
}

fn convolution_of_integers(s: &mut Source) -> Case {
    let mut w = window(s, true);
    while w.size.len() == 3 {
        w = window(s, true);
    }
    let (group, inputs, outputs) = (s.pick(&[1, 1, 2]), s.between(1, 2), s.between(1, 2));
    let mut x = vec![s.between(1, 2), inputs * group];
    x.extend(&w.size);
    let mut weight = vec![outputs * group, inputs];
    weight.extend(&w.kernel);
    let mut single =
        s.single().input(s.ints(DataType::Uint8, &x, 0, 255)).input(s.ints(DataType::Uint8, &weight, 0, 255));
    let zeros = [s.maybe(|s| s.ints(DataType::Uint8, &[], 0, 255)), s.maybe(|s| s.ints(DataType::Uint8, &[], 0, 255))];
    for zero in zeros {
        single = single.maybe(zero);
    }
    single = w.write(s, single.output(DataType::Int32), false);
    if group != 1 {
        single = single.int("group", group);
    }
    s.case(single)
}

fn transposed_convolution(s: &mut Source) -> Case {
    let mut w = window(s, true);
    let (group, inputs, outputs) = (s.pick(&[1, 1, 2]), s.between(1, 2), s.between(1, 2));
    let axes = w.size.len();
    let extra: Vec<i64> = (0..axes).map(|axis| s.between(0, w.strides[axis].max(w.dilations[axis]) - 1)).collect();
    let whole = |w: &Window, axis: usize| {
        w.strides[axis] * (w.size[axis] - 1) + extra[axis] + w.dilations[axis] * (w.kernel[axis] - 1) + 1
    };
    // A result larger than the full product is not defined in either engine.
    let same = w.auto_pad.starts_with("SAME");
    if same && (0..axes).any(|axis| whole(&w, axis) < w.size[axis] * w.strides[axis]) {
        w.auto_pad = "";
    }
    if !w.pads.is_empty() && (0..axes).any(|axis| whole(&w, axis) <= w.pads[axis] + w.pads[axes + axis]) {
        w.pads.fill(0);
    }
    let mut x = vec![s.between(1, 2), inputs * group];
    x.extend(&w.size);
    let mut weight = vec![inputs * group, outputs];
    weight.extend(&w.kernel);
    let bias = s.maybe(|s| s.normal(&[outputs * group]));
    let mut single = s.single().input(s.normal(&x)).input(s.normal(&weight)).maybe(bias).output(DataType::Float);
    if !same && s.chance(0.2) {
        let shape: Vec<i64> = (0..axes).map(|axis| (whole(&w, axis) - s.between(0, 1)).max(1)).collect();
        single = single.ints("output_shape", &shape);
        w.pads.clear();
        w.auto_pad = "";
    }
    single = w.write(s, single, false).int("group", group);
    if extra.iter().any(|&extra| extra != 0) {
        single = single.ints("output_padding", &extra);
    }
    s.case(single)
}

/// The window of a pool. ONNX Runtime ignores dilations in the pads of SAME and truncates an input whose windows do not
/// touch, so SAME is combined with neither.
fn pool_window(s: &mut Source, dilated: bool) -> Window {
    let dilated = dilated && s.chance(0.5);
    let apart = |w: &Window| w.kernel.iter().zip(&w.strides).any(|(kernel, stride)| kernel < stride);
    let mut w = window(s, dilated);
    while w.auto_pad.starts_with("SAME") && (dilated || apart(&w)) {
        w = window(s, dilated);
    }
    w
}

fn pooled(s: &mut Source, w: &Window, dtype: DataType, since_ceil: bool) -> Single {
    let mut x = vec![s.between(1, 2), s.between(1, 3)];
    x.extend(&w.size);
    let single = s.single().input(s.numbers(dtype, &x)).output(dtype);
    let single = w.write(s, single, true);
    if since_ceil && s.chance(0.4) { single.int("ceil_mode", 1) } else { single }
}

fn average_pool(s: &mut Source) -> Case {
    let w = pool_window(s, s.version >= 19);
    let mut single = pooled(s, &w, DataType::Float, s.version >= 10);
    if s.chance(0.6) {
        single = single.int("count_include_pad", s.flag());
    }
    s.case(single)
}

fn max_pool(s: &mut Source) -> Case {
    let w = pool_window(s, s.version >= 10);
    let types: &[DataType] = &[DataType::Float, DataType::Float, DataType::Double, DataType::Int8, DataType::Uint8];
    let dtype = if s.version >= 12 { s.pick(types) } else { DataType::Float };
    let single = pooled(s, &w, dtype, s.version >= 10);
    s.case(single)
}

fn global_pool(s: &mut Source) -> Case {
    let mut x = vec![s.between(1, 2), s.between(1, 3)];
    x.extend(s.shape(1, 3));
    let single = s.single().input(s.normal(&x)).output(DataType::Float);
    s.case(single)
}

fn grid_sample(s: &mut Source) -> Case {
    let newer = s.version >= 20;
    let volume = newer && s.chance(0.3);
    let mut x = vec![s.between(1, 2), s.between(1, 2)];
    let mut grid = vec![x[0]];
    for _ in 0..if volume { 3 } else { 2 } {
        x.push(s.between(2, 5));
        grid.push(s.between(1, 4));
    }
    grid.push(if volume { 3 } else { 2 });
    let modes: &[&str] = match (newer, volume) {
        (true, true) => &["linear", "nearest"],
        (true, false) => &["linear", "nearest", "cubic"],
        (false, _) => &["bilinear", "nearest", "bicubic"],
    };
    let mut single = s.single().input(s.normal(&x)).input(s.floats(DataType::Float, &grid, -1.6, 1.6));
    if s.chance(0.8) {
        single = single.text("mode", s.pick(modes));
    }
    if s.chance(0.8) {
        single = single.text("padding_mode", s.pick(&["zeros", "border", "reflection"]));
    }
    if s.chance(0.6) {
        single = single.int("align_corners", s.flag());
    }
    let single = single.output(DataType::Float).tolerance(1e-3);
    s.case(single)
}

fn resize(s: &mut Source) -> Case {
    let mode = s.pick(&["nearest", "nearest", "linear", "cubic"]);
    let types: &[DataType] = match mode {
        "cubic" => &[DataType::Float],
        _ => &[DataType::Float, DataType::Float, DataType::Int32, DataType::Int8, DataType::Uint8],
    };
    let dtype = s.pick(types);
    let antialias = mode != "nearest" && s.version >= 18 && s.chance(0.3);
    // The forms that ONNX Runtime supports: batch and channels unchanged, or a plain matrix.
    let plain = s.chance(0.2);
    let mut shape = if plain { vec![] } else { vec![s.between(1, 2), s.between(1, 2)] };
    shape.extend([s.between(1, 6), s.between(1, 6)]);
    let rank = shape.len();
    let spatial = rank - 2..rank;
    let x = match dtype {
        DataType::Uint8 => s.ints(dtype, &shape, 0, 255),
        // With antialiasing, ONNX Runtime clips to the range of uint8.
        DataType::Int8 => s.ints(dtype, &shape, if antialias { 0 } else { -128 }, 127),
        DataType::Int32 => s.ints(dtype, &shape, -1000, 1000),
        _ => s.numbers(dtype, &shape),
    };
    let mut coordinates = vec!["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"];
    if s.version >= 19 {
        coordinates.push("half_pixel_symmetric");
    }
    let mut single = s.single().input(x).absent();
    let by_axes = s.version >= 18 && s.chance(0.3);
    let first = if by_axes { spatial.start } else { 0 };
    if by_axes {
        single = single.ints("axes", &spatial.clone().map(|axis| axis as i64).collect::<Vec<_>>());
    }
    if s.chance(0.5) {
        let scale = |s: &mut Source| s.pick(&[0.5f32, 0.6, 0.75, 1.0, 1.5, 2.0, 2.333_333_3, 3.3]);
        let scales: Vec<f32> = (first..rank)
            .map(|axis| if spatial.contains(&axis) { scale(s).max(1.0 / shape[axis] as f32) } else { 1.0 })
            .collect();
        single = single.input(float_list(&scales));
    } else {
        let sizes: Vec<i64> =
            (first..rank).map(|axis| if spatial.contains(&axis) { s.between(1, 9) } else { shape[axis] }).collect();
        single = single.absent().input(list(&sizes));
        if by_axes && mode == "nearest" && s.chance(0.5) {
            single = single.text("keep_aspect_ratio_policy", s.pick(&["not_larger", "not_smaller"]));
        }
    }
    single = single.text("mode", mode).text("coordinate_transformation_mode", s.pick(&coordinates));
    if mode == "nearest" {
        single = single.text("nearest_mode", s.pick(&["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]));
    }
    if mode == "cubic" && s.chance(0.5) {
        single = single.float("cubic_coeff_a", -0.5).int("exclude_outside", s.flag());
    }
    if antialias {
        single = single.int("antialias", 1);
    }
    // If an interpolated value is a whole number, the last bit of f32 decides to which integer it is truncated.
    let single = single.output(dtype).tolerance(1e-3).steps(i64::from(mode == "linear"));
    s.case(single)
}

pub const ROWS: &[Generator] = &[
    ("", "Conv", convolution),
    ("", "ConvInteger", convolution_of_integers),
    ("", "ConvTranspose", transposed_convolution),
    ("", "AveragePool", average_pool),
    ("", "MaxPool", max_pool),
    ("", "GlobalAveragePool", global_pool),
    ("", "GlobalMaxPool", global_pool),
    ("", "GridSample", grid_sample),
    ("", "Resize", resize),
];
