//! Placeholder of InternVL3, Aya Vision and Ovis2: consecutive tiles between a start and an end token.

use crate::base::Result;

use super::placeholder::{Files, Placeholder};

pub(super) fn internvl(files: &mut Files) -> Result<Placeholder> {
    let features = files.settings.size("image_seq_length", 256)?;
    let token = files.feature("context_image_token", "<IMG_CONTEXT>")?;
    let start = files.token("start_image_token", "<img>")?;
    let end = files.token("end_image_token", "</img>")?;
    let tile = token.repeat(features);
    let mut placeholder =
        Placeholder::new(&token, move |layout, _| format!("{start}{}{end}", tile.repeat(layout.frames)));
    placeholder.image_settings.insert("crop_to_patches".into(), true.into());
    Ok(placeholder)
}

pub(super) fn aya_vision(files: &mut Files) -> Result<Placeholder> {
    let patch = files.settings.size("patch_size", 28)? * files.settings.size("downsample_factor", 1)?;
    let features = (files.settings.size("img_size", 364)? / patch).pow(2);
    let marker = files.settings.text("image_token", "<image>")?;
    let token = files.feature("img_patch_token", "<|IMG_PATCH|>")?;
    let start = files.settings.text("start_of_img_token", "<|START_OF_IMG|>")?;
    let end = files.settings.text("end_of_img_token", "<|END_OF_IMG|>")?;
    let tile = files.settings.text("tile_token", "TILE")?;
    let global = files.settings.text("tile_global_token", "TILE_GLOBAL")?;
    files.settings.take("img_line_break_token");
    let frame = token.repeat(features);
    let mut placeholder = Placeholder::new(&token, move |layout, _| {
        let tiles: String = (1..layout.frames).map(|n| format!("{tile}_{n}{frame}")).collect();
        format!("{start}{tiles}{global}{frame}{end}")
    });
    placeholder.marker = marker;
    placeholder.image_settings.insert("crop_to_patches".into(), true.into());
    Ok(placeholder)
}

pub(super) fn ovis2(files: &mut Files) -> Result<Placeholder> {
    let features = files.settings.size("image_seq_length", 256)?;
    let token = files.feature("image_atom_token", "<IMG_ATOM>")?;
    // The class has a fixed marker and ignores its config.
    files.settings.take("image_token");
    let tile = token.repeat(features);
    let mut placeholder = Placeholder::new(&token, move |layout, _| {
        let [rows, columns] = layout.tiles;
        let grid = if rows * columns > 1 {
            let row = vec![tile.as_str(); columns].join("<IMG_COL>");
            vec![row; rows].join("<IMG_ROW>")
        } else {
            String::new()
        };
        format!("<IMG_START>{tile}<IMG_GRID>{grid}<IMG_END>")
    });
    placeholder.marker = "<image>".into();
    Ok(placeholder)
}
