//! Config keys that depend on layers, each with the rule for its change when layers are dropped.

use super::tower::Tower;

/// Rule for the change of a key's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// The number of layers; must equal the graph's.
    Count,
    /// One entry or letter per layer: entries of dropped layers are removed. A plain number
    /// applies to all layers and stays.
    PerLayer,
    /// `{"1": {..}, "3": {..}}`: settings by layer index. Entries of dropped layers are removed, the others renumbered.
    ByIndex,
    /// `[[["global", "local"], 4]]`: kinds of layers with a repeat count, over all layers.
    Repeats,
    /// One layer index or a list: dropped layers are removed, the others renumbered.
    Indices,
    /// One layer index or a list, of layers whose outputs are read. A dropped layer is the identity, so its index
    /// becomes that of the last kept layer before it.
    Taps,
    /// The first N layers are of one kind: N becomes the number of those that are kept.
    Prefix,
    /// The index of the last layer of a kind; -1 means the last layer.
    Last,
    /// Every Nth layer is of one kind, at the given phase. The value is a number, letters such as `"LLLG"`, or a list,
    /// repeated over the layers. It stays if the kept layers still follow it, or if the list named here, in the same
    /// section, gives each layer's kind and takes precedence.
    Period(&'static str, Phase),
    /// A position in the vision tower's hidden states; negative positions count from the end.
    HiddenState,
    /// The last N layers read keys and values that earlier layers of their kind compute: N becomes the number of kept
    /// ones. The earlier layers must be kept.
    Sharing,
    /// Must be 0 or empty when layers are dropped. The text is the reason.
    Refused(&'static str),
    /// A list of any length that is unrelated to layers.
    Unrelated,
}

/// The layer in each group of N to which a period refers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Layers 0, N, 2N ..
    First,
    /// Layers N - 1, 2N - 1 ..
    Last,
    /// Layers whose index modulo N equals the value of this key in the same section.
    Key(&'static str),
}

/// One key. `scope` is the section that contains it, `tower` the tower whose layers it describes.
pub(super) struct KeyRow {
    pub key: &'static str,
    pub scope: Tower,
    pub tower: Tower,
    pub rule: Rule,
}

const fn text(key: &'static str, rule: Rule) -> KeyRow {
    KeyRow { key, scope: Tower::Text, tower: Tower::Text, rule }
}

const fn vision(key: &'static str, rule: Rule) -> KeyRow {
    KeyRow { key, scope: Tower::Vision, tower: Tower::Vision, rule }
}

/// A key in the language model's section that describes the vision tower.
const fn of_vision(key: &'static str, rule: Rule) -> KeyRow {
    KeyRow { key, scope: Tower::Text, tower: Tower::Vision, rule }
}

const TWO_TOWERS: &str = "pairs layers of the vision tower with layers of the language model";

/// Keys may be paths (`sliding_window.layers`) relative to the section. A plain key matches at
/// any depth of the section.
pub(super) const ROWS: &[KeyRow] = &[
    text("num_hidden_layers", Rule::Count),
    text("n_layer", Rule::Count),
    text("n_layers", Rule::Count),
    text("num_layers", Rule::Count),
    text("layer_types", Rule::PerLayer),
    text("mlp_layer_types", Rule::PerLayer),
    text("attention_layers", Rule::PerLayer),
    text("layers_block_type", Rule::PerLayer),
    text("no_rope_layers", Rule::PerLayer),
    text("attn_type_list", Rule::PerLayer),
    text("block_configs", Rule::PerLayer),
    text("hybrid_override_pattern", Rule::PerLayer),
    text("indexer_types", Rule::PerLayer),
    text("layer_rope_theta", Rule::PerLayer),
    text("num_attention_heads", Rule::PerLayer),
    text("num_attention_heads_per_layer", Rule::PerLayer),
    text("num_query_heads", Rule::PerLayer),
    text("num_key_value_heads", Rule::PerLayer),
    text("num_kv_heads", Rule::PerLayer),
    text("num_key_value_heads_per_layer", Rule::PerLayer),
    text("intermediate_size", Rule::PerLayer),
    text("ffn_multipliers", Rule::PerLayer),
    text("activation_sparsity_pattern", Rule::PerLayer),
    text("per_layer_config", Rule::ByIndex),
    text("attention_types", Rule::Repeats),
    text("sliding_window.layers", Rule::Indices),
    text("mlp_only_layers", Rule::Indices),
    text("moe_layers", Rule::Indices),
    text("full_attn_idxs", Rule::Indices),
    text("full_attention_idxs", Rule::Indices),
    text("window_layers", Rule::Indices),
    text("attn_layer_indices", Rule::Indices),
    text("hybrid_layer_ids", Rule::Indices),
    text("local_layer_ids", Rule::Indices),
    text("ple_layer_ids", Rule::Indices),
    text("rope_scaling_layers", Rule::Indices),
    text("cross_attention_layers", Rule::Indices),
    text("max_window_layers", Rule::Prefix),
    text("first_k_dense_replace", Rule::Prefix),
    text("num_dense_layers", Rule::Prefix),
    text("moe_layer_start_index", Rule::Prefix),
    text("moe_layer_end_index", Rule::Last),
    text("sliding_window_pattern", Rule::Period("layer_types", Phase::Last)),
    text("_sliding_window_pattern", Rule::Period("layer_types", Phase::Last)),
    text("prefix_dense_sliding_window_pattern", Rule::Period("layer_types", Phase::Last)),
    text("full_attention_interval", Rule::Period("layer_types", Phase::Last)),
    text("global_attn_every_n_layers", Rule::Period("layer_types", Phase::Last)),
    text("layer_group_size", Rule::Period("layer_types", Phase::Last)),
    text("no_rope_layer_interval", Rule::Period("no_rope_layers", Phase::Last)),
    text("interleave_moe_layer_step", Rule::Period("moe_layers", Phase::Last)),
    text("decoder_sparse_step", Rule::Period("mlp_layer_types", Phase::Last)),
    text("moe_layer_interval", Rule::Period("mlp_layer_types", Phase::Last)),
    text("moe_layer_freq", Rule::Period("mlp_layer_types", Phase::First)),
    text("block_types", Rule::Period("", Phase::First)),
    text("cross_layer_interval", Rule::Period("", Phase::First)),
    text("attn_layer_period", Rule::Period("layers_block_type", Phase::Key("attn_layer_offset"))),
    text("expert_layer_period", Rule::Period("", Phase::Key("expert_layer_offset"))),
    text("num_kv_shared_layers", Rule::Sharing),
    text("deepstack_layer_map", Rule::Refused(TWO_TOWERS)),
    text("spatial_target_layers", Rule::Refused(TWO_TOWERS)),
    text("architectures", Rule::Unrelated),
    text("eos_token_id", Rule::Unrelated),
    text("bad_words_ids", Rule::Unrelated),
    text("image_grid_pinpoints", Rule::Unrelated),
    text("possible_resolutions", Rule::Unrelated),
    text("mrope_section", Rule::Unrelated),
    text("short_factor", Rule::Unrelated),
    text("long_factor", Rule::Unrelated),
    text("keys_to_ignore_at_inference", Rule::Unrelated),
    text("mtp_layer_types", Rule::Unrelated),
    text("mtp_mlp_layer_types", Rule::Unrelated),
    text("mtp_layers_block_type", Rule::Unrelated),
    text("mtp_local_layer_ids", Rule::Unrelated),
    vision("num_hidden_layers", Rule::Count),
    vision("depth", Rule::Count),
    vision("num_layers", Rule::Count),
    vision("layers", Rule::Count),
    vision("layer_types", Rule::PerLayer),
    vision("deepstack_visual_indexes", Rule::Taps),
    vision("out_indices", Rule::Taps),
    vision("intermediate_layers_indices", Rule::Taps),
    vision("insert_layer_id", Rule::Taps),
    vision("fullatt_block_indexes", Rule::Indices),
    vision("global_attn_indexes", Rule::Indices),
    vision("global_attention_blocks", Rule::Indices),
    vision("residual_block_indices", Rule::Indices),
    vision("window_block_indexes", Rule::Indices),
    vision("feature_layer", Rule::HiddenState),
    vision("num_global_layers", Rule::Refused("the tower is two stacks of layers")),
    vision("architectures", Rule::Unrelated),
    vision("image_size", Rule::Unrelated),
    vision("patch_size", Rule::Unrelated),
    of_vision("vision_feature_layer", Rule::HiddenState),
    of_vision("vision_select_layer", Rule::HiddenState),
    of_vision("mm_vision_select_layer", Rule::HiddenState),
    of_vision("select_layer", Rule::HiddenState),
    of_vision("insert_layer_id", Rule::Taps),
    of_vision("deepstack_layer_map", Rule::Refused(TWO_TOWERS)),
];

/// Sections whose keys describe neither tower.
pub(super) const OTHER_SECTIONS: &[&str] = &[
    "audio_config",
    "audio_encoder",
    "speech_config",
    "perceiver_config",
    "qformer_config",
    "connector_config",
    "projector_config",
    "resampler_config",
    "aligner_config",
    "talker_config",
    "code2wav_config",
    "vq_config",
    "gen_vision_config",
    "gen_head_config",
    "gen_aligner_config",
    "transformers.js_config",
    "quantization_config",
    "search",
    "speech",
    "embedding",
    "encoder",
    "session_options",
];
