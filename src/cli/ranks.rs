//! One of several processes, as torchrun starts them.

use std::env;

use crate::base::{Device, set_quiet};
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
            *index += u32::try_from(ranks.local_rank())?;
        }
    }
    Ok(ranks)
}
