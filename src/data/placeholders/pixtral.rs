//! Placeholder of Pixtral and Mistral 3: rows of features with a break token after each row but the last, and an end
//! token after the last.

use crate::base::Result;

use super::placeholder::{Files, Placeholder};

pub(super) fn open(files: &mut Files) -> Result<Placeholder> {
    let patch = files.settings.size("patch_size", 16)? * files.settings.size("spatial_merge_size", 1)?;
    let token = files.feature("image_token", "[IMG]")?;
    let row_end = files.settings.text("image_break_token", "[IMG_BREAK]")?;
    let end = files.settings.text("image_end_token", "[IMG_END]")?;
    let feature = token.clone();
    let mut placeholder = Placeholder::new(&token, move |layout, _| {
        let [rows, columns] = layout.frame.map(|edge| edge / patch);
        let row = feature.repeat(columns);
        let rows = vec![row; rows].join(&row_end);
        format!("{rows}{end}")
    });
    placeholder.image_settings.insert("patch_size".into(), patch.into());
    Ok(placeholder)
}
