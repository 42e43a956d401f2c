//! Picture budgets: settings of a model's image processor with which its pictures have fewer tokens.

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::bundle::Bundle;

use super::images::ImageSettings;
use super::processor::Processor;
use super::sample::ImageBytes;

/// A picture budget that the model's config can hold.
#[derive(Clone, Debug, PartialEq)]
pub struct PictureBudget {
    /// The settings.
    pub settings: ImageSettings,
    /// Keys of the image processor's config with the same effect.
    pub keys: Map<String, Value>,
}

/// Picture budgets to try, judged by a picture. Whether pictures have fewer tokens then is for the caller to see.
///
/// Errors: as `Processor::open`, and for a picture that does not decode.
pub fn picture_budgets(bundle: &Bundle, picture: &ImageBytes) -> Result<Vec<PictureBudget>> {
    let mut found = Vec::new();
    for settings in Processor::open(bundle)?.smaller_pictures(picture)? {
        match Processor::open_with(bundle, &settings) {
            Ok(processor) => {
                let keys = processor.stored_settings().cloned();
                found.extend(keys.map(|keys| PictureBudget { settings, keys }));
            }
            // The processor has no such setting, or no such value.
            Err(Error::Unsupported { .. } | Error::Invalid { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}
