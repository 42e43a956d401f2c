//! Rewriting configs when layers go: one table of the keys that speak of layers.

use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};

use super::config::{TEXT_SECTIONS, VISION_SECTIONS};
use super::json::{Document, Edit, Kind, Node};

/// A stack of layers that can lose some.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tower {
    /// The language model's decoder.
    Text,
    /// The vision encoder.
    Vision,
}

impl Tower {
    /// As messages and reports show it.
    pub fn name(self) -> &'static str {
        match self {
            Tower::Text => "text",
            Tower::Vision => "vision",
        }
    }
}

/// Layers that leave a tower.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerEdit {
    pub tower: Tower,
    /// Layers before.
    pub total: usize,
    /// Sorted indices below `total`, each once.
    dropped: Vec<usize>,
}

impl LayerEdit {
    /// Errors: `Error::Invalid` when an index is not below `total`, stands twice, or no layer would be left.
    pub fn new(tower: Tower, total: usize, dropped: &[usize]) -> Result<Self> {
        let subject = || format!("layers to drop from the {} tower", tower.name());
        let mut sorted = dropped.to_vec();
        sorted.sort_unstable();
        if let Some(layer) = sorted.iter().find(|layer| **layer >= total) {
            return Err(Error::invalid(subject(), format!("layer {layer} does not exist, the tower has {total}"))
                .remedy(format!("layers are numbered 0 to {}", total.saturating_sub(1))));
        }
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::invalid(subject(), format!("layer {} stands twice", pair[0])));
        }
        if sorted.len() == total {
            return Err(Error::invalid(subject(), format!("all {total} layers are in it")).remedy("keep at least one"));
        }
        Ok(LayerEdit { tower, total, dropped: sorted })
    }

    pub fn dropped(&self) -> &[usize] {
        &self.dropped
    }

    /// Indices that stay, in order; the position in this list is the new index.
    pub fn kept(&self) -> Vec<usize> {
        (0..self.total).filter(|layer| !self.drops(*layer)).collect()
    }

    /// How many layers stay.
    pub fn remaining(&self) -> usize {
        self.total - self.dropped.len()
    }

    pub fn drops(&self, layer: usize) -> bool {
        self.dropped.binary_search(&layer).is_ok()
    }

    /// How many layers below `layer` stay; the new index of a layer that stays.
    pub fn kept_below(&self, layer: usize) -> usize {
        let end = layer.min(self.total);
        end - self.dropped.iter().filter(|dropped| **dropped < end).count()
    }
}

/// What a key says about layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// The number of layers; must equal the graph's.
    Count,
    /// One entry per layer: entries of dropped layers go. A plain number holds for all layers and stays.
    PerLayer,
    /// Indices of layers: dropped ones go, the rest are renumbered.
    Indices,
    /// Indices of layers whose outputs are read, where a dropped layer is the identity: the last kept layer at or
    /// below it takes its place.
    Taps,
    /// The first N layers are of one kind: N becomes the number of those that stay.
    Prefix,
    /// Layers with `(index + 1) % N == 0` are of one kind: stays if the layers left still follow it, or if the list
    /// named here says each layer's kind and so decides.
    Period(&'static str),
    /// A position in the vision tower's hidden states, counted from the end if negative.
    HiddenState,
    /// The last N layers share something with earlier ones: must be 0 when layers go.
    MustBeZero,
    /// A list that has nothing to do with layers, whatever its length.
    Unrelated,
}

/// One key. `scope` is the section in which it stands, `tower` the one whose layers it speaks of.
struct Row {
    key: &'static str,
    scope: Tower,
    tower: Tower,
    rule: Rule,
}

const fn text(key: &'static str, rule: Rule) -> Row {
    Row { key, scope: Tower::Text, tower: Tower::Text, rule }
}

const fn vision(key: &'static str, rule: Rule) -> Row {
    Row { key, scope: Tower::Vision, tower: Tower::Vision, rule }
}

/// Keys may be paths (`sliding_window.layers`) relative to the section; a plain key is found at any depth of it.
const ROWS: &[Row] = &[
    text("num_hidden_layers", Rule::Count),
    text("n_layer", Rule::Count),
    text("n_layers", Rule::Count),
    text("num_layers", Rule::Count),
    text("layer_types", Rule::PerLayer),
    text("mlp_layer_types", Rule::PerLayer),
    text("layers_block_type", Rule::PerLayer),
    text("no_rope_layers", Rule::PerLayer),
    text("attn_type_list", Rule::PerLayer),
    text("block_configs", Rule::PerLayer),
    text("block_types", Rule::PerLayer),
    text("hybrid_override_pattern", Rule::PerLayer),
    text("num_attention_heads", Rule::PerLayer),
    text("num_query_heads", Rule::PerLayer),
    text("num_key_value_heads", Rule::PerLayer),
    text("num_kv_heads", Rule::PerLayer),
    text("num_key_value_heads_per_layer", Rule::PerLayer),
    text("intermediate_size", Rule::PerLayer),
    text("ffn_multipliers", Rule::PerLayer),
    text("activation_sparsity_pattern", Rule::PerLayer),
    text("moe_layer_freq", Rule::PerLayer),
    text("sliding_window.layers", Rule::Indices),
    text("mlp_only_layers", Rule::Indices),
    text("moe_layers", Rule::Indices),
    text("full_attn_idxs", Rule::Indices),
    text("full_attention_idxs", Rule::Indices),
    text("window_layers", Rule::Indices),
    text("attn_layer_indices", Rule::Indices),
    text("hybrid_layer_ids", Rule::Indices),
    text("cross_attention_layers", Rule::Indices),
    text("max_window_layers", Rule::Prefix),
    text("first_k_dense_replace", Rule::Prefix),
    text("sliding_window_pattern", Rule::Period("layer_types")),
    text("_sliding_window_pattern", Rule::Period("layer_types")),
    text("full_attention_interval", Rule::Period("layer_types")),
    text("no_rope_layer_interval", Rule::Period("no_rope_layers")),
    text("interleave_moe_layer_step", Rule::Period("moe_layers")),
    text("decoder_sparse_step", Rule::Period("mlp_layer_types")),
    text("num_kv_shared_layers", Rule::MustBeZero),
    text("architectures", Rule::Unrelated),
    text("eos_token_id", Rule::Unrelated),
    text("bad_words_ids", Rule::Unrelated),
    text("image_grid_pinpoints", Rule::Unrelated),
    text("possible_resolutions", Rule::Unrelated),
    text("mrope_section", Rule::Unrelated),
    text("short_factor", Rule::Unrelated),
    text("long_factor", Rule::Unrelated),
    text("keys_to_ignore_at_inference", Rule::Unrelated),
    vision("num_hidden_layers", Rule::Count),
    vision("depth", Rule::Count),
    vision("num_layers", Rule::Count),
    vision("layers", Rule::Count),
    vision("layer_types", Rule::PerLayer),
    vision("deepstack_visual_indexes", Rule::Taps),
    vision("out_indices", Rule::Taps),
    vision("fullatt_block_indexes", Rule::Indices),
    vision("global_attn_indexes", Rule::Indices),
    vision("window_block_indexes", Rule::Indices),
    vision("architectures", Rule::Unrelated),
    vision("image_size", Rule::Unrelated),
    vision("patch_size", Rule::Unrelated),
    Row { key: "vision_feature_layer", scope: Tower::Text, tower: Tower::Vision, rule: Rule::HiddenState },
];

/// Sections whose keys speak of neither tower.
const OTHER_SECTIONS: &[&str] = &[
    "audio_config",
    "perceiver_config",
    "qformer_config",
    "connector_config",
    "projector_config",
    "talker_config",
    "transformers.js_config",
    "quantization_config",
    "search",
    "speech",
    "embedding",
    "encoder",
    "session_options",
];

/// The new text of a config whose model loses layers; `None` when nothing in it changes.
///
/// Errors: `Error::Invalid` when a count or a list disagrees with `edit.total`, or when a list that no row names has
/// one entry per layer; `Error::Unsupported` when a periodic pattern would break.
pub(super) fn rewrite(document: &Document, edit: &LayerEdit) -> Result<Option<String>> {
    let beyond = layers_beyond(document.root(), edit);
    let mut walk = Walk { document, edit, beyond, edits: Vec::new(), counts: 0 };
    walk.object(document.root(), Tower::Text, "")?;
    // genai_config.json says nothing of the vision tower's layers, so only a section that could is held to it.
    let sections = VISION_SECTIONS.iter().filter(|section| **section != "vision");
    let expected = match edit.tower {
        Tower::Text => true,
        Tower::Vision => sections.into_iter().any(|section| document.root().get(section).is_some()),
    };
    if walk.counts == 0 && expected {
        let name = edit.tower.name();
        return Err(Error::invalid(document.subject(), format!("says nowhere how many layers the {name} tower has"))
            .remedy(format!("write `\"num_hidden_layers\": {}` into its section", edit.total)));
    }
    if walk.edits.is_empty() {
        return Ok(None);
    }
    document.apply(walk.edits).map(Some)
}

/// How many layers at the vision tower's end the config counts and the graph lacks: those behind the last state that
/// `vision_feature_layer` reads. -2 reads the state before the last layer, which an exporter then leaves out.
fn layers_beyond(root: &Node, edit: &LayerEdit) -> usize {
    let read = |node: &Node| -> Option<usize> {
        let positions = node.elements().unwrap_or(std::slice::from_ref(node));
        let unread: Option<Vec<usize>> =
            positions.iter().map(|position| usize::try_from(-1 - position.as_i64()?).ok()).collect();
        unread?.into_iter().min()
    };
    let count = |section: &Node| {
        let keys = ROWS.iter().filter(|row| row.scope == Tower::Vision && row.rule == Rule::Count);
        keys.filter_map(|row| section.get(row.key)?.as_usize()).next()
    };
    let unread = root.get("vision_feature_layer").and_then(read);
    let counted = VISION_SECTIONS.iter().find_map(|section| root.get(section).and_then(count));
    match (edit.tower, unread, counted) {
        (Tower::Vision, Some(unread), Some(counted)) if edit.total.checked_add(unread) == Some(counted) => unread,
        _ => 0,
    }
}

struct Walk<'a> {
    document: &'a Document,
    edit: &'a LayerEdit,
    /// Layers behind the graph's last one that the config counts.
    beyond: usize,
    edits: Vec<Edit>,
    counts: usize,
}

impl Walk<'_> {
    fn object(&mut self, object: &Node, scope: Tower, path: &str) -> Result<()> {
        let Kind::Object(members) = &object.kind else { return Ok(()) };
        for (key, node) in members {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            let row = ROWS.iter().find(|row| {
                row.scope == scope && (row.key == key || (row.key.contains('.') && ends_with_path(&path, row.key)))
            });
            if let Some(row) = row {
                if row.tower == self.edit.tower && !node.is_null() {
                    self.key(object, node, row, &path)?;
                }
                continue;
            }
            if OTHER_SECTIONS.contains(&key.as_str()) {
                continue;
            }
            match &node.kind {
                Kind::Object(_) if TEXT_SECTIONS.contains(&key.as_str()) => self.object(node, Tower::Text, &path)?,
                Kind::Object(_) if VISION_SECTIONS.contains(&key.as_str()) => {
                    self.object(node, Tower::Vision, &path)?
                }
                Kind::Object(_) => self.object(node, scope, &path)?,
                Kind::Array(elements) if scope == self.edit.tower && elements.len() == self.edit.total => {
                    return Err(self.error(&path, format!("has one entry for each of the {} layers", self.edit.total))
                        .remedy("no rule says how this key follows its layers: take it out of the config, or ask for a rule"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn error(&self, path: &str, problem: impl Into<String>) -> Error {
        Error::invalid(format!("`{path}` in {}", self.document.subject()), problem)
    }

    fn replace(&mut self, node: &Node, text: String) {
        let old = self.document.text().get(node.span.clone());
        if old != Some(text.as_str()) {
            self.edits.push(Edit { span: node.span.clone(), text });
        }
    }

    fn key(&mut self, parent: &Node, node: &Node, row: &Row, path: &str) -> Result<()> {
        let edit = self.edit;
        match row.rule {
            Rule::Unrelated => {}
            Rule::Count => {
                let count = self.whole_number(node, path)?;
                if count != edit.total + self.beyond {
                    return Err(self
                        .error(
                            path,
                            format!(
                                "is {count}, but the {} tower's graph has {} layers",
                                edit.tower.name(),
                                edit.total
                            ),
                        )
                        .remedy("config and graph must be of the same model"));
                }
                self.counts += 1;
                self.replace(node, (edit.remaining() + self.beyond).to_string());
            }
            Rule::PerLayer => {
                if let Kind::Scalar(serde_json::Value::String(letters)) = &node.kind {
                    let letters: Vec<char> = letters.chars().collect();
                    self.expect_length(letters.len(), path)?;
                    let kept: String = edit.kept().iter().filter_map(|&layer| letters.get(layer)).collect();
                    self.replace(node, serde_json::Value::from(kept).to_string());
                    return Ok(());
                }
                let Some(elements) = node.elements() else { return Ok(()) };
                if elements.is_empty() {
                    return Ok(());
                }
                self.expect_length(elements.len(), path)?;
                let kept: Vec<_> = edit.kept().into_iter().map(|layer| (layer, None)).collect();
                self.replace(node, self.document.array_with(node, &kept));
            }
            Rule::Indices | Rule::Taps => {
                let Some(elements) = node.elements() else {
                    return Err(self.error(path, "expected a list of layer indices"));
                };
                let mut kept = Vec::new();
                for (place, element) in elements.iter().enumerate() {
                    let layer = self.whole_number(element, path)?;
                    if layer >= edit.total {
                        return Err(self.error(path, format!("names layer {layer}, but there are {}", edit.total)));
                    }
                    let new = match (row.rule, edit.drops(layer)) {
                        (_, false) => Some(edit.kept_below(layer)),
                        (Rule::Taps, true) => Some(edit.kept_below(layer).checked_sub(1).ok_or_else(|| {
                            self.error(path, format!("reads layer {layer}, and no layer at or below it would be left"))
                                .remedy("keep that layer")
                        })?),
                        (_, true) => None,
                    };
                    if let Some(new) = new {
                        kept.push((place, Some(new.to_string())));
                    }
                }
                if !elements.is_empty() {
                    self.replace(node, self.document.array_with(node, &kept));
                }
            }
            Rule::Prefix => {
                let first = self.whole_number(node, path)?;
                // A figure beyond the last layer means "all of them" and still does.
                if first <= edit.total {
                    self.replace(node, edit.kept_below(first).to_string());
                }
            }
            Rule::Period(list) => {
                let period = self.whole_number(node, path)?;
                let listed = parent.get(list).and_then(Node::elements).is_some_and(|list| !list.is_empty());
                let kind = |layer: usize| period > 0 && (layer + 1).is_multiple_of(period);
                let broken = edit.kept().into_iter().enumerate().find(|(new, old)| kind(*new) != kind(*old));
                if let Some((new, old)) = broken.filter(|_| !listed) {
                    return Err(Error::unsupported(
                        format!("`{path}` in {}", self.document.subject()),
                        format!("layer {old} would become layer {new}, which the pattern of every {period} layers makes another kind"),
                    )
                    .remedy(format!("write the kind of each layer as `{list}` beside it, or drop whole periods")));
                }
            }
            Rule::HiddenState => {
                let single = std::slice::from_ref(node);
                let positions = node.elements().unwrap_or(single);
                for position in positions {
                    let index = position.as_i64().ok_or_else(|| self.error(path, "expected whole numbers"))?;
                    // Hidden state p is the input of layer p; total is the output of the last layer.
                    let total = (edit.total + self.beyond) as i64;
                    let from_start = if index < 0 { index.saturating_add(total + 1) } else { index };
                    let from_start = usize::try_from(from_start).ok().filter(|state| *state <= edit.total);
                    let from_start = from_start.ok_or_else(|| {
                        self.error(path, format!("{index} is no hidden state of {} layers", edit.total))
                    })?;
                    let new = edit.kept_below(from_start);
                    let remaining = (edit.remaining() + self.beyond) as i64;
                    let new = if index < 0 { new as i64 - remaining - 1 } else { new as i64 };
                    self.replace(position, new.to_string());
                }
            }
            Rule::MustBeZero => {
                let count = self.whole_number(node, path)?;
                if count != 0 {
                    return Err(Error::unsupported(
                        format!("`{path}` in {}", self.document.subject()),
                        format!(
                            "the last {count} layers use what earlier layers computed, so layers cannot be dropped"
                        ),
                    ));
                }
            }
        }
        Ok(())
    }

    fn whole_number(&self, node: &Node, path: &str) -> Result<usize> {
        node.as_usize().ok_or_else(|| {
            let found = self.document.text().get(node.span.clone()).unwrap_or_default();
            self.error(path, format!("is {found}, expected a whole number"))
        })
    }

    fn expect_length(&self, length: usize, path: &str) -> Result<()> {
        if length == self.edit.total {
            return Ok(());
        }
        Err(self.error(path, format!("has {length} entries, expected one for each of the {} layers", self.edit.total)))
    }
}

fn ends_with_path(path: &str, tail: &str) -> bool {
    path.strip_suffix(tail).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(config: &str, tower: Tower, total: usize, dropped: &[usize]) -> Result<String> {
        let document = Document::parse("`config.json`", config.to_string())?;
        let edit = LayerEdit::new(tower, total, dropped)?;
        Ok(rewrite(&document, &edit)?.unwrap_or_else(|| config.to_string()))
    }

    #[test]
    fn each_rule_follows_its_layers() {
        let cases = [
            (
                r#"{"num_hidden_layers": 6, "rms_norm_eps": 1e-06}"#,
                r#"{"num_hidden_layers": 4, "rms_norm_eps": 1e-06}"#,
            ),
            (
                r#"{"text_config": {"n_layers": 6, "layer_types": ["a","b","c","d","e","f"]}, "vision_config": {"num_hidden_layers": 6}}"#,
                r#"{"text_config": {"n_layers": 4, "layer_types": ["a","c","d","f"]}, "vision_config": {"num_hidden_layers": 6}}"#,
            ),
            (
                r#"{"model": {"decoder": {"num_hidden_layers": 6, "sliding_window": {"window_size": 128, "layers": [0, 1, 3, 5]}}}}"#,
                r#"{"model": {"decoder": {"num_hidden_layers": 4, "sliding_window": {"window_size": 128, "layers": [0, 2, 3]}}}}"#,
            ),
            (r#"{"num_layers": 6, "max_window_layers": 3}"#, r#"{"num_layers": 4, "max_window_layers": 2}"#),
            (r#"{"num_layers": 6, "max_window_layers": 28}"#, r#"{"num_layers": 4, "max_window_layers": 28}"#),
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
    fn vision_keys_follow_the_vision_tower() {
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
            // The graph lacks the last layer, which nothing reads.
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
    fn a_vision_tower_that_goes_by_a_default_must_be_written_out() {
        let error =
            rewritten(r#"{"vision_config": {"patch_size": 14}}"#, Tower::Vision, 4, &[1]).unwrap_err().to_string();
        assert!(
            error.contains("nowhere how many layers the vision tower has; write `\"num_hidden_layers\": 4`"),
            "{error}"
        );
        let genai = r#"{"model": {"vision": {"filename": "v.onnx"}}}"#;
        assert_eq!(rewritten(genai, Tower::Vision, 4, &[1]).unwrap(), genai);
    }

    #[test]
    fn what_cannot_follow_is_refused_by_name() {
        let cases = [
            (
                r#"{"num_hidden_layers": 8, "vision_feature_layer": -3}"#,
                "is 8, but the text tower's graph has 6 layers",
            ),
            (r#"{"hidden_size": 8}"#, "says nowhere how many layers"),
            (
                r#"{"num_hidden_layers": 6, "layer_types": ["a"]}"#,
                "has 1 entries, expected one for each of the 6 layers",
            ),
            (
                r#"{"num_hidden_layers": 6, "layer_magic": [1, 2, 3, 4, 5, 6]}"#,
                "`layer_magic` in `config.json`: has one entry for each",
            ),
            (r#"{"num_hidden_layers": 6, "sliding_window_pattern": 3}"#, "layer 2 would become layer 1"),
            (
                r#"{"num_hidden_layers": 6, "num_kv_shared_layers": 2}"#,
                "the last 2 layers use what earlier layers computed",
            ),
            (r#"{"num_hidden_layers": 6, "full_attn_idxs": [7]}"#, "names layer 7, but there are 6"),
            (r#"{"num_hidden_layers": 6.5}"#, "is 6.5, expected a whole number"),
        ];
        for (config, want) in cases {
            let error = rewritten(config, Tower::Text, 6, &[1, 4]).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        let dropped =
            [(vec![6], "layer 6 does not exist"), (vec![1, 1], "stands twice"), ((0..6).collect(), "all 6 layers")];
        for (layers, want) in dropped {
            let error = LayerEdit::new(Tower::Text, 6, &layers).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
