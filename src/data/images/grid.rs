//! Rules for the grid of tiles of a picture, shared by several processors.

/// Rows and columns of the grid of `least` to `most` tiles whose aspect is nearest to the picture's. Of equally near
/// grids, a larger one is chosen only if the picture's area is more than half of that grid's. `original` and `tile` are
/// height and width in pixels.
///
/// Source: `get_optimal_tiled_canvas` of transformers' GOT-OCR2, which InternVL, LFM2-VL and Ovis2 share.
pub(super) fn nearest(original: [usize; 2], tile: [usize; 2], least: usize, most: usize) -> [usize; 2] {
    nearest_within(original, tile, least, most, most)
}

/// As `nearest`, for grids of at most `side` rows and columns.
pub(super) fn nearest_within(
    original: [usize; 2],
    tile: [usize; 2],
    least: usize,
    most: usize,
    side: usize,
) -> [usize; 2] {
    let [height, width] = original;
    let aspect = width as f64 / height as f64;
    let area = width as f64 * height as f64;
    let (mut best, mut smallest) = ([1, 1], f64::INFINITY);
    for [rows, columns] in grids(least, most).into_iter().filter(|grid| grid.iter().all(|edge| *edge <= side)) {
        let difference = (aspect - columns as f64 / rows as f64).abs();
        if difference < smallest {
            (best, smallest) = ([rows, columns], difference);
        } else if difference == smallest && area > 0.5 * (tile[0] * tile[1] * rows * columns) as f64 {
            best = [rows, columns];
        }
    }
    best
}

/// All grids of `least` to `most` tiles as rows and columns, sorted by the number of tiles, then by columns.
pub(super) fn grids(least: usize, most: usize) -> Vec<[usize; 2]> {
    let mut grids: Vec<[usize; 2]> = (1..=most)
        .flat_map(|columns| (1..=most / columns).map(move |rows| [rows, columns]))
        .filter(|[rows, columns]| rows * columns >= least)
        .collect();
    grids.sort_by_key(|[rows, columns]| rows * columns);
    grids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tile_grids_have_the_order_of_transformers() {
        let want = [[1, 1], [2, 1], [1, 2], [3, 1], [1, 3], [4, 1], [2, 2], [1, 4]];
        assert_eq!(grids(1, 4), want);
        assert_eq!(grids(3, 3), [[3, 1], [1, 3]]);
    }
}
