//! Placeholder of Idefics3, SmolVLM and Granite-Docling: every tile's features follow its row and column; the
//! overview's features follow a token of their own.

use serde_json::Value;

use crate::base::{Error, Result};
use crate::bundle::{flag, whole_number};

use super::placeholder::{Files, Placeholder};

pub(super) fn open(files: &mut Files) -> Result<Placeholder> {
    let features = features_of_a_tile(files.model, files.config)?;
    files.settings.take("image_seq_len");
    let token = files.feature("image_token", "<image>")?;
    let fake = files.token("fake_image_token", "<fake_token_around_image>")?;
    let global = files.token("global_image_token", "<global-img>")?;
    let tile = token.repeat(features);
    Ok(Placeholder::new(&token, move |layout, _| {
        let mut out = tiles(layout.tiles, &fake, &tile);
        if layout.tiles[0] > 0 {
            out.push('\n');
        }
        out.push_str(&format!("{fake}{global}{tile}{fake}"));
        out
    }))
}

/// Placeholder of Granite-Docling with its own model type. An image of one tile has no overview.
pub(super) fn granite_docling(files: &mut Files) -> Result<Placeholder> {
    let features = files.settings.size("image_seq_len", 64)?;
    let fine = flag("preprocessor_config.json", "fine_route", files.image.get("fine_route"))?.unwrap_or(false);
    let token = files.feature("image_token", "<image>")?;
    let tile = token.repeat(if fine { features * 4 } else { features });
    Ok(Placeholder::new(&token, move |layout, _| {
        const FAKE: &str = "<fake_token_around_image>";
        let [rows, columns] = layout.tiles;
        let mut out = tiles(layout.tiles, FAKE, &tile);
        if rows * columns > 1 {
            out.push_str(&format!("\n{FAKE}<global-img>{tile}{FAKE}"));
        }
        out
    }))
}

/// The features `tile` of every tile behind `fake` and its row and column; a line for each row.
fn tiles([rows, columns]: [usize; 2], fake: &str, tile: &str) -> String {
    let mut out = String::new();
    for row in 1..=rows {
        for column in 1..=columns {
            out.push_str(&format!("{fake}<row_{row}_col_{column}>{tile}"));
        }
        out.push('\n');
    }
    out
}

/// Features per tile: `image_seq_len` of the processor, which must equal `(image_size / patch_size)^2 / scale_factor^2`
/// of the model's config if that is complete.
///
/// Errors: `Error::Invalid` when the two differ, or a value is out of range.
fn features_of_a_tile(config: &Value, processor_config: &Value) -> Result<usize> {
    const MAX: usize = 65536;
    let bounded = |source: &str, key: &str, value: Option<&Value>| -> Result<Option<usize>> {
        let number = whole_number(source, key, value)?;
        match number.filter(|number| !(1..=MAX).contains(number)) {
            Some(number) => Err(Error::invalid(
                format!("`{source}`"),
                format!("`{key}` is {number}, expected a whole number from 1 to {MAX}"),
            )),
            None => Ok(number),
        }
    };
    let configured = bounded("processor_config.json", "image_seq_len", processor_config.get("image_seq_len"))?;
    let vision = config.get("vision_config");
    let size = |key: &str| bounded("config.json", key, vision.and_then(|vision| vision.get(key)));
    let scale = bounded("config.json", "scale_factor", config.get("scale_factor"))?;
    let computed = match (size("image_size")?, size("patch_size")?, scale) {
        (Some(image), Some(patch), Some(scale)) => Some((image / patch).pow(2) / scale.pow(2)),
        _ => None,
    };
    if computed == Some(0) {
        let problem = "image_size, patch_size and scale_factor leave no feature of a tile";
        return Err(Error::invalid("`config.json`", problem).remedy("restore the config that belongs to the model"));
    }
    match (configured, computed) {
        (Some(configured), Some(computed)) if configured != computed => Err(Error::invalid(
            "`processor_config.json`",
            format!(
                "`image_seq_len` is {configured}, but the config's image_size, patch_size and scale_factor make {computed}"
            ),
        )
        .remedy("restore both files of the model")),
        // 169 is the default of these processors.
        (configured, computed) => Ok(configured.or(computed).unwrap_or(169)),
    }
}
