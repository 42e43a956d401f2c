//! Rewrites of a graph. Each takes a model by reference and returns a new one that shares the weights.

mod additions;
mod behind;
mod build;
mod bypass;
mod cut;
mod drop_layers;
mod drop_mlps;
mod fold;
mod fuse;
mod fuse_attention;
mod fuse_kernels;
mod head;
mod hidden_states;
mod internal;
mod join;
mod merged;
mod narrow_positions;
mod opset;
mod removal;
mod renumber;
mod split_buffers;
mod standard;
mod tap;
mod tidy;
mod token_pruner;
mod vocabulary;
mod widen;

pub use additions::{has_additions, shift_additions};
pub use behind::{Behind, change_behind, check_behind};
pub use build::ADDED_PREFIX;
pub use bypass::{
    ADDED_OUTPUT_PREFIX, BEHIND_OUTPUT_PREFIX, Bypass, KEEP_INPUT, LOSS_OUTPUT, MAP_INPUT_PREFIX, MAPPED_INPUT, MapOf,
    RESTART_INPUT, ROWS_INPUT, STREAM_INPUT, STREAM_OUTPUT_PREFIX, TARGETS_INPUT, bypass_layers, bypass_layers_mapped,
};
pub use cut::extract;
pub use drop_layers::{LAYERS_KEY, drop_layers, original_layers, tap_changes};
pub use drop_mlps::drop_mlps;
pub use fold::{NamedWeights, check_fold, fold_map, with_weights};
pub use fuse_attention::FUSED_ATTENTION;
pub use fuse_kernels::{FUSED_SILU, Fused, fuse_kernels};
pub use head::with_head;
pub use hidden_states::MovedTap;
pub use internal::{EXPANDED_BLOCKS, INTERNAL_DOMAIN, ROUNDED, ROUNDED_DYNAMICALLY};
pub use join::{Inlined, JoinScope, Joined, JoinedPart};
pub use narrow_positions::{casts_wide_positions, narrow_positions};
pub use opset::raise_opset;
pub use split_buffers::split_buffers;
pub use standard::{standard_operators, standardised};
pub use tap::{SIMILARITY_PREFIX, tap_similarities};
pub use tidy::{finish, remove_dead_code, replace_uses};
pub use token_pruner::{
    PRUNER_EMBEDS, PRUNER_IMAGE_MASK, PRUNER_KEPT_TOKENS, PRUNER_PICTURE_TOKENS, PRUNER_PIVOT_MASK, token_pruner,
};
pub use vocabulary::cut_vocabulary;
pub use widen::{TYPE_ATTRIBUTES, widened};

#[cfg(test)]
mod tests;
