//! Placeholder of Janus and DeepSeek-VL: a fixed number of features per image, in Janus between a start and an end
//! token.

use crate::base::Result;

use super::placeholder::{Files, Placeholder};

pub(super) fn janus(files: &mut Files) -> Result<Placeholder> {
    let features = files.settings.size("num_image_tokens", 576)?;
    if files.settings.bool("use_default_system_prompt", false)? {
        return Err(files.settings.contradiction("`use_default_system_prompt` is true, expected false"));
    }
    let token = files.feature("image_token", "<image_placeholder>")?;
    let start = files.token("boi_token", "<begin_of_image>")?;
    let end = files.token("eoi_token", "<end_of_image>")?;
    let whole = format!("{start}{}{end}", token.repeat(features));
    Ok(Placeholder::new(&token, move |_, _| whole.clone()))
}

pub(super) fn deepseek_vl(files: &mut Files) -> Result<Placeholder> {
    let features = files.settings.size("num_image_tokens", 576)?;
    let token = files.feature("image_token", "<image_placeholder>")?;
    let run = token.repeat(features);
    Ok(Placeholder::new(&token, move |_, _| run.clone()))
}
