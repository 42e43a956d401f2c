//! Control flow: sub-graphs as blocks.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Build, Kernel, OpError, OpResult, host_ints, many};
use crate::torch::table::{ALL, Row};

use super::shape::int_vector;

pub(super) const ROWS: &[Row] =
    &[Row::new("", "If", 1, if_else).host(ALL).grad(), Row::new("", "Loop", 11, loop_body).host(ALL).grad()];

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

/// Inputs: trip count (optional), condition (optional), carried values. The body takes (iteration, condition, carried)
/// and gives (condition, carried, scanned); scanned values are stacked along a new first axis.
fn loop_body(b: &mut Build) -> OpResult<Kernel> {
    let body = b.bodies.compile(b.attributes.body("body")?)?;
    let carried_count =
        body.input_count().checked_sub(2).ok_or_else(|| OpError::new("the body has fewer than 2 inputs"))?;
    let scanned_count =
        b.outputs.len().checked_sub(carried_count).ok_or_else(|| OpError::new("outputs are missing"))?;
    many(move |args| {
        let trips = args.int(0)?.unwrap_or(i64::MAX);
        let mut going = args.int(1)?.is_none_or(|condition| condition != 0);
        let mut carried: Vec<Tensor> =
            (0..carried_count).map(|index| args.get(index + 2).map(Tensor::shallow_clone)).collect::<OpResult<_>>()?;
        let mut scanned: Vec<Vec<Tensor>> = (0..scanned_count).map(|_| Vec::new()).collect();
        let mut iteration = 0;
        while going && iteration < trips {
            let mut inputs = vec![
                int_vector(&[iteration])?.f_reshape([0i64; 0])?,
                Tensor::f_from_slice(&[true])?.f_reshape([0i64; 0])?,
            ];
            inputs.append(&mut carried);
            let mut outputs = body.run(args, inputs)?.into_iter();
            let condition = outputs.next().ok_or_else(|| OpError::new("the body gives no condition"))?;
            going = host_ints(&condition)?.first() == Some(&1);
            carried = outputs.by_ref().take(carried_count).collect();
            for (list, value) in scanned.iter_mut().zip(outputs) {
                list.push(value);
            }
            iteration += 1;
        }
        for list in scanned {
            carried.push(if list.is_empty() {
                Tensor::f_zeros([0i64], (Kind::Float, tch::Device::Cpu))?
            } else {
                Tensor::f_stack(&list, 0)?
            });
        }
        Ok(carried)
    })
}
