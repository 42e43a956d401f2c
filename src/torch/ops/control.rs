//! Control flow: sub-graphs as blocks.

use tch::{Device, Tensor};

use crate::torch::kernel::{Build, Kernel, OpError, OpResult, axis_of, host_ints, many, moved_to};
use crate::torch::operator::{ALL, Operator};

use super::shape::int_vector;

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "If", 1, if_else).host(ALL).grad(),
    Operator::new("", "Loop", 11, loop_body).host(ALL).grad(),
    Operator::new("", "Scan", 9, scan).host(ALL).grad(),
];

fn if_else(b: &mut Build) -> OpResult<Kernel> {
    let (then_body, else_body) = (b.attributes.body("then_branch")?, b.attributes.body("else_branch")?);
    let then_block = b.bodies.compile(then_body)?;
    let else_block = b.bodies.compile(else_body)?;
    many(move |args| {
        let condition = args.int(0)?.ok_or_else(|| OpError::new("the condition is missing"))?;
        let block = if condition != 0 { &then_block } else { &else_block };
        block.run(args, Vec::new())
    })
}

/// Inputs: trip count (optional), condition (optional), loop-carried values. The body maps (iteration, condition,
/// carried) to (condition, carried, scanned); scanned values are stacked along a new first axis.
fn loop_body(b: &mut Build) -> OpResult<Kernel> {
    let body = b.bodies.compile(b.attributes.body("body")?)?;
    let carried_count =
        body.input_count().checked_sub(2).ok_or_else(|| OpError::new("the body has fewer than 2 inputs"))?;
    let scanned_count = body
        .output_count()
        .checked_sub(carried_count + 1)
        .ok_or_else(|| OpError::new("the body gives too few outputs"))?;
    many(move |args| {
        let trips = args.int(0)?.unwrap_or(i64::MAX);
        let mut going = args.int(1)?.is_none_or(|condition| condition != 0);
        let mut carried: Vec<Tensor> =
            (0..carried_count).map(|index| args.get(index + 2).map(Tensor::shallow_clone)).collect::<OpResult<_>>()?;
        let mut scanned: Vec<Vec<Tensor>> = (0..scanned_count).map(|_| Vec::new()).collect();
        let mut iteration = 0;
        while going && iteration < trips {
            let inputs = turn(iteration, std::mem::take(&mut carried))?;
            let mut outputs = body.run(args, inputs)?.into_iter();
            let condition = outputs.next().ok_or_else(|| OpError::new("the body gives no condition"))?;
            // Waits for a GPU only where that computed the condition.
            going = host_ints(&condition)?.first() == Some(&1);
            carried = outputs.by_ref().take(carried_count).collect();
            for (list, value) in scanned.iter_mut().zip(outputs) {
                list.push(value);
            }
            iteration += 1;
        }
        for (place, list) in scanned.into_iter().enumerate() {
            carried.push(if list.is_empty() {
                let states = carried[..carried_count].iter().map(Tensor::shallow_clone).collect();
                body.nothing(args, 1 + carried_count + place, 0, || turn(0, states))?
            } else {
                stacked(&list, 0)?
            });
        }
        Ok(carried)
    })
}

/// What the turns gave, along a new axis. In a program on a GPU, the first ones may be on the host.
fn stacked(list: &[Tensor], axis: i64) -> OpResult<Tensor> {
    let Some(device) = list.iter().map(Tensor::device).find(|device| *device != Device::Cpu) else {
        return Ok(Tensor::f_stack(list, axis)?);
    };
    let list: Vec<Tensor> = list.iter().map(|tensor| moved_to(tensor, device)).collect::<Result<_, _>>()?;
    Ok(Tensor::f_stack(&list, axis)?)
}

/// Inputs of a loop's body: the iteration number, a true condition, and the loop-carried values.
fn turn(iteration: i64, carried: Vec<Tensor>) -> OpResult<Vec<Tensor>> {
    let scalar = [0i64; 0];
    let mut inputs =
        vec![int_vector(&[iteration])?.f_reshape(scalar)?, Tensor::f_from_slice(&[true])?.f_reshape(scalar)?];
    inputs.extend(carried);
    Ok(inputs)
}

/// Inputs: states, then tensors that are read slice by slice. The body maps (states, slices) to (states, slices); its
/// slices are stacked along the axis in the node's attributes.
fn scan(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    let lists = ["scan_input_axes", "scan_input_directions", "scan_output_axes", "scan_output_directions"];
    let [input_axes, input_turns, output_axes, output_turns] = lists.map(|name| a.ints(name));
    let (input_axes, input_turns) = (input_axes?.unwrap_or_default(), input_turns?.unwrap_or_default());
    let (output_axes, output_turns) = (output_axes?.unwrap_or_default(), output_turns?.unwrap_or_default());
    let entry = |list: &[i64], place: usize| list.get(place).copied().unwrap_or(0);
    let read = usize::try_from(a.int_required("num_scan_inputs")?).unwrap_or(usize::MAX);
    let body = b.bodies.compile(a.body("body")?)?;
    let states = body.input_count().checked_sub(read).filter(|_| read > 0);
    let states = states.ok_or_else(|| OpError::new(format!("{read} scanned inputs do not fit the body")))?;
    let made = body.output_count().checked_sub(states).ok_or_else(|| OpError::new("the body gives too few outputs"))?;
    many(move |args| {
        let mut carried: Vec<Tensor> =
            (0..states).map(|index| args.get(index).map(Tensor::shallow_clone)).collect::<OpResult<_>>()?;
        let mut sources = Vec::with_capacity(read);
        let mut steps = None;
        for place in 0..read {
            let source = args.get(states + place)?;
            let axis = axis_of(entry(&input_axes, place), source.dim())?;
            let length = source.size()[axis as usize];
            if *steps.get_or_insert(length) != length {
                return Err(OpError::new("the scanned inputs are of different lengths"));
            }
            sources.push((source, axis, entry(&input_turns, place) == 1));
        }
        let steps = steps.unwrap_or(0);
        let mut stacks: Vec<Vec<Tensor>> = (0..made).map(|_| Vec::new()).collect();
        for step in 0..steps {
            for (source, axis, backwards) in &sources {
                carried.push(source.f_select(*axis, if *backwards { steps - 1 - step } else { step })?);
            }
            let mut outputs = body.run(args, std::mem::take(&mut carried))?.into_iter();
            carried = outputs.by_ref().take(states).collect();
            for (stack, slice) in stacks.iter_mut().zip(outputs) {
                stack.push(slice);
            }
        }
        for (place, mut stack) in stacks.into_iter().enumerate() {
            if entry(&output_turns, place) == 1 {
                stack.reverse();
            }
            let axis = entry(&output_axes, place);
            let Some(first) = stack.first() else {
                let blank = || -> OpResult<Vec<Tensor>> {
                    let mut inputs: Vec<Tensor> = carried[..states].iter().map(Tensor::shallow_clone).collect();
                    for (source, axis, _) in &sources {
                        let mut size = source.size();
                        size.remove(*axis as usize);
                        inputs.push(Tensor::f_zeros(&size, (source.f_kind()?, source.device()))?);
                    }
                    Ok(inputs)
                };
                let empty = body.nothing(args, states + place, axis, blank)?;
                carried.push(empty);
                continue;
            };
            let axis = axis_of(axis, first.dim() + 1)?;
            carried.push(stacked(&stack, axis)?);
        }
        Ok(carried)
    })
}
