//! Config keys that depend on layers, each with the rule for its change when layers are dropped.

use super::tower::Tower;

/// Rule for the change of a key's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyRule {
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
    Period(&'static str, PeriodPhase),
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
pub(super) enum PeriodPhase {
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
    pub rule: KeyRule,
}

const fn text(key: &'static str, rule: KeyRule) -> KeyRow {
    KeyRow { key, scope: Tower::Text, tower: Tower::Text, rule }
}

const fn vision(key: &'static str, rule: KeyRule) -> KeyRow {
    KeyRow { key, scope: Tower::Vision, tower: Tower::Vision, rule }
}

/// A key in the language model's section that describes the vision tower.
const fn of_vision(key: &'static str, rule: KeyRule) -> KeyRow {
    KeyRow { key, scope: Tower::Text, tower: Tower::Vision, rule }
}

const TWO_TOWERS: &str = "pairs layers of the vision tower with layers of the language model";

/// Keys may be paths (`sliding_window.layers`) relative to the section. A plain key matches at
/// any depth of the section.
pub(super) const ROWS: &[KeyRow] = &[
    text("num_hidden_layers", KeyRule::Count),
    text("n_layer", KeyRule::Count),
    text("n_layers", KeyRule::Count),
    text("num_layers", KeyRule::Count),
    text("layer_types", KeyRule::PerLayer),
    text("mlp_layer_types", KeyRule::PerLayer),
    text("attention_layers", KeyRule::PerLayer),
    text("layers_block_type", KeyRule::PerLayer),
    text("no_rope_layers", KeyRule::PerLayer),
    text("attn_type_list", KeyRule::PerLayer),
    text("block_configs", KeyRule::PerLayer),
    text("hybrid_override_pattern", KeyRule::PerLayer),
    text("indexer_types", KeyRule::PerLayer),
    text("layer_rope_theta", KeyRule::PerLayer),
    text("num_attention_heads", KeyRule::PerLayer),
    text("num_attention_heads_per_layer", KeyRule::PerLayer),
    text("num_query_heads", KeyRule::PerLayer),
    text("num_key_value_heads", KeyRule::PerLayer),
    text("num_kv_heads", KeyRule::PerLayer),
    text("num_key_value_heads_per_layer", KeyRule::PerLayer),
    text("intermediate_size", KeyRule::PerLayer),
    text("ffn_multipliers", KeyRule::PerLayer),
    text("activation_sparsity_pattern", KeyRule::PerLayer),
    text("per_layer_config", KeyRule::ByIndex),
    text("attention_types", KeyRule::Repeats),
    text("sliding_window.layers", KeyRule::Indices),
    text("mlp_only_layers", KeyRule::Indices),
    text("moe_layers", KeyRule::Indices),
    text("full_attn_idxs", KeyRule::Indices),
    text("full_attention_idxs", KeyRule::Indices),
    text("window_layers", KeyRule::Indices),
    text("attn_layer_indices", KeyRule::Indices),
    text("hybrid_layer_ids", KeyRule::Indices),
    text("local_layer_ids", KeyRule::Indices),
    text("ple_layer_ids", KeyRule::Indices),
    text("rope_scaling_layers", KeyRule::Indices),
    text("cross_attention_layers", KeyRule::Indices),
    text("max_window_layers", KeyRule::Prefix),
    text("first_k_dense_replace", KeyRule::Prefix),
    text("num_dense_layers", KeyRule::Prefix),
    text("moe_layer_start_index", KeyRule::Prefix),
    text("moe_layer_end_index", KeyRule::Last),
    text("sliding_window_pattern", KeyRule::Period("layer_types", PeriodPhase::Last)),
    text("_sliding_window_pattern", KeyRule::Period("layer_types", PeriodPhase::Last)),
    text("prefix_dense_sliding_window_pattern", KeyRule::Period("layer_types", PeriodPhase::Last)),
    text("full_attention_interval", KeyRule::Period("layer_types", PeriodPhase::Last)),
    text("global_attn_every_n_layers", KeyRule::Period("layer_types", PeriodPhase::Last)),
    text("layer_group_size", KeyRule::Period("layer_types", PeriodPhase::Last)),
    text("no_rope_layer_interval", KeyRule::Period("no_rope_layers", PeriodPhase::Last)),
    text("interleave_moe_layer_step", KeyRule::Period("moe_layers", PeriodPhase::Last)),
    text("decoder_sparse_step", KeyRule::Period("mlp_layer_types", PeriodPhase::Last)),
    text("moe_layer_interval", KeyRule::Period("mlp_layer_types", PeriodPhase::Last)),
    text("moe_layer_freq", KeyRule::Period("mlp_layer_types", PeriodPhase::First)),
    text("block_types", KeyRule::Period("", PeriodPhase::First)),
    text("cross_layer_interval", KeyRule::Period("", PeriodPhase::First)),
    text("attn_layer_period", KeyRule::Period("layers_block_type", PeriodPhase::Key("attn_layer_offset"))),
    text("expert_layer_period", KeyRule::Period("", PeriodPhase::Key("expert_layer_offset"))),
    text("num_kv_shared_layers", KeyRule::Sharing),
    text("deepstack_layer_map", KeyRule::Refused(TWO_TOWERS)),
    text("spatial_target_layers", KeyRule::Refused(TWO_TOWERS)),
    text("architectures", KeyRule::Unrelated),
    text("eos_token_id", KeyRule::Unrelated),
    text("bad_words_ids", KeyRule::Unrelated),
    text("image_grid_pinpoints", KeyRule::Unrelated),
    text("possible_resolutions", KeyRule::Unrelated),
    text("mrope_section", KeyRule::Unrelated),
    text("short_factor", KeyRule::Unrelated),
    text("long_factor", KeyRule::Unrelated),
    text("keys_to_ignore_at_inference", KeyRule::Unrelated),
    text("mtp_layer_types", KeyRule::Unrelated),
    text("mtp_mlp_layer_types", KeyRule::Unrelated),
    text("mtp_layers_block_type", KeyRule::Unrelated),
    text("mtp_local_layer_ids", KeyRule::Unrelated),
    vision("num_hidden_layers", KeyRule::Count),
    vision("depth", KeyRule::Count),
    vision("num_layers", KeyRule::Count),
    vision("layers", KeyRule::Count),
    vision("layer_types", KeyRule::PerLayer),
    vision("deepstack_visual_indexes", KeyRule::Taps),
    vision("out_indices", KeyRule::Taps),
    vision("intermediate_layers_indices", KeyRule::Taps),
    vision("insert_layer_id", KeyRule::Taps),
    vision("fullatt_block_indexes", KeyRule::Indices),
    vision("global_attn_indexes", KeyRule::Indices),
    vision("global_attention_blocks", KeyRule::Indices),
    vision("residual_block_indices", KeyRule::Indices),
    vision("window_block_indexes", KeyRule::Indices),
    vision("feature_layer", KeyRule::HiddenState),
    vision("num_global_layers", KeyRule::Refused("the tower is two stacks of layers")),
    vision("architectures", KeyRule::Unrelated),
    vision("image_size", KeyRule::Unrelated),
    vision("patch_size", KeyRule::Unrelated),
    of_vision("vision_feature_layer", KeyRule::HiddenState),
    of_vision("vision_select_layer", KeyRule::HiddenState),
    of_vision("mm_vision_select_layer", KeyRule::HiddenState),
    of_vision("select_layer", KeyRule::HiddenState),
    of_vision("insert_layer_id", KeyRule::Taps),
    of_vision("deepstack_layer_map", KeyRule::Refused(TWO_TOWERS)),
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
