//! Convolutions over one to three spatial axes.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Build, Kernel, LARGEST, OpError, OpResult, one};
use crate::torch::table::Row;

use super::linear::lowered;

pub(super) const ROWS: &[Row] = &[
    Row::new("", "Conv", 1, |b| convolution(b, false)).grad(),
    Row::new("", "ConvInteger", 10, convolution_of_integers),
    Row::new("", "ConvTranspose", 1, |b| convolution(b, true)).grad(),
];

/// How a window moves over the spatial axes.
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
    let output_padding = if transposed { b.attributes.ints("output_padding")? } else { None };
    if transposed && (b.attributes.get("output_shape").is_some() || window.auto_pad != AutoPad::NotSet) {
        return Err(OpError::new("`output_shape` and `auto_pad` are not supported for the transposed form"));
    }
    let cast = b.autocast;
    one(move |args| {
        let (x, weight) = (lowered(args.get(0)?, cast)?, lowered(args.get(1)?, cast)?);
        let bias = args.opt(2).map(|bias| lowered(bias, cast)).transpose()?;
        convolve(&x, &weight, bias.as_ref(), &window, transposed, &output_padding, group)
    })
}

/// Shapes: x `[N, C, ..]`, weight `[M, C / group, ..]`, zero point of x one, of the weight one or `[M]` -> `[N, M, ..]`.
///
/// Padding stands for x's zero point.
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
        Ok(convolve(&x, &weight, None, &window, false, &None, group)?.f_to_kind(Kind::Int)?)
    })
}

fn convolve(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    window: &Window,
    transposed: bool,
    output_padding: &Option<Vec<i64>>,
    group: i64,
) -> OpResult<Tensor> {
    let (size, kernel) = (x.size(), weight.size());
    if size.len() < 3 || size.len() != kernel.len() {
        return Err(OpError::new(format!("input {size:?} and weight {kernel:?} do not convolve")));
    }
    let (size, kernel) = (&size[2..], &kernel[2..]);
    let axes = size.len();
    if window.kernel.as_ref().is_some_and(|declared| declared != kernel) {
        return Err(OpError::new(format!("kernel_shape differs from the weight's {kernel:?}")));
    }
    let strides = Window::spread(&window.strides, axes, 1)?;
    let dilations = Window::spread(&window.dilations, axes, 1)?;
    let (before, after) = window.pads(size, kernel, &strides, &dilations)?;
    let extra = Window::spread(output_padding, axes, 0)?;
    if before == after {
        return Ok(x.f_convolution(weight, bias, &strides, &before, &dilations, transposed, &extra, group)?);
    }
    if transposed {
        return Err(OpError::new("uneven pads are not supported for the transposed form"));
    }
    let padded = x.f_constant_pad_nd(pad_list(&before, &after))?;
    let none = vec![0i64; axes];
    Ok(padded.f_convolution(weight, bias, &strides, &none, &dilations, false, &none, group)?)
}

/// The kind that matrix products of integers run in: exact up to 2^53 and fast everywhere.
pub(super) const EXACT: Kind = Kind::Double;

/// A tensor minus its zero point, exactly, in [`EXACT`].
pub(super) fn centred(x: &Tensor, zero: Option<&Tensor>) -> OpResult<Tensor> {
    let wide = x.f_to_kind(EXACT)?;
    Ok(match zero {
        Some(zero) => wide.f_sub(&zero.f_to_kind(EXACT)?)?,
        None => wide,
    })
}
