//! The picture processor's config in the form of onnxruntime-extensions, for the families that GenAI prepares pictures for.

use serde_json::{Value, json};

use crate::base::{Error, Result};
use crate::bundle::Bundle;

use super::super::configs::object;

/// A model type, and the function that writes its processor.
type Row = (&'static str, fn(&Settings) -> Result<Value>);

const FAMILIES: &[Row] = &[
    ("qwen2_vl", |settings| settings.qwen("qwen2_5_vl")),
    ("qwen2_5_vl", |settings| settings.qwen("qwen2_5_vl")),
    ("qwen3_vl", |settings| settings.qwen("qwen3_vl")),
];

/// Hugging Face's settings of the picture processor.
struct Settings(Value);

/// The config; `None` for a family that GenAI has no processor for.
///
/// Errors: `Error::Invalid` naming a setting that is missing.
pub(super) fn config(bundle: &Bundle) -> Result<Option<Value>> {
    let family = bundle.require_config()?.model_type.as_str();
    let Some((_, make)) = FAMILIES.iter().find(|(name, _)| *name == family) else { return Ok(None) };
    let nested =
        || Ok::<_, Error>(object(bundle, "processor_config.json")?.and_then(|own| own.get("image_processor").cloned()));
    let settings = match object(bundle, "preprocessor_config.json")? {
        Some(flat) => Some(Value::Object(flat)),
        None => nested()?,
    };
    let settings = settings.ok_or_else(|| {
        Error::invalid("`preprocessor_config.json`", "is not in the folder")
            .remedy("save the processor with `AutoProcessor.save_pretrained` into the folder")
    })?;
    make(&Settings(settings)).map(Some)
}

impl Settings {
    fn get(&self, keys: &[&str]) -> Result<Value> {
        let found = keys.iter().find_map(|key| self.0.pointer(&format!("/{key}")).filter(|value| !value.is_null()));
        found.cloned().ok_or_else(|| {
            Error::invalid("`preprocessor_config.json`", format!("has no `{}`", keys[0]))
                .remedy("save the processor with `AutoProcessor.save_pretrained` into the folder")
        })
    }

    /// Sides to the nearest multiple within a budget of pixels, then patches grouped by two rows and columns.
    fn qwen(&self, flag: &str) -> Result<Value> {
        let (patch, merge) = (self.get(&["patch_size"])?, self.get(&["merge_size"])?);
        let resize = json!({
            // Only the budget of pixels sets the size.
            "width": 540, "height": 360, "smart_resize": 1,
            "min_pixels": self.get(&["min_pixels", "size/shortest_edge"])?,
            "max_pixels": self.get(&["max_pixels", "size/longest_edge"])?,
            "patch_size": patch, "merge_size": merge,
        });
        let normalize = json!({"mean": self.get(&["image_mean"])?, "std": self.get(&["image_std"])?, flag: 1});
        let patches = json!({
            "patch_size": patch, "temporal_patch_size": self.get(&["temporal_patch_size"])?, "merge_size": merge,
        });
        Ok(processor(&[
            ("DecodeImage", json!({"color_space": "RGB"})),
            ("ConvertRGB", json!({})),
            ("Resize", resize),
            ("Rescale", json!({"rescale_factor": self.0.get("rescale_factor").cloned().unwrap_or(json!(1.0 / 255.0))})),
            ("Normalize", normalize),
            ("PatchImage", patches),
        ]))
    }
}

fn processor(steps: &[(&str, Value)]) -> Value {
    let step = |(kind, attributes): &(&str, Value)| json!({"operation": {"name": kind.to_lowercase(), "type": kind, "attrs": attributes}});
    let transforms: Vec<Value> = steps.iter().map(step).collect();
    json!({"processor": {"name": "image_processor", "transforms": transforms}})
}
