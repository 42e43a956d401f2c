//! The residual blocks of layers as parts of their own: attention and MLP.

use super::blocks::{Block, LayerBlocks};
use super::layer::LayerMap;

/// A graph's layers cut into their residual blocks.
#[derive(Clone, Debug)]
pub struct Sublayers {
    /// A map with one layer for each block.
    pub map: LayerMap,
    /// For each layer: the index of its MLP in `map`, or why it has none of its own.
    pub mlps: Vec<Result<usize, String>>,
}

/// Each block as a layer, and where the MLPs are.
pub(super) fn cut(layers: &[LayerBlocks]) -> (Vec<LayerBlocks>, Vec<Result<usize, String>>) {
    let (mut parts, mut mlps) = (Vec::new(), Vec::new());
    for layer in layers {
        mlps.push(mlp_of(layer).map(|place| parts.len() + place));
        for (place, block) in layer.blocks.iter().enumerate() {
            let (first, last) = (place == 0, place + 1 == layer.blocks.len());
            parts.push(LayerBlocks {
                blocks: vec![block.clone()],
                start: if first { layer.start } else { block.position },
                end: if last { layer.end } else { block.end },
                carried: if first { layer.carried } else { block.carried },
            });
        }
    }
    (parts, mlps)
}

/// The place of the one block that mixes no tokens among a layer's blocks.
fn mlp_of(layer: &LayerBlocks) -> Result<usize, String> {
    let plain: Vec<(usize, &Block)> =
        layer.blocks.iter().enumerate().filter(|(_, block)| !block.mixing.is_mixer()).collect();
    match plain.as_slice() {
        [] if layer.blocks.len() == 1 => Err("it has one block: attention alone, or with an MLP beside it".to_string()),
        [] => Err("it has no block without attention".to_string()),
        [(place, block)] => {
            let begins = *place > 0 || layer.start == block.position;
            let ends = place + 1 < layer.blocks.len() || layer.end == block.end;
            if begins && ends {
                Ok(*place)
            } else {
                Err("the layer's norms are around the sum with its MLP".to_string())
            }
        }
        several => Err(format!("it has {} blocks without attention", several.len())),
    }
}
