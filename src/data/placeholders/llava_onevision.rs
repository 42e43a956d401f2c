//! Placeholder of LLaVA-OneVision: the features of the overview, then those of the tile grid. The grid's padding is
//! removed, a large grid is scaled down, and each of its rows ends in a newline feature.
//!
//! Source: `LlavaOnevisionProcessor` of transformers 5.24. Images without tiles have the overview only, as in
//! transformers.js.

use crate::base::Result;
use crate::prompt::IMAGE_SIZES;

use super::super::images::ImageLayout;
use super::placeholder::{Files, Placeholder};

pub(super) fn open(files: &mut Files) -> Result<Placeholder> {
    let token = files.feature("image_token", "<image>")?;
    let strategy = files.settings.text("vision_feature_select_strategy", "full")?;
    let less = usize::from(strategy == "default");
    let base = files.settings.size("num_image_tokens", 729)?;
    let aspect = files.settings.text("vision_aspect_ratio", "anyres_max_9")?;
    let most: Option<usize> = aspect.strip_prefix("anyres_max_").and_then(|most| most.parse().ok());
    let most = most.filter(|most| (1..=1000).contains(most)).ok_or_else(|| {
        files.settings.contradiction(format!("`vision_aspect_ratio` is `{aspect}`, expected anyres_max_9 or its like"))
    })?;
    let feature = token.clone();
    let placeholder = Placeholder::new(&token, move |layout, place| {
        let features = match layout.tiles {
            [0, 0] => base,
            // With several images, each has only the overview and a newline.
            _ if place.count > 1 => base + 1,
            tiles => base + grid_features(layout, tiles, base.isqrt(), most),
        };
        feature.repeat(features.saturating_sub(less))
    });
    Ok(Placeholder { packed_by: Some(IMAGE_SIZES), ..placeholder })
}

/// Number of features of the tile grid with its newlines. A tile has `edge` x `edge` features. A grid of clearly more
/// than `most` tiles is scaled down to that size.
fn grid_features(layout: &ImageLayout, [rows, columns]: [usize; 2], edge: usize, most: usize) -> usize {
    let [height, width] = layout.original.map(|edge| edge as f64);
    let (mut rows, mut columns) = (rows * edge, columns * edge);
    // The scaled edge is rounded to seven digits before truncation, so that rounding errors do not reduce whole
    // numbers.
    let scaled = |edge: f64, grid: usize, other: f64| {
        let exact = edge * (grid as f64 / other);
        ((exact * 1e7).round_ties_even() / 1e7) as usize
    };
    if width / height > columns as f64 / rows as f64 {
        let real = scaled(height, columns, width);
        rows -= rows.saturating_sub(real) / 2 * 2;
    } else {
        let real = scaled(width, rows, height);
        columns -= columns.saturating_sub(real) / 2 * 2;
    }
    let ratio = ((rows * columns) as f64 / (most * edge * edge) as f64).sqrt();
    if ratio > 1.1 {
        (rows, columns) = (floor_divided(rows, ratio), floor_divided(columns, ratio));
    }
    rows * columns + rows
}

/// Python's `//` of an integer by a positive float. It is exact; a rounded quotient could be too large by one.
fn floor_divided(number: usize, by: f64) -> usize {
    let number = number as f64;
    ((number - number % by) / by).round() as usize
}
