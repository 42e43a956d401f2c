//! Removes whole layers from a graph.

use crate::analysis::Analysis;
use crate::base::{Error, Result};
use crate::ir::{Model, ValueId};

use super::hidden_states::{MovedTap, Series, moved_taps};
use super::removal::without_layers;
use super::{merged, renumber, tidy};

/// The metadata key that holds the original index of every layer of a pruned graph, joined by commas.
pub const LAYERS_KEY: &str = "interlace.layers";

/// The same for the vision tower of a graph that also holds the language model.
const VISION_LAYERS_KEY: &str = "interlace.layers.vision";

/// For each layer of the graph, its index in the original graph, from the metadata; without metadata, its own index.
pub fn original_layers(model: &Model, layers: usize) -> Vec<usize> {
    recorded_layers(model, LAYERS_KEY, layers)
}

fn recorded_layers(model: &Model, key: &str, layers: usize) -> Vec<usize> {
    let recorded: Option<Vec<usize>> = model
        .metadata
        .iter()
        .find(|(known, _)| known == key)
        .and_then(|(_, list)| list.split(',').map(|item| item.trim().parse().ok()).collect());
    recorded.filter(|list| list.len() == layers).unwrap_or_else(|| (0..layers).collect())
}

/// The model without the given layers. A dropped layer becomes the identity: readers of its output read its input,
/// including graph outputs that show the stream. Its cache ports are removed and the other ports are renumbered without
/// a gap. Everything that is no longer read is removed, including inputs that only dropped layers read. All other
/// inputs and outputs keep their names, except lists of hidden states with one output per layer, which are renumbered;
/// [`tap_changes`] lists these changes.
///
/// Errors: `Error::Invalid` when a layer does not exist or is listed twice, or when no layer would be left;
/// `Error::Unsupported` when a remaining node needs a value inside a dropped layer, or when it is unclear whether nodes
/// with weights next to the layer belong to it.
pub fn drop_layers(analysis: &Analysis, drop: &[usize]) -> Result<Model> {
    let map = &analysis.map;
    let count = map.layers.len();
    let dropped = validate(drop, count)?;
    let kept: Vec<usize> = (0..count).filter(|layer| !dropped.contains(layer)).collect();
    let mut model = match &analysis.merged {
        Some(merged) => merged::drop_in_branches(merged, &dropped, &kept)?,
        None => {
            let lists = Series::all(&analysis.model.graph, map);
            let gone: Vec<ValueId> = lists.iter().flat_map(|list| list.outputs_of(&dropped)).collect();
            let mut model = without_layers(&analysis.model, map, &dropped, &kept, &gone)?;
            renumber::rename_ports(&mut model.graph, map, &kept)?;
            lists.iter().for_each(|list| list.renumber(&mut model.graph, &kept));
            model
        }
    };
    let key = if analysis.is_vision_beside_text { VISION_LAYERS_KEY } else { LAYERS_KEY };
    let original = recorded_layers(&model, key, count);
    let list: Vec<String> = kept.iter().map(|&layer| original[layer].to_string()).collect();
    model.metadata.retain(|(known, _)| known != key);
    model.metadata.push((key.to_string(), list.join(",")));
    tidy::finish(&mut model)?;
    Ok(model)
}

/// The changes that [`drop_layers`] makes to outputs that show the residual stream, in the order of the outputs.
pub fn tap_changes(analysis: &Analysis, drop: &[usize]) -> Vec<MovedTap> {
    let kept: Vec<usize> = (0..analysis.map.layers.len()).filter(|layer| !drop.contains(layer)).collect();
    match &analysis.merged {
        Some(merged) => {
            merged::outer_map(merged).map(|map| moved_taps(&merged.original.graph, &map, &kept)).unwrap_or_default()
        }
        None => moved_taps(&analysis.model.graph, &analysis.map, &kept),
    }
}

fn validate(drop: &[usize], count: usize) -> Result<Vec<usize>> {
    let mut sorted = drop.to_vec();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::invalid("layers to drop", format!("layer {} is named twice", twice[0]))
            .remedy("name each layer once"));
    }
    if let Some(&layer) = sorted.last()
        && layer >= count
    {
        return Err(Error::invalid("layers to drop", format!("layer {layer} does not exist"))
            .remedy(format!("the layers are 0 to {}", count.saturating_sub(1))));
    }
    if sorted.len() == count {
        return Err(Error::invalid(
            "layers to drop",
            format!("all {count} layers are named, so nothing would be left"),
        )
        .remedy("keep at least one"));
    }
    Ok(sorted)
}
