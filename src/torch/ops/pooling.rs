//! Pooling, and sampling at the points of a grid.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Build, Kernel, OpError, OpResult, is_float, list_on, one};
use crate::torch::operator::Operator;

use super::convolution::{Window, pad_list};

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "AveragePool", 7, average_pool).grad(),
    Operator::new("", "GlobalAveragePool", 1, |_| global(|x, axes| Ok(x.f_mean_dim(axes, true, None)?))).grad(),
    Operator::new("", "GlobalMaxPool", 1, |_| global(|x, axes| Ok(x.f_amax(axes, true)?))).grad(),
    Operator::new("", "GridSample", 16, grid_sample).grad(),
    Operator::new("", "MaxPool", 8, max_pool).grad(),
];

fn global(f: fn(&Tensor, &[i64]) -> OpResult<Tensor>) -> OpResult<Kernel> {
    one(move |args| {
        let x = args.get(0)?;
        let axes: Vec<i64> = (2..x.dim() as i64).collect();
        f(x, &axes)
    })
}

/// The padded input, and the window resolved for its size.
struct Placed {
    padded: Tensor,
    kernel: Vec<i64>,
    strides: Vec<i64>,
    dilations: Vec<i64>,
    before: Vec<i64>,
    /// End pads, without the part of a last window beyond them.
    after: Vec<i64>,
    /// Elements by which the last window extends past the end pads.
    beyond: Vec<i64>,
}

impl Placed {
    /// True when all windows are inside the input.
    fn is_unpadded(&self) -> bool {
        self.before.iter().chain(&self.after).chain(&self.beyond).all(|&pad| pad == 0)
    }
}

fn place(x: &Tensor, window: &Window, fill: f64, ceil: bool) -> OpResult<Placed> {
    let size = x.size();
    let Some(size) = size.get(2..).filter(|size| !size.is_empty() && size.len() <= 3) else {
        return Err(OpError::new(format!("pooling over an input of shape {size:?} is not supported")));
    };
    let axes = size.len();
    let Some(kernel) = &window.kernel else { return Err(OpError::new("attribute `kernel_shape` is missing")) };
    let kernel = Window::spread(&Some(kernel.clone()), axes, 1)?;
    let strides = Window::spread(&window.strides, axes, 1)?;
    let dilations = Window::spread(&window.dilations, axes, 1)?;
    let (before, after) = window.pads(size, &kernel, &strides, &dilations)?;
    let mut beyond = vec![0; axes];
    if ceil {
        // The last window may extend past the end pads if it starts inside the input or its leading pads.
        for axis in 0..axes {
            let extent = dilations[axis] * (kernel[axis] - 1) + 1;
            let span = size[axis] + before[axis] + after[axis] - extent;
            let rest = span.rem_euclid(strides[axis].max(1));
            if rest != 0 && span - rest + strides[axis] < size[axis] + before[axis] {
                beyond[axis] = strides[axis] - rest;
            }
        }
    }
    let mut placed = Placed { padded: x.shallow_clone(), kernel, strides, dilations, before, after, beyond };
    if !placed.is_unpadded() {
        let behind: Vec<i64> = placed.after.iter().zip(&placed.beyond).map(|(after, beyond)| after + beyond).collect();
        placed.padded = x.f_pad(pad_list(&placed.before, &behind), "constant", fill)?;
    }
    Ok(placed)
}

fn average_pool(b: &mut Build) -> OpResult<Kernel> {
    let window = Window::read(b, b.version >= 19)?;
    let ceil = b.version >= 10 && b.attributes.flag("ceil_mode", false)?;
    let with_pads = b.attributes.flag("count_include_pad", false)?;
    one(move |args| {
        let x = args.get(0)?;
        let placed = place(x, &window, 0.0, ceil)?;
        let mean = mean_of_windows(&placed.padded, &placed)?;
        if placed.is_unpadded() {
            return Ok(mean);
        }
        // Fraction of each window that counts: the input, and the pads with `count_include_pad`.
        let ones = x.f_ones_like()?;
        let inside = f64::from(u8::from(with_pads));
        let counted = ones.f_pad(pad_list(&placed.before, &placed.after), "constant", inside)?;
        let none = vec![0; placed.beyond.len()];
        let counted = counted.f_pad(pad_list(&none, &placed.beyond), "constant", 0.0)?;
        Ok(mean.f_div(&mean_of_windows(&counted, &placed)?)?)
    })
}

/// The mean over each window of a padded input.
fn mean_of_windows(x: &Tensor, placed: &Placed) -> OpResult<Tensor> {
    let (kernel, strides) = (&placed.kernel, &placed.strides);
    let none = vec![0i64; kernel.len()];
    if placed.dilations.iter().any(|&dilation| dilation != 1) {
        // Each channel separately, with equal weights.
        let size = x.size();
        let alone = x.f_reshape([&[size[0] * size[1], 1], &size[2..]].concat())?;
        let count: i64 = kernel.iter().product();
        let weight = Tensor::f_ones([&[1, 1], &kernel[..]].concat(), (x.f_kind()?, x.device()))?;
        let weight = weight.f_div_scalar(count as f64)?;
        let bias = None::<&Tensor>;
        let out = alone.f_convolution(&weight, bias, strides, &none, &placed.dilations, false, &none, 1)?;
        let made = out.size();
        return Ok(out.f_reshape([&size[..2], &made[2..]].concat())?);
    }
    Ok(match kernel.len() {
        1 => x.f_avg_pool1d(kernel, strides, &none, false, true)?,
        2 => x.f_avg_pool2d(kernel, strides, &none, false, true, None)?,
        _ => x.f_avg_pool3d(kernel, strides, &none, false, true, None)?,
    })
}

fn max_pool(b: &mut Build) -> OpResult<Kernel> {
    let window = Window::read(b, b.version >= 10)?;
    let ceil = b.version >= 10 && b.attributes.flag("ceil_mode", false)?;
    b.attributes.ignore("storage_order");
    b.only_outputs(1)?;
    one(move |args| {
        let x = args.get(0)?;
        let kind = x.f_kind()?;
        // Integers have no minus infinity for the pads; f32 represents 8-bit integers exactly.
        let floats = match kind {
            kind if is_float(kind) => x.shallow_clone(),
            Kind::Uint8 | Kind::Int8 => x.f_to_kind(Kind::Float)?,
            other => return Err(OpError::new(format!("pooling of {other:?} is not supported"))),
        };
        let Placed { padded, kernel, strides, dilations, .. } = place(&floats, &window, f64::NEG_INFINITY, ceil)?;
        let none = vec![0i64; kernel.len()];
        let out = match kernel.len() {
            1 => padded.f_max_pool1d(&kernel, &strides, &none, &dilations, false)?,
            2 => padded.f_max_pool2d(&kernel, &strides, &none, &dilations, false)?,
            _ => padded.f_max_pool3d(&kernel, &strides, &none, &dilations, false)?,
        };
        Ok(out.f_to_kind(kind)?)
    })
}

/// The input at the points of a grid. Coordinates range from -1 to 1, the last axis first.
///
/// Shapes: x `[N, C, H, W]`, grid `[N, P, Q, 2]` -> `[N, C, P, Q]`; in 3-D, x has a depth before the height and the
/// grid 3 coordinates.
/// Source: ONNX GridSample-16 to -22, whose modes are those of PyTorch's `grid_sample`.
fn grid_sample(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    // PyTorch's numbers for the modes.
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
        let mut grid = grid.f_to_kind(x.f_kind()?)?;
        if (interpolation, padding, corners) == (1, 2, false) {
            grid = at_pixels(&grid, &x.size()[2..])?;
        }
        Ok(x.f_grid_sampler(&grid, interpolation, padding, corners)?)
    })
}

/// Rounds points to the nearest pixel, ties to even. ONNX rounds before it reflects a point, PyTorch after, which
/// selects another pixel when the reflection turns an even number into an odd one.
fn at_pixels(grid: &Tensor, size: &[i64]) -> OpResult<Tensor> {
    let lengths: Vec<f64> = size.iter().rev().map(|&length| length as f64).collect();
    let lengths = list_on(&lengths, grid.device())?.f_to_kind(grid.f_kind()?)?;
    let pixel = grid.f_add_scalar(1.0)?.f_mul(&lengths)?.f_sub_scalar(1.0)?.f_div_scalar(2.0)?.f_round()?;
    Ok(pixel.f_mul_scalar(2.0)?.f_add_scalar(1.0)?.f_div(&lengths)?.f_sub_scalar(1.0)?)
}
