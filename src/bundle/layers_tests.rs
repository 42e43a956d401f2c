use super::*;

fn rewritten(config: &str, tower: Tower, total: usize, dropped: &[usize]) -> Result<String> {
    let document = Document::parse("`config.json`", config.to_string())?;
    let edit = LayerEdit::new(tower, total, dropped)?;
    Ok(rewrite(&document, &edit)?.unwrap_or_else(|| config.to_string()))
}

#[test]
fn config_keys_of_each_rule_follow_the_kept_layers() {
    let cases = [
        (r#"{"num_hidden_layers": 6, "rms_norm_eps": 1e-06}"#, r#"{"num_hidden_layers": 4, "rms_norm_eps": 1e-06}"#),
        (
            r#"{"text_config": {"n_layers": 6, "layer_types": ["a","b","c","d","e","f"]}, "vision_config": {"num_hidden_layers": 6}}"#,
            r#"{"text_config": {"n_layers": 4, "layer_types": ["a","c","d","f"]}, "vision_config": {"num_hidden_layers": 6}}"#,
        ),
        (
            r#"{"model": {"decoder": {"num_hidden_layers": 6, "sliding_window": {"window_size": 128, "layers": [0, 1, 3, 5]}}}}"#,
            r#"{"model": {"decoder": {"num_hidden_layers": 4, "sliding_window": {"window_size": 128, "layers": [0, 2, 3]}}}}"#,
        ),
        (r#"{"num_layers": 6, "max_window_layers": 3}"#, r#"{"num_layers": 4, "max_window_layers": 2}"#),
        (
            r#"{"num_layers": 6, "num_kv_shared_layers": 3, "layer_types": ["b", "a", "a", "a", "a", "b"]}"#,
            r#"{"num_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["b", "a", "a", "b"]}"#,
        ),
        (r#"{"num_layers": 6, "max_window_layers": 28}"#, r#"{"num_layers": 4, "max_window_layers": 28}"#),
        (
            r#"{"num_layers": 6, "per_layer_config": {"1": {"head_dim": 4}, "3": {"head_dim": 8}, "5": {}}}"#,
            r#"{"num_layers": 4, "per_layer_config": {"2": {"head_dim": 8}, "3": {}}}"#,
        ),
        (
            r#"{"num_layers": 6, "mlp_only_layers": [], "layer_types": null}"#,
            r#"{"num_layers": 4, "mlp_only_layers": [], "layer_types": null}"#,
        ),
        (
            r#"{"num_layers": 6, "hybrid_override_pattern": "M-M*EM"}"#,
            r#"{"num_layers": 4, "hybrid_override_pattern": "MM*M"}"#,
        ),
        (
            r#"{"num_layers": 6, "num_kv_heads": [1, 2, 3, 4, 5, 6]}"#,
            r#"{"num_layers": 4, "num_kv_heads": [1, 3, 4, 6]}"#,
        ),
        (
            r#"{"num_layers": 6, "mrope_section": [1, 2, 3, 4, 5, 6]}"#,
            r#"{"num_layers": 4, "mrope_section": [1, 2, 3, 4, 5, 6]}"#,
        ),
        (r#"{"num_layers": 6, "decoder_sparse_step": 1}"#, r#"{"num_layers": 4, "decoder_sparse_step": 1}"#),
    ];
    for (config, want) in cases {
        assert_eq!(rewritten(config, Tower::Text, 6, &[4, 1]).unwrap(), want);
    }
}

#[test]
fn vision_config_keys_follow_the_kept_vision_layers() {
    let cases = [
        (
            r#"{"num_hidden_layers": 4, "vision_config": {"depth": 4, "deepstack_visual_indexes": [0, 1, 3]}}"#,
            r#"{"num_hidden_layers": 4, "vision_config": {"depth": 3, "deepstack_visual_indexes": [0, 0, 2]}}"#,
        ),
        (
            r#"{"vision_feature_layer": -2, "vision_config": {"num_hidden_layers": 4, "num_attention_heads": 4}}"#,
            r#"{"vision_feature_layer": -2, "vision_config": {"num_hidden_layers": 3, "num_attention_heads": 4}}"#,
        ),
        (
            r#"{"vision_feature_layer": [1, 3], "vision_config": {"layers": 4, "fullatt_block_indexes": [1, 3]}}"#,
            r#"{"vision_feature_layer": [1, 2], "vision_config": {"layers": 3, "fullatt_block_indexes": [2]}}"#,
        ),
        // The graph lacks the last layer, whose output is not read.
        (
            r#"{"vision_feature_layer": -2, "vision_config": {"num_hidden_layers": 5}}"#,
            r#"{"vision_feature_layer": -2, "vision_config": {"num_hidden_layers": 4}}"#,
        ),
        (
            r#"{"vision_feature_layer": [-5, -2], "vision_config": {"num_hidden_layers": 5}}"#,
            r#"{"vision_feature_layer": [-4, -2], "vision_config": {"num_hidden_layers": 4}}"#,
        ),
    ];
    for (config, want) in cases {
        assert_eq!(rewritten(config, Tower::Vision, 4, &[1]).unwrap(), want);
    }
}

#[test]
fn a_vision_tower_without_a_layer_count_in_the_config_is_refused() {
    let error = rewritten(r#"{"vision_config": {"patch_size": 14}}"#, Tower::Vision, 4, &[1]).unwrap_err().to_string();
    assert!(
        error.contains("does not say how many layers the vision tower has; write `\"num_hidden_layers\": 4`"),
        "{error}"
    );
    let genai = r#"{"model": {"vision": {"filename": "v.onnx"}}}"#;
    assert_eq!(rewritten(genai, Tower::Vision, 4, &[1]).unwrap(), genai);
}

#[test]
fn config_keys_that_cannot_follow_the_layers_are_refused_by_name() {
    let cases = [
        (r#"{"num_hidden_layers": 8, "vision_feature_layer": -3}"#, "is 8, but the text tower's graph has 6 layers"),
        (r#"{"hidden_size": 8}"#, "does not say how many layers"),
        (r#"{"num_hidden_layers": 6, "layer_types": ["a"]}"#, "has 1 entries, expected one for each of the 6 layers"),
        (
            r#"{"num_hidden_layers": 6, "layer_magic": [1, 2, 3, 4, 5, 6]}"#,
            "`layer_magic` in `config.json`: has one entry for each",
        ),
        (r#"{"num_hidden_layers": 6, "sliding_window_pattern": 3}"#, "layer 2 would become layer 1"),
        (r#"{"num_hidden_layers": 6, "num_kv_shared_layers": 4}"#, "layer 2 reads the keys and values of layer 1"),
        (
            r#"{"model_type": "gemma4_text", "num_layers": 6, "layer_types": ["s", "s", "s", "s", "full_attention", "s"]}"#,
            "layer 5 would be the last, and `gemma4_text` takes the last layer for full attention",
        ),
        (r#"{"num_hidden_layers": 6, "full_attn_idxs": [7]}"#, "names layer 7, but there are 6"),
        (r#"{"num_hidden_layers": 6, "per_layer_config": {"6": {}}}"#, "names layer `6`, but there are 6"),
        (r#"{"num_hidden_layers": 6, "per_layer_config": {"last": {}}}"#, "names layer `last`"),
        (r#"{"num_hidden_layers": 6.5}"#, "is 6.5, expected a whole number"),
    ];
    for (config, want) in cases {
        let error = rewritten(config, Tower::Text, 6, &[1, 4]).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    let dropped =
        [(vec![6], "layer 6 does not exist"), (vec![1, 1], "occurs twice"), ((0..6).collect(), "all 6 layers")];
    for (layers, want) in dropped {
        let error = LayerEdit::new(Tower::Text, 6, &layers).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

/// Config keys that published models write as a number, letters or a list, and keys that another key overrides.
#[test]
fn config_keys_of_several_value_types_follow_the_kept_layers() {
    let kinds = r#""layer_types": ["a","b","c","d","e","f"]"#;
    let left = r#""layer_types": ["a","c","d","f"]"#;
    let listed: [(&str, &str); 7] = [
        (r#""sliding_window_pattern": "LLLG""#, ""),
        (r#""sliding_window_pattern": 4"#, ""),
        (r#""sliding_window_pattern": null"#, ""),
        (r#""sliding_window_pattern": [1, 1, 0]"#, ""),
        (r#""sliding_window_pattern": [1, 2, 3, 4, 5, 6]"#, r#""sliding_window_pattern": [1, 3, 4, 6]"#),
        (r#""full_attention_interval": 4"#, ""),
        (r#""global_attn_every_n_layers": 3, "layer_group_size": 3"#, ""),
    ];
    for (key, want) in listed {
        let want = if want.is_empty() { key } else { want };
        let config = format!(r#"{{"num_layers": 6, {key}, {kinds}}}"#);
        assert_eq!(
            rewritten(&config, Tower::Text, 6, &[1, 4]).unwrap(),
            format!(r#"{{"num_layers": 4, {want}, {left}}}"#)
        );
    }
    // Without the list each key is either adapted or rejected.
    for (key, dropped, want) in [
        (r#""sliding_window_pattern": "LLG""#, &[0, 1, 2][..], Ok("")),
        (r#""sliding_window_pattern": "LLLLLL""#, &[1], Ok(r#""sliding_window_pattern": "LLLLL""#)),
        (r#""sliding_window_pattern": "LLG""#, &[1], Err("layer 2 would become layer 1")),
        (r#""sliding_window_pattern": [0, 0, 1]"#, &[1], Err("every 3 layers")),
        (r#""block_types": ["r", "r", "a"]"#, &[3, 4, 5], Ok("")),
        (r#""block_types": ["r", "r", "a"]"#, &[0], Err("drop whole periods")),
        (r#""no_rope_layers": [], "no_rope_layer_interval": 2"#, &[0, 1], Ok("")),
        (
            r#""no_rope_layers": [], "no_rope_layer_interval": 2"#,
            &[0],
            Err("write the kind of each layer as `no_rope_layers`"),
        ),
        (
            r#""no_rope_layers": [1, 1, 0, 1, 1, 0], "no_rope_layer_interval": 3"#,
            &[0],
            Ok(r#""no_rope_layers": [1, 0, 1, 1, 0], "no_rope_layer_interval": 3"#),
        ),
        (
            r#""moe_layer_freq": 1, "first_k_dense_replace": 2"#,
            &[0],
            Ok(r#""moe_layer_freq": 1, "first_k_dense_replace": 1"#),
        ),
        (r#""moe_layer_freq": [0, 1, 1, 1, 1, 1]"#, &[0], Ok(r#""moe_layer_freq": [1, 1, 1, 1, 1]"#)),
        (r#""moe_layer_freq": 2"#, &[0], Err("layer 1 would become layer 0")),
        (r#""attn_layer_period": 3, "attn_layer_offset": 1"#, &[0, 1, 2], Ok("")),
        (r#""attn_layer_period": 3, "attn_layer_offset": 1"#, &[0], Err("layer 1 would become layer 0")),
        (r#""attn_layer_period": 3"#, &[0], Err("has no `attn_layer_offset` beside it")),
        (r#""expert_layer_period": 2, "expert_layer_offset": 1"#, &[2, 3], Ok("")),
        (r#""num_dense_layers": 2"#, &[1, 3], Ok(r#""num_dense_layers": 1"#)),
        (
            r#""moe_layer_start_index": 1, "moe_layer_end_index": -1"#,
            &[0],
            Ok(r#""moe_layer_start_index": 0, "moe_layer_end_index": -1"#),
        ),
        (r#""moe_layer_end_index": 4"#, &[4], Ok(r#""moe_layer_end_index": 3"#)),
        (r#""moe_layer_end_index": 0"#, &[0], Err("keep one of them")),
        (r#""attention_types": [[["g", "l"], 3]]"#, &[0, 3], Ok(r#""attention_types": [[["l", "g", "g", "l"], 1]]"#)),
        (r#""attention_types": [["g", "l"]]"#, &[0], Err("[kinds, how often]")),
        (r#""attn_layer_indices": [1, 4]"#, &[1], Ok(r#""attn_layer_indices": [3]"#)),
        (r#""rope_scaling_layers": [0, 1, 5]"#, &[1], Ok(r#""rope_scaling_layers": [0, 4]"#)),
        (r#""cross_attention_layers": [2, 4]"#, &[1, 4], Ok(r#""cross_attention_layers": [1]"#)),
        (r#""deepstack_layer_map": [[1, 2]]"#, &[1], Err("pairs layers of the vision tower")),
        (r#""deepstack_layer_map": []"#, &[1], Ok("")),
        (r#""num_kv_shared_layers": 0"#, &[1], Ok("")),
        (r#""full_attention_interval": true"#, &[1], Err("is true, expected a whole number")),
    ] {
        let config = format!(r#"{{"num_layers": 6, {key}}}"#);
        match (rewritten(&config, Tower::Text, 6, dropped), want) {
            (Ok(found), Ok(want)) => {
                let want = if want.is_empty() { key } else { want };
                assert_eq!(found, format!(r#"{{"num_layers": {}, {want}}}"#, 6 - dropped.len()));
            }
            (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{error}"),
            (found, want) => panic!("{key} without {dropped:?}: {found:?}, expected {want:?}"),
        }
    }
}

#[test]
fn a_last_layer_missing_from_the_graph_stays_in_the_config_count() {
    for (config, want) in [
        (
            r#"{"drop_vision_last_layer": true, "vision_config": {"num_hidden_layers": 5, "insert_layer_id": 2}}"#,
            r#"{"drop_vision_last_layer": true, "vision_config": {"num_hidden_layers": 4, "insert_layer_id": 1}}"#,
        ),
        (
            r#"{"vision_config": {"num_hidden_layers": 5, "feature_layer": -2}}"#,
            r#"{"vision_config": {"num_hidden_layers": 4, "feature_layer": -2}}"#,
        ),
        (
            r#"{"mm_vision_select_layer": -2, "vision_config": {"num_hidden_layers": 5}}"#,
            r#"{"mm_vision_select_layer": -2, "vision_config": {"num_hidden_layers": 4}}"#,
        ),
    ] {
        assert_eq!(rewritten(config, Tower::Vision, 4, &[1]).unwrap(), want);
    }
}
