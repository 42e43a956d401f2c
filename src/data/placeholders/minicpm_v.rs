//! Placeholder of MiniCPM-V: the index of the image, its overview, then its slices row by row, each between tokens.

use crate::base::Result;
use crate::bundle::flag;

use super::placeholder::{Files, Placeholder};

pub(super) fn open(files: &mut Files) -> Result<Placeholder> {
    let token = files.feature("image_token", "<|image_pad|>")?;
    let numbered = flag("preprocessor_config.json", "use_image_id", files.image.get("use_image_id"))?.unwrap_or(true);
    let [start, end] = [files.token("image_start_token", "<image>")?, files.token("image_end_token", "</image>")?];
    let [slice, slice_end] =
        [files.token("slice_start_token", "<slice>")?, files.token("slice_end_token", "</slice>")?];
    let [id, id_end] =
        [files.token("image_id_start_token", "<image_id>")?, files.token("image_id_end_token", "</image_id>")?];
    let feature = token.clone();
    Ok(Placeholder::new(&token, move |layout, place| {
        let number = if numbered { format!("{id}{}{id_end}", place.index) } else { String::new() };
        let [rows, columns] = layout.tiles;
        let row = format!("{slice}{}{slice_end}", feature.repeat(layout.tile_features)).repeat(columns);
        let slices = vec![row; rows].join("\n");
        format!("{number}{start}{}{end}{slices}", feature.repeat(layout.features[1]))
    }))
}
