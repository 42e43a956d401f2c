//! Pooling, resizing and sampling.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Args, Build, Kernel, OpError, OpResult, axis_of, one};
use crate::torch::table::{ALL, Row};

use super::convolution::{Window, pad_list};

pub(super) const ROWS: &[Row] = &[
    Row::new("", "AveragePool", 7, average_pool).grad(),
    Row::new("", "GlobalAveragePool", 1, |_| global(|x, axes| Ok(x.f_mean_dim(axes, true, None)?))).grad(),
    Row::new("", "GlobalMaxPool", 1, |_| global(|x, axes| Ok(x.f_amax(axes, true)?))).grad(),
    Row::new("", "GridSample", 16, grid_sample).grad(),
    Row::new("", "MaxPool", 8, max_pool).grad(),
    Row::new("", "Resize", 11, resize).host(ALL & !1).grad(),
];

fn global(f: fn(&Tensor, &[i64]) -> OpResult<Tensor>) -> OpResult<Kernel> {
    one(move |args| {
        let x = args.get(0)?;
        let axes: Vec<i64> = (2..x.dim() as i64).collect();
        f(x, &axes)
    })
}

/// The input with its pads, and the plain window over it.
struct Placed {
    padded: Tensor,
    kernel: Vec<i64>,
    strides: Vec<i64>,
    dilations: Vec<i64>,
    before: Vec<i64>,
    after: Vec<i64>,
}

fn place(x: &Tensor, window: &Window, fill: f64, ceil: bool) -> OpResult<Placed> {
    let size = x.size();
    let Some(size) = size.get(2..).filter(|size| !size.is_empty() && size.len() <= 2) else {
        return Err(OpError::new(format!("pooling over an input of shape {size:?} is not supported")));
    };
    let axes = size.len();
    let Some(kernel) = &window.kernel else { return Err(OpError::new("attribute `kernel_shape` is missing")) };
    let kernel = Window::spread(&Some(kernel.clone()), axes, 1)?;
    let strides = Window::spread(&window.strides, axes, 1)?;
    let dilations = Window::spread(&window.dilations, axes, 1)?;
    let (before, mut after) = window.pads(size, &kernel, &strides, &dilations)?;
    if ceil {
        // The last window may reach beyond the pads, when it begins inside the input or the pad before it.
        for axis in 0..axes {
            let extent = dilations[axis] * (kernel[axis] - 1) + 1;
            let span = size[axis] + before[axis] + after[axis] - extent;
            let rest = span.rem_euclid(strides[axis].max(1));
            if rest != 0 && span - rest + strides[axis] < size[axis] + before[axis] {
                after[axis] += strides[axis] - rest;
            }
        }
    }
    let padded = if before.iter().chain(&after).all(|&pad| pad == 0) {
        x.shallow_clone()
    } else {
        x.f_constant_pad_nd_value(pad_list(&before, &after), fill)?
    };
    Ok(Placed { padded, kernel, strides, dilations, before, after })
}

trait PadValue {
    fn f_constant_pad_nd_value(&self, pads: Vec<i64>, value: f64) -> OpResult<Tensor>;
}

impl PadValue for Tensor {
    fn f_constant_pad_nd_value(&self, pads: Vec<i64>, value: f64) -> OpResult<Tensor> {
        Ok(self.f_pad(&pads, "constant", value)?)
    }
}

fn average_pool(b: &mut Build) -> OpResult<Kernel> {
    let window = Window::read(b, b.version >= 19)?;
    let ceil = b.version >= 10 && b.attributes.flag("ceil_mode", false)?;
    let with_pads = b.attributes.flag("count_include_pad", false)?;
    if window.dilations.as_ref().is_some_and(|list| list.iter().any(|&dilation| dilation != 1)) {
        return Err(OpError::new("dilated average pooling is not supported"));
    }
    one(move |args| {
        let x = args.get(0)?;
        let placed = place(x, &window, 0.0, ceil)?;
        let pool = |x: &Tensor| -> OpResult<Tensor> {
            let none = vec![0i64; placed.kernel.len()];
            Ok(match placed.kernel.len() {
                1 => x.f_avg_pool1d(&placed.kernel, &placed.strides, &none, false, true)?,
                _ => x.f_avg_pool2d(&placed.kernel, &placed.strides, &none, false, true, None)?,
            })
        };
        let mean = pool(&placed.padded)?;
        if placed.before.iter().chain(&placed.after).all(|&pad| pad == 0) {
            return Ok(mean);
        }
        // What a window covers that counts: the input, and the declared pads if they are to count.
        let counted = if with_pads {
            let own = Window::spread(&window.pads, 2 * placed.kernel.len(), 0)?;
            let axes = placed.kernel.len();
            let ones = x.f_ones_like()?.f_constant_pad_nd_value(pad_list(&own[..axes], &own[axes..]), 1.0)?;
            let rest: Vec<i64> = placed.after.iter().zip(&own[axes..]).map(|(all, own)| all - own).collect();
            ones.f_constant_pad_nd_value(pad_list(&vec![0; axes], &rest), 0.0)?
        } else {
            x.f_ones_like()?.f_constant_pad_nd_value(pad_list(&placed.before, &placed.after), 0.0)?
        };
        Ok(mean.f_div(&pool(&counted)?)?)
    })
}

fn max_pool(b: &mut Build) -> OpResult<Kernel> {
    let window = Window::read(b, b.version >= 10)?;
    let ceil = b.version >= 10 && b.attributes.flag("ceil_mode", false)?;
    b.attributes.ignore("storage_order");
    b.only_outputs(1)?;
    one(move |args| {
        let placed = place(args.get(0)?, &window, f64::NEG_INFINITY, ceil)?;
        let none = vec![0i64; placed.kernel.len()];
        Ok(match placed.kernel.len() {
            1 => placed.padded.f_max_pool1d(&placed.kernel, &placed.strides, &none, &placed.dilations, false)?,
            _ => placed.padded.f_max_pool2d(&placed.kernel, &placed.strides, &none, &placed.dilations, false)?,
        })
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Coordinates {
    HalfPixel,
    PytorchHalfPixel,
    Asymmetric,
    AlignCorners,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Interpolation {
    Nearest,
    Linear,
    Cubic,
}

struct ResizeSettings {
    coordinates: Coordinates,
    interpolation: Interpolation,
    nearest: String,
    cubic: f64,
    exclude_outside: bool,
    antialias: bool,
    axes: Option<Vec<i64>>,
}

/// Inputs: X, region (unused by the supported modes), scales, sizes. Each axis is resized by a matrix of weights, so any
/// rank works and gradients flow.
fn resize(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    let coordinates = match a.text_or("coordinate_transformation_mode", "half_pixel")? {
        "half_pixel" => Coordinates::HalfPixel,
        "pytorch_half_pixel" => Coordinates::PytorchHalfPixel,
        "asymmetric" => Coordinates::Asymmetric,
        "align_corners" => Coordinates::AlignCorners,
        other => return Err(OpError::new(format!("coordinate_transformation_mode `{other}` is not supported"))),
    };
    let interpolation = match a.text_or("mode", "nearest")? {
        "nearest" => Interpolation::Nearest,
        "linear" => Interpolation::Linear,
        "cubic" => Interpolation::Cubic,
        other => return Err(OpError::new(format!("mode `{other}` is not known"))),
    };
    a.ignore("extrapolation_value");
    if a.text_or("keep_aspect_ratio_policy", "stretch")? != "stretch" {
        return Err(OpError::new("only keep_aspect_ratio_policy `stretch` is supported"));
    }
    let settings = ResizeSettings {
        coordinates,
        interpolation,
        nearest: a.text_or("nearest_mode", "round_prefer_floor")?.to_string(),
        cubic: a.float("cubic_coeff_a", -0.75)?,
        exclude_outside: a.flag("exclude_outside", false)?,
        antialias: a.flag("antialias", false)?,
        axes: a.ints("axes")?,
    };
    if settings.antialias && settings.interpolation == Interpolation::Nearest {
        return Err(OpError::new("`antialias` does not go with mode `nearest`"));
    }
    one(move |args| run_resize(args, &settings))
}

fn run_resize(args: &Args, s: &ResizeSettings) -> OpResult<Tensor> {
    let x = args.get(0)?;
    let rank = x.dim();
    let axes: Vec<i64> = match &s.axes {
        Some(axes) => axes.iter().map(|&axis| axis_of(axis, rank)).collect::<OpResult<_>>()?,
        None => (0..rank as i64).collect(),
    };
    let scales: Option<Vec<f64>> = match args.opt(2).filter(|scales| scales.numel() > 0) {
        Some(scales) => Some(Vec::<f64>::try_from(scales.f_to_kind(Kind::Double)?.f_reshape([-1i64])?)?),
        None => None,
    };
    let sizes = args.ints(3)?.filter(|sizes| !sizes.is_empty());
    let given = scales.as_ref().map(Vec::len).or(sizes.as_ref().map(Vec::len));
    if given != Some(axes.len()) {
        return Err(OpError::new(format!("scales or sizes for {} axes are expected", axes.len())));
    }
    let kind = x.f_kind()?;
    let mut out = x.shallow_clone();
    for (position, &axis) in axes.iter().enumerate() {
        let size = x.size()[axis as usize];
        let (target, scale) = match (&scales, &sizes) {
            (_, Some(sizes)) => (sizes[position], sizes[position] as f64 / size as f64),
            (Some(scales), None) => ((size as f64 * scales[position]).floor() as i64, scales[position]),
            (None, None) => continue,
        };
        if target < 1 || size < 1 || target > 1 << 24 {
            return Err(OpError::new(format!("axis {axis} of {size} cannot become {target}")));
        }
        if target == size && scale == 1.0 {
            continue;
        }
        let matrix = weights(size, target, scale, s)?;
        if s.interpolation == Interpolation::Nearest {
            let index: Vec<i64> = matrix.iter().map(|row| row.first().map_or(0, |entry| entry.0)).collect();
            out = out.f_index_select(axis, &Tensor::f_from_slice(&index)?.f_to_device(x.device())?)?;
            continue;
        }
        if size.checked_mul(target).is_none_or(|count| count > 1 << 28) {
            return Err(OpError::new(format!("axis {axis} of {size} is too large to become {target}")));
        }
        let mut dense = vec![0f64; (size * target) as usize];
        for (row, entries) in matrix.iter().enumerate() {
            for &(column, weight) in entries {
                dense[row * size as usize + column as usize] += weight;
            }
        }
        let matrix =
            Tensor::f_from_slice(&dense)?.f_reshape([target, size])?.f_to_kind(kind)?.f_to_device(x.device())?;
        out = out.f_transpose(axis, -1)?.f_matmul(&matrix.f_transpose(0, 1)?)?.f_transpose(axis, -1)?;
    }
    Ok(out)
}

/// For each output place, the input places and their weights.
fn weights(size: i64, target: i64, scale: f64, s: &ResizeSettings) -> OpResult<Vec<Vec<(i64, f64)>>> {
    (0..target)
        .map(|place| {
            let at = place as f64;
            let source = match s.coordinates {
                Coordinates::HalfPixel => (at + 0.5) / scale - 0.5,
                Coordinates::PytorchHalfPixel => {
                    if target > 1 {
                        (at + 0.5) / scale - 0.5
                    } else {
                        0.0
                    }
                }
                Coordinates::Asymmetric => at / scale,
                Coordinates::AlignCorners => {
                    if target > 1 {
                        at * (size - 1) as f64 / (target - 1) as f64
                    } else {
                        0.0
                    }
                }
            };
            if s.interpolation == Interpolation::Nearest {
                let nearest = match s.nearest.as_str() {
                    "round_prefer_floor" => (source - 0.5).ceil(),
                    "round_prefer_ceil" => (source + 0.5).floor(),
                    "floor" => source.floor(),
                    "ceil" => source.ceil(),
                    other => return Err(OpError::new(format!("nearest_mode `{other}` is not known"))),
                };
                return Ok(vec![((nearest as i64).clamp(0, size - 1), 1.0)]);
            }
            // Antialiasing widens the filter by the factor of the reduction.
            let stretch = if s.antialias && scale < 1.0 { scale } else { 1.0 };
            let reach = (if s.interpolation == Interpolation::Linear { 1.0 } else { 2.0 }) / stretch;
            let (first, last) = ((source - reach).floor() as i64 + 1, (source + reach).ceil() as i64 - 1);
            let mut entries = Vec::new();
            let mut sum = 0.0;
            for column in first..=last {
                let outside = !(0..size).contains(&column);
                if outside && s.exclude_outside {
                    continue;
                }
                let distance = (column as f64 - source).abs() * stretch;
                let weight = if s.interpolation == Interpolation::Linear {
                    (1.0 - distance).max(0.0)
                } else {
                    cubic(distance, s.cubic)
                };
                sum += weight;
                entries.push((column.clamp(0, size - 1), weight));
            }
            if sum != 0.0 {
                for entry in &mut entries {
                    entry.1 /= sum;
                }
            }
            Ok(entries)
        })
        .collect()
}

/// Keys' cubic convolution kernel with parameter `a`.
fn cubic(distance: f64, a: f64) -> f64 {
    let d = distance;
    if d <= 1.0 {
        ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0
    } else if d < 2.0 {
        ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a
    } else {
        0.0
    }
}

/// The input at the places of a grid, whose coordinates run from -1 to 1 and name the last axis first.
///
/// Shapes: x `[N, C, H, W]`, grid `[N, P, Q, 2]` -> `[N, C, P, Q]`; with a depth before the height, and 3, likewise.
/// Source: ONNX GridSample-16 to -22, whose modes are those of PyTorch's `grid_sample`.
fn grid_sample(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    // PyTorch's numbers of the modes.
    let interpolation = match a.text_or("mode", "linear")? {
        "linear" | "bilinear" => 0,
        "nearest" => 1,
        "cubic" | "bicubic" => 2,
        other => return Err(OpError::new(format!("mode `{other}` is not known"))),
    };
    let padding = match a.text_or("padding_mode", "zeros")? {
        "zeros" => 0,
        "border" => 1,
        "reflection" => 2,
        other => return Err(OpError::new(format!("padding_mode `{other}` is not known"))),
    };
    let corners = a.flag("align_corners", false)?;
    one(move |args| {
        let (x, grid) = (args.get(0)?, args.get(1)?);
        if !(4..=5).contains(&x.dim()) || x.dim() == 5 && interpolation == 2 {
            return Err(OpError::new(format!("sampling of shape {:?} in this mode is not supported", x.size())));
        }
        Ok(x.f_grid_sampler(&grid.f_to_kind(x.f_kind()?)?, interpolation, padding, corners)?)
    })
}
