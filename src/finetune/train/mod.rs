//! Training: forward and backward passes, optimiser steps, the least-squares fit and the learning-rate search.

mod batches;
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
pub use fit::{Drawn, fit};
pub use search::{search, train};
pub use trainer::Summary;
