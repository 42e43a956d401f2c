//! The training loop: passes, steps, the fit, the search of the learning rate.

mod context;
mod dense;
mod fit;
mod gradient;
mod layered;
mod normal;
mod pool;
mod search;
mod trainer;
mod workers;

pub use context::Run;
pub use dense::DenseStream;
pub use fit::fit;
pub use search::{search, train};
pub use trainer::Summary;
