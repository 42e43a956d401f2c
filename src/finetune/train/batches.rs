//! Batches in the order of the passes, prepared ahead where they go to a GPU.

use tch::Device;

use crate::base::{Result, prepared_ahead};
use crate::finetune::data::TrainingBatch;

/// Number of threads that prepare batches for a GPU, and of batches that wait for it.
const THREADS: usize = 2;
const BATCHES_AHEAD: usize = 2;

/// Passes the batch of each pass to `work` on `device`, in order. `make` makes the batch of a pass in host memory.
///
/// For a GPU, the next batches are read, padded and copied to pinned memory on threads of their own while it computes,
/// and every tensor with data is copied to it without waiting.
///
/// Errors: the first one of `make` or `work`; `Error::Engine` when LibTorch cannot copy a tensor.
pub fn each_batch(
    passes: &[Vec<usize>],
    device: Device,
    make: impl Fn(&[usize]) -> Result<TrainingBatch> + Sync,
    mut work: impl FnMut(&[usize], &TrainingBatch) -> Result<()>,
) -> Result<()> {
    match device {
        Device::Cpu => passes.iter().try_for_each(|samples| work(samples, &make(samples)?)),
        _ => prepared(passes, device, |samples| make(samples)?.pinned(), work),
    }
}

fn prepared(
    passes: &[Vec<usize>],
    device: Device,
    make: impl Fn(&[usize]) -> Result<TrainingBatch> + Sync,
    mut work: impl FnMut(&[usize], &TrainingBatch) -> Result<()>,
) -> Result<()> {
    let made = |samples: &Vec<usize>| make(samples);
    prepared_ahead(
        (THREADS, BATCHES_AHEAD),
        || Ok(passes.iter()),
        made,
        |batches| passes.iter().zip(batches).try_for_each(|(samples, batch)| work(samples, &batch?.to(device)?)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Error;
    use crate::finetune::data::{Example, Feeds, RowDtype, RowsWriter, TrainingSet};

    /// The way that batches take to a GPU, without one: in order, each once, and equal to a batch that is made directly.
    #[test]
    fn batches_that_are_prepared_ahead_equal_those_made_directly() {
        let folder = tempfile::tempdir().unwrap();
        let ids: Vec<i64> = (0..9).collect();
        let examples: Vec<Example> = (2..8)
            .map(|length| Example::new(length.to_string(), &ids[..length], &vec![true; length]).unwrap())
            .collect();
        let tokens = examples.iter().map(|example| example.length).sum::<usize>();
        let mut rows = RowsWriter::create(&folder.path().join("rows"), RowDtype::F32).unwrap();
        rows.push(&(0..3 * tokens).map(|n| n as f32).collect::<Vec<_>>(), tokens).unwrap();
        let set = TrainingSet::new(examples, rows.finish().unwrap(), None);
        let feeds = Feeds::of_names(&["attention_mask", "position_ids"]);
        let passes = vec![vec![5, 0], vec![4], vec![3, 2, 1]];
        let make = |samples: &[usize]| set.batch(samples, &feeds);
        for ahead in [false, true] {
            let mut seen = Vec::new();
            let work = |samples: &[usize], batch: &TrainingBatch| {
                let direct = make(samples)?;
                assert!(batch.hidden.equal(&direct.hidden) && batch.targets.equal(&direct.targets));
                assert_eq!(batch.inputs.len(), 2);
                for ((id, feed), (same, own)) in batch.inputs.iter().zip(&direct.inputs) {
                    assert!(id == same && feed.tensor(Device::Cpu)?.equal(&own.tensor(Device::Cpu)?));
                }
                seen.push(samples.to_vec());
                Ok(())
            };
            match ahead {
                true => prepared(&passes, Device::Cpu, make, work).unwrap(),
                false => each_batch(&passes, Device::Cpu, make, work).unwrap(),
            }
            assert_eq!(seen, passes);
        }
        let refused = |_: &[usize]| Err(Error::invalid("a batch", "is not pinned"));
        let error = prepared(&passes, Device::Cpu, refused, |_, _| Ok(())).unwrap_err();
        assert!(error.to_string().contains("is not pinned"), "{error}");
        // An error of the work ends the preparation.
        let error = prepared(&passes, Device::Cpu, make, |_, _| Err(Error::invalid("a pass", "fails"))).unwrap_err();
        assert!(error.to_string().contains("fails"), "{error}");
    }
}
