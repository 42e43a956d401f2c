//! Placeholder of Qwen2-VL to Qwen3.5, GLM-4.1V to GLM-OCR and PaddleOCR-VL: the image token, repeated once per feature
//! of the image's grid. A video of Qwen3-VL has one run of video tokens per time step, after its timestamp.

use crate::base::Result;

use super::super::images::VideoLayout;
use super::placeholder::{Files, Placeholder, VideoPlaceholder};

pub(super) fn open(files: &mut Files, default: &str) -> Result<Placeholder> {
    let token = files.feature("image_token", default)?;
    let feature = token.clone();
    Ok(Placeholder::new(&token, move |layout, _| feature.repeat(layout.features[0] * layout.features[1])))
}

pub(super) fn qwen3_vl(files: &mut Files) -> Result<Placeholder> {
    let mut placeholder = open(files, "<|image_pad|>")?;
    let token = files.token("video_token", "<|video_pad|>")?;
    if files.tokenizer.id(&token).is_none() {
        return Ok(placeholder);
    }
    let start = files.token("vision_start_token", "<|vision_start|>")?;
    let end = files.token("vision_end_token", "<|vision_end|>")?;
    let feature = token.clone();
    let expand = move |layout: &VideoLayout| {
        let run = feature.repeat(layout.features);
        layout.times.iter().map(|time| format!("<{time:.1} seconds>{start}{run}{end}")).collect()
    };
    placeholder.video = Some(VideoPlaceholder { marker: token.clone(), feature: token, expand: Box::new(expand) });
    Ok(placeholder)
}
