//! Whether layers can be dropped.

use crate::analysis::Analysis;
use crate::base::Error;
use crate::bundle::{Bundle, LayerEdit, Tower};
use crate::rewrite::drop_layers;

/// The error with which `prune` would refuse to drop these layers, judged by the analysed graph and the configs;
/// `None` if both allow it. Plans and `inspect` use it too.
pub fn drop_refusal(bundle: &Bundle, analysis: &Analysis, tower: Tower, layers: &[usize]) -> Option<Error> {
    let edit = match LayerEdit::new(tower, analysis.map.layers.len(), layers) {
        Ok(edit) => edit,
        Err(error) => return Some(error),
    };
    drop_layers(analysis, layers).map(drop).and_then(|()| bundle.check_drop(&edit)).err()
}
