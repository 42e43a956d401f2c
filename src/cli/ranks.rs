//! One of several processes, as torchrun starts them.

use std::env;

use crate::base::{Device, Error, set_quiet};
use crate::torch::Ranks;

use super::context::Context;

/// True where the environment is that of one of several processes, as torchrun sets it.
pub fn has_peers() -> bool {
    env::var("WORLD_SIZE").is_ok_and(|size| !size.is_empty() && size != "1")
}

/// The processes that share this one's work, where the environment says that there are some. One of them speaks for all, and
/// each takes the GPU of its own number.
///
/// Errors: as `Ranks::of_environment`.
pub fn connect_peers(device: &mut Device, context: &Context) -> anyhow::Result<Option<Ranks>> {
    let ranks = Ranks::of_environment()?;
    if let Some(ranks) = &ranks {
        set_quiet(context.output.quiet || ranks.rank() > 0);
        if let Device::Cuda(index) = device {
            *index = own_gpu(*index, ranks.local_rank())?;
        }
    }
    Ok(ranks)
}

/// The GPU of a process: the first one asked for, and the process's number on its machine after it.
///
/// Errors: `Error::Invalid` where the sum is no number of a GPU.
fn own_gpu(first: u32, local_rank: usize) -> Result<u32, Error> {
    let own = u32::try_from(local_rank).ok().and_then(|local| first.checked_add(local));
    own.ok_or_else(|| {
        Error::invalid(format!("device `cuda:{first}`"), format!("has no GPU {local_rank} places behind it"))
            .remedy("name the first GPU of this machine, as in `--device cuda:0`")
    })
}

#[cfg(test)]
mod tests {
    use super::own_gpu;

    #[test]
    fn each_process_takes_the_gpu_of_its_own_number() {
        assert_eq!(own_gpu(1, 2).unwrap(), 3);
        for (first, local) in [(u32::MAX, 1), (0, 1 << 40)] {
            let error = own_gpu(first, local).unwrap_err().to_string();
            assert!(error.contains(&format!("`cuda:{first}`")) && error.contains("cuda:0"), "{error}");
        }
    }
}
