//! What a run is made of, decided before it begins.

pub mod order;
mod part;
mod points;

pub use order::Step;
pub use part::Part;
pub use points::{Point, anchor_points, points};
