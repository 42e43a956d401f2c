//! Rewrites of a graph. Each takes a model by reference and gives a new one; weights are shared, nothing is copied.

mod cut;
mod drop_layers;
mod fuse;
mod merged;
mod renumber;
mod tap;
mod tidy;

pub use cut::extract;
pub use drop_layers::{LAYERS_KEY, drop_layers, original_layers};
pub use tap::{SIMILARITY_PREFIX, tap_similarities};

#[cfg(test)]
mod tests;
