//! Chooses between tensors of a checkpoint that hold the same numbers.

use crate::base::{Result, list_preview};
use crate::checkpoint::Checkpoint;

use super::index::RowPlace;
use super::matching::{Match, WeightPiece};
use super::part::ModelPart;

/// What is known of a weight besides its content.
pub struct Position<'a> {
    /// Name of the initializer.
    pub name: &'a str,
    /// The layer that alone reads it, counted as in the model that was never pruned.
    pub layer: Option<usize>,
    /// True for weights of a vision encoder.
    pub vision: bool,
}

impl<'a> Position<'a> {
    /// Of a part's initializer.
    pub fn of(part: &ModelPart, name: &'a str) -> Self {
        Position { name, layer: part.layers.get(name).copied(), vision: part.vision }
    }
}

/// The places of a piece that the weight's name, layer and tower leave.
pub fn candidates(piece: &WeightPiece, position: &Position, names: &[&str]) -> Vec<RowPlace> {
    let mut left = piece.places.clone();
    if left.len() > 1 {
        left = by_name(left, position, names);
    }
    if left.len() > 1 {
        left = by_tower(left, position, names);
    }
    left
}

/// One place for each piece of a match; `Err` with the reason when several differ in what they were finetuned to.
///
/// `same` compares two places of a piece in the finetuned weights.
pub fn chosen(
    found: &Match,
    position: &Position,
    base: &Checkpoint,
    mut same: impl FnMut(&WeightPiece, RowPlace, RowPlace) -> Result<bool>,
) -> Result<Result<Vec<RowPlace>, String>> {
    let names: Vec<&str> = base.tensors().keys().map(String::as_str).collect();
    let mut places = Vec::with_capacity(found.pieces.len());
    for piece in &found.pieces {
        let left = candidates(piece, position, &names);
        let Some(&first) = left.first() else { return Ok(Err("it has no place in the base".into())) };
        for &other in &left[1..] {
            if !same(piece, first, other)? {
                let mut tensors: Vec<&str> = left.iter().map(|place| names[place.tensor]).collect();
                tensors.dedup();
                return Ok(Err(format!(
                    "the base has the same numbers in {}, and they were finetuned to different ones",
                    list_preview(&tensors, 4)
                )));
            }
        }
        places.push(first);
    }
    Ok(Ok(places))
}

/// The places whose tensor shares the longest end of its name with the initializer, from two parts on.
fn by_name(places: Vec<RowPlace>, position: &Position, names: &[&str]) -> Vec<RowPlace> {
    let shared = |place: &RowPlace| {
        let (own, other) = (position.name.rsplit(['.', '/']), names[place.tensor].rsplit('.'));
        own.zip(other).take_while(|(own, other)| own == other).count()
    };
    let most = places.iter().map(shared).max().unwrap_or(0);
    if most < 2 { places } else { places.into_iter().filter(|place| shared(place) == most).collect() }
}

/// The places in the weight's own layer and tower, where there are any.
fn by_tower(places: Vec<RowPlace>, position: &Position, names: &[&str]) -> Vec<RowPlace> {
    let fits = |place: &RowPlace| {
        let name = names[place.tensor];
        is_vision(name) == position.vision && (position.layer.is_none() || layer_of(name) == position.layer)
    };
    let own: Vec<RowPlace> = places.iter().copied().filter(fits).collect();
    if own.is_empty() { places } else { own }
}

/// The first number in a tensor's name, which counts its layer.
pub fn layer_of(name: &str) -> Option<usize> {
    stack_of(name).map(|(_, layer, _)| layer)
}

/// A tensor's name around its first number: `model.layers.`, 3, `.mlp.gate.weight`.
pub fn stack_of(name: &str) -> Option<(&str, usize, &str)> {
    let mut begin = 0;
    for part in name.split('.') {
        if let Ok(layer) = part.parse() {
            return Some((&name[..begin], layer, &name[begin + part.len()..]));
        }
        begin += part.len() + 1;
    }
    None
}

/// True for names of tensors of a vision encoder.
pub fn is_vision(name: &str) -> bool {
    name.split('.').any(|part| part.starts_with("vision") || part.starts_with("visual"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layer_and_the_tower_are_read_from_weight_names() {
        assert_eq!(layer_of("model.layers.12.self_attn.q_proj.weight"), Some(12));
        assert_eq!(layer_of("lm_head.weight"), None);
        assert_eq!(stack_of("model.layers.12.q.weight"), Some(("model.layers.", 12, ".q.weight")));
        assert_eq!(stack_of("7"), Some(("", 7, "")));
        assert!(
            is_vision("model.vision_model.encoder.layers.0.norm1.weight") && is_vision("visual.blocks.0.norm1.weight")
        );
        assert!(!is_vision("model.layers.0.input_layernorm.weight"));
    }
}
