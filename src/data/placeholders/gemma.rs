//! Placeholders of the Gemma families. Gemma 3, Gemma 3n and PaliGemma have a fixed number of features per image, in
//! Gemma 3 and 3n between tokens and empty lines. In Gemma 4 the number depends on the image, and the features are
//! between tokens.

use crate::base::Result;

use super::placeholder::{Files, Placeholder};

/// Chat template for PaliGemma, which has none: the image, the prompt and the answer, in the format of its training.
const PALIGEMMA: &str = "\
{%- for message in messages -%}
{%- if loop.index0 == 0 -%}
{%- set ns = namespace(images=0) -%}
{%- for part in message.content if part.type == 'image' -%}{%- set ns.images = ns.images + 1 -%}<image>{%- endfor -%}
{%- if ns.images == 0 -%}{{ raise_exception('PaliGemma takes a picture with every question') }}{%- endif -%}
{{- bos_token -}}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- '\\n' -}}
{%- elif loop.index0 == 1 and message.role == 'assistant' -%}
{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}
{{- eos_token -}}
{%- else -%}{{ raise_exception('PaliGemma takes one question and its answer') }}{%- endif -%}
{%- endfor -%}";

pub(super) fn gemma3(files: &mut Files) -> Result<Placeholder> {
    let (mut placeholder, start) = framed(files)?;
    // The chat template contains only the start token.
    placeholder.marker = start;
    let settings: [(&str, serde_json::Value); 4] = [
        ("do_convert_rgb", true.into()),
        ("pan_and_scan_min_crop_size", 256.into()),
        ("pan_and_scan_max_num_crops", 4.into()),
        ("pan_and_scan_min_ratio_to_activate", 1.2.into()),
    ];
    placeholder.image_settings.extend(settings.map(|(key, value)| (key.to_string(), value)));
    placeholder.image_settings.insert("do_pan_and_scan".into(), false.into());
    Ok(placeholder)
}

pub(super) fn gemma3n(files: &mut Files) -> Result<Placeholder> {
    Ok(framed(files)?.0)
}

/// Placeholder with an image's features between start and end token and empty lines. Also returns the start token.
fn framed(files: &mut Files) -> Result<(Placeholder, String)> {
    let features = files.settings.size("image_seq_length", 256)?;
    let token = files.feature("image_token", "<image_soft_token>")?;
    let start = files.token("boi_token", "<start_of_image>")?;
    let end = files.token("eoi_token", "<end_of_image>")?;
    let whole = format!("\n\n{start}{}{end}\n\n", token.repeat(features));
    let placeholder = Placeholder::new(&token, move |layout, _| {
        if layout.frames < 2 {
            return whole.clone();
        }
        let crops = vec![whole.as_str(); layout.frames - 1].join(" ");
        format!("Here is the original image {whole} and here are some crops to help you see better {crops}")
    });
    Ok((placeholder, start))
}

pub(super) fn gemma4(files: &mut Files) -> Result<Placeholder> {
    // The number of features depends on the image's size; this setting is the maximum.
    files.settings.take("image_seq_length");
    files.settings.take("audio_ms_per_token");
    let token = files.feature("image_token", "<|image|>")?;
    let start = files.token("boi_token", "<|image>")?;
    let end = files.token("eoi_token", "<image|>")?;
    let feature = token.clone();
    Ok(Placeholder::new(&token, move |layout, _| {
        format!("{start}{}{end}", feature.repeat(layout.features[0] * layout.features[1]))
    }))
}

pub(super) fn paligemma(files: &mut Files) -> Result<Placeholder> {
    let features = files.image.get("image_seq_length").and_then(serde_json::Value::as_u64);
    let features = features
        .filter(|features| (1..=65536).contains(features))
        .ok_or_else(|| files.settings.contradiction("expected `image_seq_length` in the image processor's config"))?;
    let token = files.feature("image_token", "<image>")?;
    let run = token.repeat(features as usize);
    let mut placeholder = Placeholder::new(&token, move |_, _| run.clone());
    placeholder.special_tokens = false;
    placeholder.template = Some(PALIGEMMA);
    Ok(placeholder)
}
