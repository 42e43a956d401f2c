//! Makes the new elements of the weights that change.

use crate::base::{Progress, Result};
use crate::checkpoint::{Checkpoint, Tuned};
use crate::ir::ValueId;

use super::compose::composed;
use super::part::{ModelPart, weights_of};
use super::table::{GraftPlan, GraftTable, Target};
use super::values::{Values, rows_of};

/// The new elements of every weight that changes, handed to `put` one by one with the number of its part.
///
/// Errors: those of `put`; `Error::Invalid` when a weight of the graph is not what was matched.
pub fn apply(
    table: &GraftTable,
    parts: &[ModelPart],
    base: &Checkpoint,
    tuned: &Tuned,
    mut put: impl FnMut(usize, ValueId, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let names: Vec<&str> = base.tensors().keys().map(String::as_str).collect();
    let mut values = Values::new(base, tuned, &names);
    let progress = Progress::new("writing weights", "weights", table.weights.len() as u64);
    for weight in &table.weights {
        progress.advance(1);
        if !weight.changed {
            continue;
        }
        let GraftPlan { part, target, found, places } = &weight.plan;
        let body = &parts[*part].model.graph.body;
        match target {
            Target::Floats(id) => {
                let Some((_, tensor)) = weights_of(body).into_iter().find(|(other, _)| other == id) else {
                    continue;
                };
                put(*part, *id, composed(tensor, found, places, |number| values.of(number))?)?;
            }
            Target::Blocks(blocks, scheme) => {
                let numbers = rows_of(&blocks.shape(), found, places, |number| values.of(number))?;
                let packed = blocks.quantise(&numbers, scheme, body)?;
                put(*part, blocks.numbers, packed.numbers)?;
                put(*part, blocks.scales, packed.scales)?;
                if let (Some(id), Some(bytes)) = (blocks.zeros, packed.zeros) {
                    put(*part, id, bytes)?;
                }
            }
            Target::Channels(channels, range) => {
                let numbers = rows_of(&channels.shape(), found, places, |number| values.of(number))?;
                for (id, bytes) in channels.quantise(&numbers, range)? {
                    put(*part, id, bytes)?;
                }
            }
        }
    }
    Ok(())
}
