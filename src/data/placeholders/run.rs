//! A picture is a run of one token, as many as its grid has features. Qwen2-VL to Qwen3.5, GLM-4.1V to GLM-OCR, PaddleOCR-VL.

use crate::base::Result;

use super::{Files, Placeholder};

pub(super) fn open(files: &mut Files, default: &str) -> Result<Placeholder> {
    let token = files.feature("image_token", default)?;
    let feature = token.clone();
    Ok(Placeholder::new(&token, move |layout, _| feature.repeat(layout.features[0] * layout.features[1])))
}
