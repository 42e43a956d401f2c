//! Levers on the number of tokens of a picture: settings of image processors. One row of [`LEVERS`] each.

use super::images::{ImageLayout, ImageSettings};

/// Parts of a picture's pixels that are tried.
const SHARES: [f64; 3] = [0.75, 0.5, 0.25];
/// Numbers of tiles that are tried at most.
const MOST_TILES: usize = 6;

/// A setting with which a picture has fewer tokens.
pub struct Lever {
    /// Its flag.
    pub flag: &'static str,
    /// Values to try for a picture with this layout. The second argument is true where `image_size` is the longest edge.
    pub(super) settings: fn(&ImageLayout, bool) -> Vec<ImageSettings>,
}

/// All levers.
pub const LEVERS: &[Lever] = &[
    Lever { flag: "--image-tiles", settings: |layout, _| whole(layout) },
    Lever { flag: "--max-image-tiles", settings: |layout, _| fewer_tiles(layout) },
    Lever { flag: "--image-size", settings: shorter_edges },
    Lever { flag: "--max-pixels", settings: |layout, _| fewer_pixels(layout) },
];

/// One view of the whole picture.
fn whole(layout: &ImageLayout) -> Vec<ImageSettings> {
    match layout.frames > 1 {
        true => vec![ImageSettings { tiles: Some(false), ..ImageSettings::default() }],
        false => Vec::new(),
    }
}

fn fewer_tiles(layout: &ImageLayout) -> Vec<ImageSettings> {
    let tiles = layout.tiles[0] * layout.tiles[1];
    let numbers =
        (1..tiles).rev().filter(|number| tiles <= MOST_TILES || number.is_multiple_of(tiles.div_ceil(MOST_TILES)));
    numbers.map(|most| ImageSettings { max_tiles: Some(most), ..ImageSettings::default() }).collect()
}

/// Shorter longest edges: fewer rows and columns of tiles, or, for a picture that is not cut, parts of its edge.
fn shorter_edges(layout: &ImageLayout, has_longest_edge: bool) -> Vec<ImageSettings> {
    let edge = |edge: usize| ImageSettings { image_size: Some(edge), ..ImageSettings::default() };
    let side = layout.tiles[0].max(layout.tiles[1]);
    match (has_longest_edge, side) {
        (false, _) => Vec::new(),
        (true, 0) => {
            let longest = layout.frame[0].max(layout.frame[1]) as f64;
            SHARES.iter().map(|share| edge(((longest * share.sqrt()) as usize).max(1))).collect()
        }
        (true, side) => (1..side).rev().map(|tiles| edge(tiles * layout.frame[0].max(layout.frame[1]))).collect(),
    }
}

/// Parts of the pixels of a picture that is not cut.
fn fewer_pixels(layout: &ImageLayout) -> Vec<ImageSettings> {
    let pixels = (layout.frame[0] * layout.frame[1]) as f64;
    let share = |share: &f64| ImageSettings { max_pixels: Some((pixels * share) as usize), ..ImageSettings::default() };
    if layout.tiles == [0, 0] { SHARES.iter().map(share).collect() } else { Vec::new() }
}
