//! Quantised weights: their floats, floats in the same form again, and graphs with float products in their place.

mod blocks;
mod channels;
mod fitted;
mod floated;
#[cfg(test)]
mod form_tests;
mod layout;
mod products;

pub use blocks::{BlockForm, Blocks, Packed, SCHEMES, Scheme, block_matrices};
pub use channels::{Channels, RANGES, Range8, Rounded, channel_matrices};
pub use floated::{requantised, with_floats};
pub use layout::WeightLayout;
pub use products::{Activations, Form, QuantisedWeight, float_products, place_floats};
