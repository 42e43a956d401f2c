//! Concatenation, slicing, padding and repetition.

use tch::Tensor;

use crate::torch::kernel::{Args, Build, Kernel, LARGEST, OpError, OpResult, axis_of, list_on, many, one};
use crate::torch::operator::{ALL, Operator};

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "Concat", 4, concat).grad(),
    Operator::new("", "DepthToSpace", 1, depth_to_space).grad(),
    Operator::new("", "Dropout", 7, dropout).host(0b110).grad(),
    Operator::new("", "Pad", 2, pad).host(ALL & !1).grad(),
    Operator::new("", "Slice", 1, slice).host(ALL & !1).grad(),
    Operator::new("", "SpaceToDepth", 1, space_to_depth).grad(),
    Operator::new("", "Split", 2, split).host(0b10).grad(),
    Operator::new("", "Tile", 6, |_| one(tile)).host(0b10).grad(),
    Operator::new("", "Trilu", 14, trilu).host(0b10).grad(),
];

fn concat(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int_required("axis")?;
    one(move |args| {
        let parts: Vec<&Tensor> = args.all().collect();
        let Some(first) = parts.first() else { return Err(OpError::new("there is nothing to join")) };
        let axis = axis_of(axis, first.dim())?;
        if let Some(other) = parts.iter().find(|part| part.dim() != first.dim()) {
            return Err(OpError::new(format!("ranks {} and {} do not join", first.dim(), other.dim())));
        }
        // Empty caches are skipped, so that a first pass copies nothing.
        let mut filled = parts.iter().filter(|part| part.size().get(axis as usize) != Some(&0));
        if let (Some(only), None) = (filled.next(), filled.next()) {
            return Ok(only.shallow_clone());
        }
        Ok(Tensor::f_cat(&parts, axis)?)
    })
}

/// Inference only: the unchanged input and a mask.
fn dropout(b: &mut Build) -> OpResult<Kernel> {
    b.attributes.ignore("ratio");
    b.attributes.ignore("seed");
    let (mask, version) = (b.wants(1), b.version);
    many(move |args| {
        let x = args.get(0)?;
        if args.int(2)?.unwrap_or(0) != 0 {
            return Err(OpError::new("dropout in training mode is not supported"));
        }
        let mut out = vec![x.shallow_clone()];
        if mask {
            // Before version 12 the mask is undefined for inference; ONNX Runtime gives zeros.
            let kept = if version >= 12 { x.f_ones_like()? } else { x.f_zeros_like()? };
            out.push(if version >= 10 { kept.f_to_kind(tch::Kind::Bool)? } else { kept });
        }
        Ok(out)
    })
}

/// Pads before and after each axis; negative pads crop.
fn pad(b: &mut Build) -> OpResult<Kernel> {
    let mode = b.attributes.text_or("mode", "constant")?.to_string();
    if !["constant", "reflect", "edge", "wrap"].contains(&mode.as_str()) {
        return Err(OpError::new(format!("mode `{mode}` is not supported")));
    }
    let fixed = if b.version < 11 {
        let pads = b.attributes.ints("pads")?.ok_or_else(|| OpError::new("attribute `pads` is missing"))?;
        Some((pads, b.attributes.float("value", 0.0)?))
    } else {
        None
    };
    one(move |args| {
        let mut x = args.get(0)?.shallow_clone();
        let rank = x.dim();
        let (pads, value) = match &fixed {
            Some((pads, value)) => (pads.clone(), *value),
            None => (args.ints_required(1)?, args.float(2)?.unwrap_or(0.0)),
        };
        let axes: Vec<i64> = match args.ints(3)? {
            Some(axes) => axes.iter().map(|&axis| axis_of(axis, rank)).collect::<OpResult<_>>()?,
            None => (0..rank as i64).collect(),
        };
        if pads.len() != 2 * axes.len() {
            return Err(OpError::new(format!("{} pads for {} axes", pads.len(), axes.len())));
        }
        for (position, &axis) in axes.iter().enumerate() {
            let (before, after) = (pads[position], pads[axes.len() + position]);
            if before != 0 || after != 0 {
                x = pad_axis(&x, axis, before, after, &mode, value)?;
            }
        }
        Ok(x)
    })
}

fn pad_axis(x: &Tensor, axis: i64, before: i64, after: i64, mode: &str, value: f64) -> OpResult<Tensor> {
    if [before, after].iter().any(|pad| pad.unsigned_abs() > LARGEST as u64) {
        return Err(OpError::new(format!("pads of {before} and {after} are out of range")));
    }
    let size = x.size()[axis as usize];
    let cut = x.f_narrow(axis, (-before).max(0), (size + before.min(0) + after.min(0)).max(0))?;
    let (before, after) = (before.max(0), after.max(0));
    if mode == "constant" {
        let filled = |count: i64| -> OpResult<Tensor> {
            let mut size = cut.size();
            size[axis as usize] = count;
            Ok(Tensor::f_full(&size, value, (cut.f_kind()?, cut.device()))?)
        };
        return Ok(Tensor::f_cat(&[filled(before)?, cut.shallow_clone(), filled(after)?], axis)?);
    }
    let size = cut.size()[axis as usize];
    let source = |position: i64| -> OpResult<i64> {
        match mode {
            "edge" if size > 0 => Ok(position.clamp(0, size - 1)),
            "wrap" if size > 0 => Ok(position.rem_euclid(size)),
            "reflect" if size > 1 => {
                let period = 2 * (size - 1);
                let place = position.rem_euclid(period);
                Ok(place.min(period - place))
            }
            "reflect" if size == 1 => Ok(0),
            _ => Err(OpError::new("an empty axis cannot be padded from itself")),
        }
    };
    let index: Vec<i64> = (-before..size + after).map(source).collect::<OpResult<_>>()?;
    let index = list_on(&index, cut.device())?;
    Ok(cut.f_index_select(axis, &index)?)
}

/// Negative starts and ends count from the end and are clamped; a negative step reverses the direction.
fn slice(b: &mut Build) -> OpResult<Kernel> {
    let fixed = if b.version < 10 {
        let read = |name: &str| b.attributes.ints(name);
        let missing = |name: &str| OpError::new(format!("attribute `{name}` is missing"));
        let starts = read("starts")?.ok_or_else(|| missing("starts"))?;
        let ends = read("ends")?.ok_or_else(|| missing("ends"))?;
        Some((starts, ends, read("axes")?))
    } else {
        None
    };
    one(move |args| {
        let (starts, ends, axes, steps) = match &fixed {
            Some((starts, ends, axes)) => (starts.clone(), ends.clone(), axes.clone(), None),
            None => (args.ints_required(1)?, args.ints_required(2)?, args.ints(3)?, args.ints(4)?),
        };
        let mut x = args.get(0)?.shallow_clone();
        let rank = x.dim();
        let axes = axes.unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = steps.unwrap_or_else(|| vec![1; starts.len()]);
        if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] {
            return Err(OpError::new("starts, ends, axes and steps differ in length"));
        }
        for (((&start, &end), &axis), &step) in starts.iter().zip(&ends).zip(&axes).zip(&steps) {
            let axis = axis_of(axis, rank)?;
            x = slice_axis(&x, axis, start, end, step)?;
        }
        Ok(x)
    })
}

fn slice_axis(x: &Tensor, axis: i64, start: i64, end: i64, step: i64) -> OpResult<Tensor> {
    let size = x.size()[axis as usize];
    // ONNX Runtime treats the largest integer as the end in either direction.
    let to_the_end = step < 0 && (end == i64::MAX || end == i64::from(i32::MAX));
    let end = if to_the_end { i64::MIN } else { end };
    let place = |position: i64| if position < 0 { position.saturating_add(size) } else { position };
    match step {
        0 => Err(OpError::new("a step is 0")),
        1.. => {
            let (start, end) = (place(start).clamp(0, size), place(end).clamp(0, size));
            if start == 0 && end == size && step == 1 {
                return Ok(x.shallow_clone());
            }
            Ok(x.f_slice(axis, start, end.max(start), step)?)
        }
        _ => {
            // A start before the first element is clamped to it; an end before the first element includes it.
            let (start, end) = (place(start).clamp(0, (size - 1).max(0)), place(end).clamp(-1, size - 1));
            let count = if size > 0 && start > end { (start - end - 1) / step.saturating_neg() + 1 } else { 0 };
            let index: Vec<i64> = (0..count).map(|i| start + i * step).collect();
            let index = list_on(&index, x.device())?;
            Ok(x.f_index_select(axis, &index)?)
        }
    }
}

/// Sizes from the attribute (before version 13) or from input 1; otherwise equal parts, with a smaller last one for
/// `num_outputs`.
fn split(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", 0)?;
    let by_input = b.version >= 13;
    let fixed = if by_input { None } else { b.attributes.ints("split")? };
    let declared = if b.version >= 18 { b.attributes.int_opt("num_outputs")? } else { None };
    let parts = declared.unwrap_or(b.outputs.len() as i64);
    if parts != b.outputs.len() as i64 || parts == 0 {
        return Err(OpError::new(format!("num_outputs is {parts} and there are {} outputs", b.outputs.len())));
    }
    let uneven = declared.is_some();
    many(move |args| {
        let x = args.get(0)?;
        let axis = axis_of(axis, x.dim())?;
        let size = x.size()[axis as usize];
        let given = if by_input { args.ints(1)? } else { fixed.clone() };
        let sizes = match given {
            Some(sizes) => sizes,
            None if size % parts == 0 => vec![size / parts; parts as usize],
            None if uneven => {
                let chunk = (size + parts - 1) / parts;
                (0..parts).map(|part| (size - part * chunk).clamp(0, chunk)).collect()
            }
            None => return Err(OpError::new(format!("axis of {size} does not split into {parts} equal parts"))),
        };
        if sizes.iter().any(|&part| part < 0)
            || sizes.iter().try_fold(0i64, |sum, &part| sum.checked_add(part)) != Some(size)
            || sizes.len() as i64 != parts
        {
            return Err(OpError::new(format!("sizes {sizes:?} do not split an axis of {size} into {parts}")));
        }
        Ok(x.f_split_with_sizes(&sizes, axis)?)
    })
}

fn tile(args: &Args) -> OpResult<Tensor> {
    let x = args.get(0)?;
    let repeats = args.ints_required(1)?;
    if repeats.len() != x.dim() || repeats.iter().any(|&count| count < 0) {
        return Err(OpError::new(format!("repeats {repeats:?} do not fit rank {}", x.dim())));
    }
    Ok(x.f_repeat(&repeats)?)
}

fn trilu(b: &mut Build) -> OpResult<Kernel> {
    let upper = b.attributes.flag("upper", true)?;
    one(move |args| {
        let x = args.get(0)?;
        let diagonal = args.int(1)?.unwrap_or(0);
        Ok(if upper { x.f_triu(diagonal)? } else { x.f_tril(diagonal)? })
    })
}

/// `[N, C, H, W] -> [N, C / (b * b), H * b, W * b]`.
fn depth_to_space(b: &mut Build) -> OpResult<Kernel> {
    let block = b.attributes.int_required("blocksize")?;
    let depth_first = match b.attributes.text_or("mode", "DCR")? {
        "DCR" => true,
        "CRD" => false,
        other => return Err(OpError::new(format!("mode `{other}` is not supported"))),
    };
    if !(1..=1 << 15).contains(&block) {
        return Err(OpError::new(format!("attribute `blocksize` is {block}")));
    }
    one(move |args| {
        let x = args.get(0)?;
        let (n, c, h, w) = x.size4()?;
        let depth = c / (block * block);
        let (split, order) = if depth_first {
            ([n, block, block, depth, h, w], [0i64, 3, 4, 1, 5, 2])
        } else {
            ([n, depth, block, block, h, w], [0i64, 1, 4, 2, 5, 3])
        };
        Ok(x.f_reshape(split)?.f_permute(order)?.f_reshape([n, depth, h * block, w * block])?)
    })
}

/// `[N, C, H, W] -> [N, C * b * b, H / b, W / b]`.
fn space_to_depth(b: &mut Build) -> OpResult<Kernel> {
    let block = b.attributes.int_required("blocksize")?;
    if !(1..=1 << 15).contains(&block) {
        return Err(OpError::new(format!("attribute `blocksize` is {block}")));
    }
    one(move |args| {
        let x = args.get(0)?;
        let (n, c, h, w) = x.size4()?;
        let cut = x.f_reshape([n, c, h / block, block, w / block, block])?;
        Ok(cut.f_permute([0i64, 3, 5, 1, 2, 4])?.f_reshape([n, c * block * block, h / block, w / block])?)
    })
}
