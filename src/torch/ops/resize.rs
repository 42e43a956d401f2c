//! Resizing.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Args, Build, Kernel, OpError, OpResult, axis_of, is_float, list_on, moved_to, one};
use crate::torch::operator::{ALL, Operator};

pub(super) const ROWS: &[Operator] = &[Operator::new("", "Resize", 11, resize).host(ALL & !1).grad()];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Coordinates {
    HalfPixel,
    HalfPixelSymmetric,
    PytorchHalfPixel,
    Asymmetric,
    AlignCorners,
}

/// Policy for sizes that would change the aspect ratio.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ratio {
    Stretch,
    /// The smallest factor for all axes.
    NotLarger,
    /// The largest factor for all axes.
    NotSmaller,
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
    ratio: Ratio,
}

/// Resizing of one axis.
struct Change {
    axis: i64,
    size: i64,
    target: i64,
    scale: f32,
}

/// Inputs: X, region (not used by the supported modes), scales, sizes. Each axis is resized by a matrix of weights, so
/// any rank works and gradients flow.
fn resize(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    let coordinates = match a.text_or("coordinate_transformation_mode", "half_pixel")? {
        "half_pixel" => Coordinates::HalfPixel,
        "half_pixel_symmetric" => Coordinates::HalfPixelSymmetric,
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
    let ratio = match a.text_or("keep_aspect_ratio_policy", "stretch")? {
        "stretch" => Ratio::Stretch,
        "not_larger" => Ratio::NotLarger,
        "not_smaller" => Ratio::NotSmaller,
        other => return Err(OpError::new(format!("keep_aspect_ratio_policy `{other}` is not known"))),
    };
    let settings = ResizeSettings {
        coordinates,
        interpolation,
        nearest: a.text_or("nearest_mode", "round_prefer_floor")?.to_string(),
        cubic: a.float("cubic_coeff_a", -0.75)?,
        exclude_outside: a.flag("exclude_outside", false)?,
        antialias: a.flag("antialias", false)?,
        axes: a.ints("axes")?,
        ratio,
    };
    if settings.antialias && settings.interpolation == Interpolation::Nearest {
        return Err(OpError::new("`antialias` does not go with mode `nearest`"));
    }
    one(move |args| run_resize(args, &settings))
}

fn run_resize(args: &Args, s: &ResizeSettings) -> OpResult<Tensor> {
    let x = args.get(0)?;
    let kind = x.f_kind()?;
    // Weights are fractions, so integers are interpolated in f32.
    let mixed = is_float(kind) || s.interpolation == Interpolation::Nearest;
    let mut out = if mixed { x.shallow_clone() } else { x.f_to_kind(Kind::Float)? };
    let mut changed = false;
    for Change { axis, size, target, scale } in changes(args, s)? {
        if target == size && (scale == 1.0 || size == 0) {
            continue;
        }
        if target < 1 || size < 1 || target > 1 << 24 {
            return Err(OpError::new(format!("axis {axis} of {size} cannot become {target}")));
        }
        changed = true;
        let matrix = weights(size, target, scale, s)?;
        if s.interpolation == Interpolation::Nearest {
            let index: Vec<i64> = matrix.iter().map(|row| row.first().map_or(0, |entry| entry.0)).collect();
            out = out.f_index_select(axis, &list_on(&index, x.device())?)?;
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
        let matrix = Tensor::f_from_slice(&dense)?.f_reshape([target, size])?.f_to_kind(out.f_kind()?)?;
        let matrix = moved_to(&matrix, x.device())?;
        out = out.f_transpose(axis, -1)?.f_matmul(&matrix.f_transpose(0, 1)?)?.f_transpose(axis, -1)?;
    }
    if mixed || !changed { Ok(out.f_to_kind(kind)?) } else { to_integers(&out, kind, s.antialias) }
}

/// Sizes and scales of the axes in the node's `axes`.
///
/// Sizes are computed in f32, as in ONNX Runtime: 3 times 2.3333333 is 7 in f32 and less than 7 in f64.
fn changes(args: &Args, s: &ResizeSettings) -> OpResult<Vec<Change>> {
    let size = args.get(0)?.size();
    let axes: Vec<i64> = match &s.axes {
        Some(axes) => axes.iter().map(|&axis| axis_of(axis, size.len())).collect::<OpResult<_>>()?,
        None => (0..size.len() as i64).collect(),
    };
    let scales: Option<Vec<f32>> = match args.opt(2).filter(|scales| scales.numel() > 0) {
        Some(scales) => Some(Vec::<f32>::try_from(scales.f_to_kind(Kind::Float)?.f_reshape([-1i64])?)?),
        None => None,
    };
    let sizes = args.ints(3)?.filter(|sizes| !sizes.is_empty());
    let given = scales.as_ref().map(Vec::len).or(sizes.as_ref().map(Vec::len));
    if given != Some(axes.len()) {
        return Err(OpError::new(format!("scales or sizes for {} axes are expected", axes.len())));
    }
    let one = |(position, axis): (usize, i64)| {
        let size = size[axis as usize];
        match (&scales, &sizes) {
            (Some(scales), None) => {
                let scale = scales[position];
                Change { axis, size, target: (size as f32 * scale) as i64, scale }
            }
            (_, sizes) => {
                let target = sizes.as_ref().map_or(size, |sizes| sizes[position]);
                Change { axis, size, target, scale: if size == 0 { 1.0 } else { target as f32 / size as f32 } }
            }
        }
    };
    let mut changes: Vec<Change> = axes.into_iter().enumerate().map(one).collect();
    if sizes.is_some() && s.ratio != Ratio::Stretch {
        let all = changes.iter().map(|change| change.scale);
        let scale = if s.ratio == Ratio::NotLarger { all.fold(f32::MAX, f32::min) } else { all.fold(0.0, f32::max) };
        for change in &mut changes {
            (change.scale, change.target) = (scale, (scale * change.size as f32).round() as i64);
        }
    }
    Ok(changes)
}

/// Converts interpolated integers back: ONNX Runtime truncates, and rounds with antialiasing.
fn to_integers(mixed: &Tensor, kind: Kind, antialias: bool) -> OpResult<Tensor> {
    let (low, high) = match kind {
        Kind::Uint8 => (0.0, 255.0),
        Kind::Int8 => (-128.0, 127.0),
        Kind::Int16 => (-32768.0, 32767.0),
        Kind::Int | Kind::Int64 => (f64::from(i32::MIN), f64::from(i32::MAX)),
        other => return Err(OpError::new(format!("resizing {other:?} in this mode is not supported"))),
    };
    let whole = if antialias { mixed.f_add_scalar(0.5)?.f_floor()? } else { mixed.f_trunc()? };
    Ok(whole.f_clamp(low, high)?.f_to_kind(kind)?)
}

/// The input coordinate of an output position, computed in f32 as in ONNX Runtime: small differences
/// decide ties of `nearest`.
fn source_of(place: i64, size: i64, target: i64, scale: f32, coordinates: Coordinates) -> f64 {
    let at = place as f32;
    let half_pixel = || f64::from((at + 0.5) / scale - 0.5);
    match coordinates {
        Coordinates::HalfPixel => half_pixel(),
        Coordinates::HalfPixelSymmetric => {
            let adjustment = target as f32 / (scale * size as f32);
            let offset = size as f32 / 2.0 * (1.0 - adjustment);
            f64::from((f64::from(offset) + (f64::from(at) + 0.5) / f64::from(scale) - 0.5) as f32)
        }
        Coordinates::PytorchHalfPixel | Coordinates::AlignCorners if target <= 1 => 0.0,
        Coordinates::PytorchHalfPixel => half_pixel(),
        Coordinates::Asymmetric => f64::from(at / scale),
        Coordinates::AlignCorners => f64::from(at * (size - 1) as f32 / (target - 1) as f32),
    }
}

/// True for a coordinate half-way between two inputs, with ONNX Runtime's tolerance of 1e-6.
fn is_half_way(source: f64) -> bool {
    (source - source.floor() - 0.5).abs() < 1e-6
}

/// For each output position, the input positions and their weights.
fn weights(size: i64, target: i64, scale: f32, s: &ResizeSettings) -> OpResult<Vec<Vec<(i64, f64)>>> {
    (0..target)
        .map(|place| {
            let source = source_of(place, size, target, scale, s.coordinates);
            if s.interpolation == Interpolation::Nearest {
                let nearest = match s.nearest.as_str() {
                    "round_prefer_floor" if is_half_way(source) => source.floor(),
                    "round_prefer_ceil" if is_half_way(source) => source.ceil(),
                    "round_prefer_floor" | "round_prefer_ceil" => source.round(),
                    "floor" => source.floor(),
                    "ceil" => source.ceil(),
                    other => return Err(OpError::new(format!("nearest_mode `{other}` is not known"))),
                };
                return Ok(vec![((nearest as i64).clamp(0, size - 1), 1.0)]);
            }
            // Antialiasing widens the filter by the reduction factor.
            let stretch = if s.antialias && scale < 1.0 { f64::from(scale) } else { 1.0 };
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
