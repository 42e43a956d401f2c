//! Convolutions over one to three spatial axes.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Build, Kernel, LARGEST, OpError, OpResult, one};
use crate::torch::operator::Operator;
use crate::torch::products::lowered;

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "Conv", 1, |b| convolution(b, false)).grad(),
    Operator::new("", "ConvInteger", 10, convolution_of_integers),
    Operator::new("", "ConvTranspose", 1, |b| convolution(b, true)).grad(),
];

/// Geometry of a window over the spatial axes.
pub(super) struct Window {
    pub kernel: Option<Vec<i64>>,
    pub strides: Option<Vec<i64>>,
    pub dilations: Option<Vec<i64>>,
    pub pads: Option<Vec<i64>>,
    pub auto_pad: AutoPad,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum AutoPad {
    NotSet,
    Valid,
    SameUpper,
    SameLower,
}

impl Window {
    pub fn read(b: &Build, dilations: bool) -> OpResult<Window> {
        let a = b.attributes;
        let auto_pad = match a.text_or("auto_pad", "NOTSET")? {
            "NOTSET" | "" => AutoPad::NotSet,
            "VALID" => AutoPad::Valid,
            "SAME_UPPER" => AutoPad::SameUpper,
            "SAME_LOWER" => AutoPad::SameLower,
            other => return Err(OpError::new(format!("auto_pad `{other}` is not known"))),
        };
        for name in ["kernel_shape", "strides", "dilations", "pads", "output_padding"] {
            let known = a.peek(name).and_then(|list| list.as_ints());
            if known.is_some_and(|list| list.iter().any(|value| value.unsigned_abs() > LARGEST as u64)) {
                return Err(OpError::new(format!("attribute `{name}` is out of range")));
            }
        }
        Ok(Window {
            kernel: a.ints("kernel_shape")?,
            strides: a.ints("strides")?,
            dilations: if dilations { a.ints("dilations")? } else { None },
            pads: a.ints("pads")?,
            auto_pad,
        })
    }

    /// A list with one entry per spatial axis.
    pub fn spread(list: &Option<Vec<i64>>, axes: usize, default: i64) -> OpResult<Vec<i64>> {
        match list {
            None => Ok(vec![default; axes]),
            Some(list) if list.len() == axes => Ok(list.clone()),
            Some(list) => Err(OpError::new(format!("{} entries for {axes} spatial axes", list.len()))),
        }
    }

    /// Pads before and after each spatial axis.
    pub fn pads(
        &self,
        input: &[i64],
        kernel: &[i64],
        strides: &[i64],
        dilations: &[i64],
    ) -> OpResult<(Vec<i64>, Vec<i64>)> {
        let axes = input.len();
        match self.auto_pad {
            AutoPad::Valid => Ok((vec![0; axes], vec![0; axes])),
            AutoPad::NotSet => {
                let pads = Self::spread(&self.pads, 2 * axes, 0)?;
                Ok((pads[..axes].to_vec(), pads[axes..].to_vec()))
            }
            same => {
                let (mut before, mut after) = (Vec::new(), Vec::new());
                for axis in 0..axes {
                    let stride = strides[axis].max(1);
                    let out = (input[axis] + stride - 1) / stride;
                    let extent = dilations[axis] * (kernel[axis] - 1) + 1;
                    let total = ((out - 1) * stride + extent - input[axis]).max(0);
                    let small = total / 2;
                    let (first, last) =
                        if same == AutoPad::SameUpper { (small, total - small) } else { (total - small, small) };
                    before.push(first);
                    after.push(last);
                }
                Ok((before, after))
            }
        }
    }
}

/// LibTorch's pad list: last axis first, before and after each.
pub(super) fn pad_list(before: &[i64], after: &[i64]) -> Vec<i64> {
    before.iter().zip(after).rev().flat_map(|(&before, &after)| [before, after]).collect()
}

/// Shapes: x `[N, C, ..]`, weight `[M, C / group, ..]` (transposed: `[C, M / group, ..]`), bias `[M]` -> `[N, M, ..]`.
fn convolution(b: &mut Build, transposed: bool) -> OpResult<Kernel> {
    let window = Window::read(b, true)?;
    let group = b.attributes.int("group", 1)?;
    let given = |name: &str| if transposed { b.attributes.ints(name) } else { Ok(None) };
    let (output_padding, output_shape) = (given("output_padding")?, given("output_shape")?);
    let cast = b.autocast;
    one(move |args| {
        let (x, weight) = (lowered(args.get(0)?, cast)?, lowered(args.get(1)?, cast)?);
        let bias = args.opt(2).map(|bias| lowered(bias, cast)).transpose()?;
        if transposed {
            return spread_out(&x, &weight, bias.as_ref(), &window, &output_padding, &output_shape, group);
        }
        convolve(&x, &weight, bias.as_ref(), &window, group)
    })
}

/// Shapes: x `[N, C, ..]`, weight `[M, C / group, ..]`, zero point of x a scalar, zero point of the weight a scalar or
/// `[M]` -> `[N, M, ..]`.
///
/// Padding uses the value of x's zero point.
fn convolution_of_integers(b: &mut Build) -> OpResult<Kernel> {
    let window = Window::read(b, true)?;
    let group = b.attributes.int("group", 1)?;
    one(move |args| {
        let (x, weight) = (args.get(0)?, args.get(1)?);
        let one_for_all = |zero: &Tensor| zero.f_reshape([0i64; 0]);
        let x = centred(x, args.opt(2).map(one_for_all).transpose()?.as_ref())?;
        let per_kernel = |zero: &Tensor| {
            if zero.numel() == 1 {
                return one_for_all(zero);
            }
            let mut shape = vec![1i64; weight.dim()];
            if let Some(first) = shape.first_mut() {
                *first = zero.numel() as i64;
            }
            zero.f_reshape(&shape)
        };
        let weight = centred(weight, args.opt(3).map(per_kernel).transpose()?.as_ref())?;
        Ok(convolve(&x, &weight, None, &window, group)?.f_to_kind(Kind::Int)?)
    })
}

/// The window of a convolution, resolved for an input's size.
struct Placed {
    size: Vec<i64>,
    kernel: Vec<i64>,
    strides: Vec<i64>,
    dilations: Vec<i64>,
}

fn place(x: &Tensor, weight: &Tensor, window: &Window) -> OpResult<Placed> {
    let (size, kernel) = (x.size(), weight.size());
    if size.len() < 3 || size.len() != kernel.len() {
        return Err(OpError::new(format!("input {size:?} and weight {kernel:?} do not convolve")));
    }
    let (size, kernel) = (size[2..].to_vec(), kernel[2..].to_vec());
    if window.kernel.as_ref().is_some_and(|declared| *declared != kernel) {
        return Err(OpError::new(format!("kernel_shape differs from the weight's {kernel:?}")));
    }
    let strides = Window::spread(&window.strides, size.len(), 1)?;
    let dilations = Window::spread(&window.dilations, size.len(), 1)?;
    Ok(Placed { size, kernel, strides, dilations })
}

fn convolve(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, window: &Window, group: i64) -> OpResult<Tensor> {
    let Placed { size, kernel, strides, dilations } = place(x, weight, window)?;
    let (before, after) = window.pads(&size, &kernel, &strides, &dilations)?;
    let none = vec![0i64; size.len()];
    if before == after {
        return Ok(x.f_convolution(weight, bias, &strides, &before, &dilations, false, &none, group)?);
    }
    let padded = x.f_constant_pad_nd(pad_list(&before, &after))?;
    Ok(padded.f_convolution(weight, bias, &strides, &none, &dilations, false, &none, group)?)
}

/// The transposed form, in which pads crop the result.
///
/// Source: ONNX ConvTranspose, its formulas for the pads of `auto_pad` and `output_shape`.
fn spread_out(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    window: &Window,
    output_padding: &Option<Vec<i64>>,
    output_shape: &Option<Vec<i64>>,
    group: i64,
) -> OpResult<Tensor> {
    let Placed { size, kernel, strides, dilations } = place(x, weight, window)?;
    let axes = size.len();
    let whole = |axis: usize, extra: &[i64]| {
        strides[axis] * (size[axis] - 1) + extra[axis] + dilations[axis] * (kernel[axis] - 1) + 1
    };
    let mut extra = Window::spread(output_padding, axes, 0)?;
    let wanted = match (output_shape, window.auto_pad) {
        // Batch and channels may be included.
        (Some(shape), _) if shape.len() == axes + 2 => Some(shape[2..].to_vec()),
        (Some(_), _) => Some(Window::spread(output_shape, axes, 0)?),
        (None, AutoPad::SameUpper | AutoPad::SameLower) => {
            Some(size.iter().zip(&strides).map(|(size, stride)| size * stride).collect())
        }
        (None, AutoPad::NotSet | AutoPad::Valid) => None,
    };
    if let Some(wanted) = &wanted {
        // A requested result larger than the computed one is padded at the end.
        for axis in 0..axes {
            extra[axis] = extra[axis].saturating_add((wanted[axis].saturating_sub(whole(axis, &extra))).max(0));
        }
    }
    let (before, after): (Vec<i64>, Vec<i64>) = match wanted {
        None => window.pads(&size, &kernel, &strides, &dilations)?,
        Some(wanted) => {
            let pads = |axis: usize| {
                if wanted[axis] < 1 {
                    let problem = format!("axis {axis} of {} cannot become {}", size[axis], wanted[axis]);
                    return Err(OpError::new(problem));
                }
                let total = whole(axis, &extra) - wanted[axis];
                let (small, large) = (total / 2, total - total / 2);
                Ok(if window.auto_pad == AutoPad::SameUpper { (small, large) } else { (large, small) })
            };
            (0..axes).map(pads).collect::<OpResult<Vec<_>>>()?.into_iter().unzip()
        }
    };
    if before == after {
        return Ok(x.f_convolution(weight, bias, &strides, &before, &dilations, true, &extra, group)?);
    }
    let none = vec![0i64; axes];
    let mut out = x.f_convolution(weight, bias, &strides, &none, &dilations, true, &extra, group)?;
    for axis in 0..axes {
        let left = whole(axis, &extra) - before[axis] - after[axis];
        if left < 1 {
            return Err(OpError::new(format!("pads of {} and {} leave nothing", before[axis], after[axis])));
        }
        out = out.f_narrow(axis as i64 + 2, before[axis], left)?;
    }
    Ok(out)
}

/// The kind for matrix products of integers: exact up to 2^53 and fast on every machine.
pub(super) const EXACT: Kind = Kind::Double;

/// A tensor minus its zero point, computed exactly in [`EXACT`].
pub(super) fn centred(x: &Tensor, zero: Option<&Tensor>) -> OpResult<Tensor> {
    let wide = x.f_to_kind(EXACT)?;
    Ok(match zero {
        Some(zero) => wide.f_sub(&zero.f_to_kind(EXACT)?)?,
        None => wide,
    })
}
