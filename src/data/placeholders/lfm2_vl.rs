//! Placeholder of LFM2-VL: tiles with their row and column, then the overview, between a start and an end token.

use crate::base::Result;

use super::placeholder::{Files, Placeholder};

pub(super) fn open(files: &mut Files) -> Result<Placeholder> {
    let token = files.feature("image_token", "<image>")?;
    let start = files.token("image_start_token", "<|image_start|>")?;
    let end = files.token("image_end_token", "<|image_end|>")?;
    let thumbnail = files.token("image_thumbnail_token", "<|img_thumbnail|>")?;
    let marked = files.settings.bool("use_image_special_tokens", true)?;
    let feature = token.clone();
    let mut placeholder = Placeholder::new(&token, move |layout, _| {
        let mark = |text: &str| if marked { text.to_string() } else { String::new() };
        let [rows, columns] = layout.tiles;
        let whole = feature.repeat(layout.features[0] * layout.features[1]);
        let mut out = mark(&start);
        if rows * columns > 1 {
            let tile = feature.repeat(layout.tile_features);
            for place in 0..rows * columns {
                let (row, column) = (place / columns + 1, place % columns + 1);
                out.push_str(&mark(&format!("<|img_row_{row}_col_{column}|>")));
                out.push_str(&tile);
            }
            if layout.frames > rows * columns {
                out.push_str(&mark(&thumbnail));
            }
        }
        out.push_str(&whole);
        out.push_str(&mark(&end));
        out
    });
    placeholder.special_tokens = false;
    Ok(placeholder)
}
