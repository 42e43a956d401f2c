//! Config of layers that share the keys and values of earlier ones (Gemma 3n, Gemma 4).

/// Model types whose last layer uses full attention regardless of `layer_types`.
const LAST_IS_FULL: &[&str] = &["gemma4"];

/// Number of kept layers among the last `count`. Each of these reads the keys and values of the last
/// earlier layer of its kind, which must be kept too. `kinds` has one entry per layer (`total`), or none
/// when all layers are of one kind.
///
/// Errors: a message that names the layers.
pub fn remaining(kept: &[usize], total: usize, count: usize, kinds: &[&str]) -> Result<usize, String> {
    let first = total.checked_sub(count).ok_or_else(|| format!("is {count}, but there are {total} layers"))?;
    let kind = |layer: usize| kinds.get(layer).copied().unwrap_or_default();
    let readers = kept.iter().copied().filter(|&layer| layer >= first);
    for reader in readers.clone() {
        let producer = (0..first).rev().find(|&layer| kind(layer) == kind(reader));
        match producer {
            Some(producer) if kept.contains(&producer) => {}
            Some(producer) => {
                return Err(format!(
                    "layer {reader} reads the keys and values of layer {producer}, which would be dropped"
                ));
            }
            None => return Err(format!("no layer before layer {first} is of the kind of layer {reader}")),
        }
    }
    Ok(readers.count())
}

/// The last kept layer, when the family requires full attention for it and it is of another kind.
pub fn wrong_last(model_type: &str, kept: &[usize], kinds: &[&str]) -> Option<usize> {
    let last = kept.last().copied()?;
    let wrong = kinds.get(last).is_some_and(|kind| *kind != "full_attention");
    (wrong && LAST_IS_FULL.iter().any(|family| model_type.starts_with(family))).then_some(last)
}
