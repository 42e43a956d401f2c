//! What the written graphs compute beside the largest buffer of their consumer: measured as `verify --max-buffer` does, recorded, and
//! noted where a value does not fit. Only weights are split, so values are the user's to keep small.

use std::path::Path;

use crate::base::{Cancel, Result};
use crate::bundle::{Bundle, Component, ModelConfig};
use crate::eval::{Check, CheckStatus, LOADED_TARGETS, activation_checks, is_measured};

use super::components::chosen;
use super::record::ExportSettings;

/// Measures the graphs of an export that was written into `folder`; for a target whose folder is no model's, the components of
/// the bundle that it is made of.
///
/// Errors: as `chosen` and `Bundle::open`; `Error::Interrupted`. Graphs that cannot be measured are in the checks.
pub(super) fn measured(
    (target, bundle, settings): (&str, &Bundle, &ExportSettings),
    folder: &Path,
    limit: u64,
    cancel: &Cancel,
) -> Result<Vec<Check>> {
    let of = |bundle: &Bundle, parts: Vec<&Component>| {
        let parts: Vec<&Component> = parts.into_iter().filter(|part| is_measured(part.role)).collect();
        activation_checks(bundle, &parts, limit, cancel)
    };
    match LOADED_TARGETS.contains(&target) {
        true => {
            let written = Bundle::open(folder)?;
            of(&written, written.components().iter().collect())
        }
        false => of(bundle, chosen(bundle, settings.variant.as_deref())?),
    }
}

/// What a user should know of the checks: values that do not fit and prompts that are too long, with what to do.
pub(super) fn notes(checks: &[Check], config: Option<&ModelConfig>) -> Vec<String> {
    let context = config.and_then(|config| config.context_tokens);
    let of = |check: &Check| {
        let Check { subject, detail, .. } = check;
        let remedy = match (check.status, check.longest_prompt) {
            (_, Some(tokens)) if tokens > 0 => {
                if context.is_some_and(|context| context as u64 <= tokens) && check.status == CheckStatus::Passed {
                    return None;
                }
                let context = context.map(|context| format!(" (the model's config allows {context})"));
                format!(
                    "give prompts of at most {tokens} tokens{}, or longer ones in parts, each with the caches of those before \
                     (chunked prefill)",
                    context.unwrap_or_default()
                )
            }
            (CheckStatus::Passed, _) => return None,
            (CheckStatus::Failed, Some(_)) => "export with a larger `--max-buffer`, for devices that have it".to_string(),
            (CheckStatus::Failed, None) if check.largest_bytes.is_some() => {
                "give smaller pictures or fewer at once, or export with a larger `--max-buffer`".to_string()
            }
            (CheckStatus::Warning, _) => "keep prompts and pictures small, or measure on the device".to_string(),
            (CheckStatus::Failed | CheckStatus::Unavailable, _) => {
                "what it computes is not known to fit: run `interlace verify --max-buffer` on a machine with more memory, or \
                 measure on the device"
                    .to_string()
            }
        };
        Some(format!("`{subject}`: {detail}; {remedy}"))
    };
    checks.iter().filter_map(of).collect()
}
