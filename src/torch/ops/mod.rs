//! The operators by family, one row each.

mod activation;
mod attention;
mod cast;
mod control;
mod convolution;
mod elementwise;
mod experts;
mod fused;
mod gqa;
mod index;
mod layout;
mod linear;
mod logic;
mod normalization;
mod pooling;
mod quantized;
mod recurrent;
mod reduction;
mod resize;
mod rotary;
mod scatter;
mod shape;

use super::operator::Operator;

/// All rows.
pub(super) const FAMILIES: &[&[Operator]] = &[
    activation::ROWS,
    attention::ROWS,
    cast::ROWS,
    control::ROWS,
    convolution::ROWS,
    elementwise::ROWS,
    experts::ROWS,
    fused::ROWS,
    gqa::ROWS,
    index::ROWS,
    layout::ROWS,
    linear::ROWS,
    logic::ROWS,
    normalization::ROWS,
    pooling::ROWS,
    quantized::ROWS,
    recurrent::ROWS,
    reduction::ROWS,
    resize::ROWS,
    rotary::ROWS,
    scatter::ROWS,
    shape::ROWS,
];
