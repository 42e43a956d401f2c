//! Other layouts to serve a model from.

pub mod triton;
