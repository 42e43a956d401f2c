//! Rewrites configs for a model with fewer layers, according to the table of layer keys.

use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};

use super::config::{TEXT_SECTIONS, VISION_SECTIONS};
use super::json::{Document, Edit, JsonKind, JsonNode};
use super::layer_keys::{KeyRow, KeyRule, OTHER_SECTIONS, PeriodPhase, ROWS};
use super::shared_layers;
use super::tower::Tower;

/// Layers to remove from a tower.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerEdit {
    /// The tower from which they are removed.
    pub tower: Tower,
    /// Number of layers before the removal.
    pub total: usize,
    /// Sorted indices below `total`, each once.
    dropped: Vec<usize>,
}

impl LayerEdit {
    /// Errors: `Error::Invalid` when an index is not below `total`, occurs twice, or no layer would be left.
    pub fn new(tower: Tower, total: usize, dropped: &[usize]) -> Result<Self> {
        let subject = || format!("layers to drop from the {} tower", tower.name());
        let mut sorted = dropped.to_vec();
        sorted.sort_unstable();
        if let Some(layer) = sorted.iter().find(|layer| **layer >= total) {
            return Err(Error::invalid(subject(), format!("layer {layer} does not exist, the tower has {total}"))
                .remedy(format!("layers are numbered 0 to {}", total.saturating_sub(1))));
        }
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(
                Error::invalid(subject(), format!("layer {} occurs twice", pair[0])).remedy("name each layer once")
            );
        }
        if sorted.len() == total {
            return Err(Error::invalid(subject(), format!("all {total} layers are in it")).remedy("keep at least one"));
        }
        Ok(LayerEdit { tower, total, dropped: sorted })
    }

    /// Indices of the removed layers, ascending and unique.
    pub fn dropped(&self) -> &[usize] {
        &self.dropped
    }

    /// Indices of the kept layers, ascending. A layer's position in this list is its new index.
    pub fn kept(&self) -> Vec<usize> {
        (0..self.total).filter(|layer| !self.drops(*layer)).collect()
    }

    /// Number of layers that remain.
    pub fn remaining(&self) -> usize {
        self.total - self.dropped.len()
    }

    /// True when the layer of this index is removed.
    pub fn drops(&self, layer: usize) -> bool {
        self.dropped.binary_search(&layer).is_ok()
    }

    /// Number of kept layers below `layer`, which is the new index of a kept layer.
    pub fn kept_below(&self, layer: usize) -> usize {
        let end = layer.min(self.total);
        end - self.dropped.iter().filter(|dropped| **dropped < end).count()
    }
}

/// The new text of a config whose model loses layers; `None` when it does not change.
///
/// Errors: `Error::Invalid` when a count or a list disagrees with `edit.total`, or when a list without a row in the
/// table has one entry per layer; `Error::Unsupported` when a key cannot be adapted, such as a period that would break.
pub(super) fn rewrite(document: &Document, edit: &LayerEdit) -> Result<Option<String>> {
    let beyond = layers_beyond(document.root(), edit);
    let mut walk = Walk { document, edit, beyond, edits: Vec::new(), counts: 0 };
    walk.object(document.root(), Tower::Text, "")?;
    // genai_config.json has no section for the vision tower's layers, so only files with such a
    // section must have the count.
    let sections = VISION_SECTIONS.iter().filter(|section| **section != "vision");
    let expected = match edit.tower {
        Tower::Text => true,
        Tower::Vision => {
            sections.into_iter().filter_map(|section| document.root().get(section)).any(JsonNode::is_object)
        }
    };
    if walk.counts == 0 && expected {
        let name = edit.tower.name();
        return Err(Error::invalid(document.subject(), format!("does not say how many layers the {name} tower has"))
            .remedy(format!("write `\"num_hidden_layers\": {}` into its section", edit.total)));
    }
    if walk.edits.is_empty() {
        return Ok(None);
    }
    document.apply(walk.edits).map(Some)
}

/// The path of a key whose value is the number of the tower's layers; `None` without such a key.
pub(super) fn counting_key(document: &Document, edit: &LayerEdit) -> Option<String> {
    fn find(object: &JsonNode, scope: Tower, path: &str, edit: &LayerEdit) -> Option<String> {
        let JsonKind::Object(members) = &object.kind else { return None };
        members.iter().filter(|(key, _)| !OTHER_SECTIONS.contains(&key.as_str())).find_map(|(key, node)| {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            let counts = ROWS.iter().any(|row| {
                row.key == key && row.rule == KeyRule::Count && row.scope == scope && row.tower == edit.tower
            });
            if counts && node.as_usize() == Some(edit.total) {
                return Some(path);
            }
            find(node, section(key, scope), &path, edit)
        })
    }
    find(document.root(), Tower::Text, "", edit)
}

/// The tower that the members of an object under this key describe.
fn section(key: &str, scope: Tower) -> Tower {
    match key {
        _ if TEXT_SECTIONS.contains(&key) => Tower::Text,
        _ if VISION_SECTIONS.contains(&key) => Tower::Vision,
        _ => scope,
    }
}

/// Number of layers at the end of the vision tower that the config counts and the graph lacks, because they follow the
/// last hidden state that is read. For example, -2 reads the state before the last layer, and an exporter then omits
/// the last layer.
fn layers_beyond(root: &JsonNode, edit: &LayerEdit) -> usize {
    let read = |node: &JsonNode| -> Option<usize> {
        let positions = node.elements().unwrap_or(std::slice::from_ref(node));
        let unread: Option<Vec<usize>> =
            positions.iter().map(|position| usize::try_from(-1 - position.as_i64()?).ok()).collect();
        unread?.into_iter().min()
    };
    let tower = VISION_SECTIONS.iter().find_map(|section| root.get(section));
    let count = |section: &JsonNode| {
        let keys = ROWS.iter().filter(|row| row.scope == Tower::Vision && row.rule == KeyRule::Count);
        keys.filter_map(|row| section.get(row.key)?.as_usize()).next()
    };
    let states = ROWS.iter().filter(|row| row.rule == KeyRule::HiddenState).filter_map(|row| match row.scope {
        Tower::Text => root.get(row.key),
        Tower::Vision => tower?.get(row.key),
    });
    let dropped = root.get("drop_vision_last_layer").is_some_and(JsonNode::is_true);
    let unread = states.into_iter().find_map(read).or(dropped.then_some(1));
    match (edit.tower, unread, tower.and_then(count)) {
        (Tower::Vision, Some(unread), Some(counted)) if edit.total.checked_add(unread) == Some(counted) => unread,
        _ => 0,
    }
}

/// Keys whose value can be a text with one letter per layer.
const LETTERS: &[&str] = &["hybrid_override_pattern", "sliding_window_pattern"];

struct Walk<'a> {
    document: &'a Document,
    edit: &'a LayerEdit,
    /// Layers after the graph's last one that the config counts.
    beyond: usize,
    edits: Vec<Edit>,
    counts: usize,
}

impl Walk<'_> {
    fn object(&mut self, object: &JsonNode, scope: Tower, path: &str) -> Result<()> {
        let JsonKind::Object(members) = &object.kind else { return Ok(()) };
        for (key, node) in members {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            let known = || {
                ROWS.iter().filter(|row| {
                    row.scope == scope && (row.key == key || (row.key.contains('.') && ends_with_path(&path, row.key)))
                })
            };
            if known().next().is_some() {
                if let Some(row) = known().find(|row| row.tower == self.edit.tower).filter(|_| !node.is_null()) {
                    self.key(object, node, row, &path)?;
                }
                continue;
            }
            if OTHER_SECTIONS.contains(&key.as_str()) {
                continue;
            }
            match &node.kind {
                JsonKind::Object(_) => self.object(node, section(key, scope), &path)?,
                JsonKind::Array(elements) if scope == self.edit.tower && elements.len() == self.edit.total => {
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

    fn unsupported(&self, path: &str, problem: impl Into<String>) -> Error {
        Error::unsupported(format!("`{path}` in {}", self.document.subject()), problem)
    }

    fn replace(&mut self, node: &JsonNode, text: String) {
        let old = self.document.text().get(node.span.clone());
        if old != Some(text.as_str()) {
            self.edits.push(Edit { span: node.span.clone(), text });
        }
    }

    fn key(&mut self, parent: &JsonNode, node: &JsonNode, row: &KeyRow, path: &str) -> Result<()> {
        match row.rule {
            KeyRule::Unrelated => Ok(()),
            KeyRule::Count => self.count(node, path),
            KeyRule::PerLayer => {
                self.last_kind(parent, row, path)?;
                self.per_layer(node, path)
            }
            KeyRule::ByIndex => self.by_index(node, path),
            KeyRule::Repeats => self.repeats(node, path),
            KeyRule::Indices | KeyRule::Taps => self.indices(node, row.rule, path),
            KeyRule::Prefix => {
                let first = self.whole_number(node, path)?;
                // A number above the number of layers means all layers, and still does after the change.
                if first <= self.edit.total {
                    self.replace(node, self.edit.kept_below(first).to_string());
                }
                Ok(())
            }
            KeyRule::Last => {
                if node.as_i64() == Some(-1) {
                    return Ok(());
                }
                let end = self.whole_number(node, path)?.saturating_add(1).min(self.edit.total);
                let last = self.edit.kept_below(end).checked_sub(1);
                let last = last.ok_or_else(|| {
                    self.unsupported(path, "no layer up to the one that it names would be left")
                        .remedy("keep one of them")
                })?;
                self.replace(node, last.to_string());
                Ok(())
            }
            KeyRule::Period(list, phase) => self.period(parent, node, list, phase, path),
            KeyRule::HiddenState => self.hidden_state(node, path),
            KeyRule::Sharing => {
                let count = self.whole_number(node, path)?;
                let remaining = shared_layers::remaining(&self.edit.kept(), self.edit.total, count, &kinds_of(parent));
                let remaining = remaining.map_err(|problem| {
                    self.unsupported(path, problem)
                        .remedy("keep the layers that others read, or drop their readers too")
                })?;
                self.replace(node, remaining.to_string());
                Ok(())
            }
            KeyRule::Refused(_) if node.as_i64() == Some(0) || node.elements().is_some_and(<[JsonNode]>::is_empty) => {
                Ok(())
            }
            KeyRule::Refused(why) => {
                let name = self.edit.tower.name();
                Err(self
                    .unsupported(path, why)
                    .remedy(format!("layers of this model's {name} tower cannot be dropped")))
            }
        }
    }

    /// In some families the last layer uses full attention regardless of the list.
    fn last_kind(&self, section: &JsonNode, row: &KeyRow, path: &str) -> Result<()> {
        let model_type = section.get("model_type").and_then(JsonNode::as_str).unwrap_or_default();
        match shared_layers::wrong_last(model_type, &self.edit.kept(), &kinds_of(section)) {
            Some(last) if row.key == "layer_types" => Err(self
                .unsupported(
                    path,
                    format!(
                        "layer {last} would be the last, and `{model_type}` takes the last layer for full attention"
                    ),
                )
                .remedy("keep a later layer of `full_attention`")),
            _ => Ok(()),
        }
    }

    fn count(&mut self, node: &JsonNode, path: &str) -> Result<()> {
        let edit = self.edit;
        let count = self.whole_number(node, path)?;
        if count != edit.total + self.beyond {
            let problem = format!("is {count}, but the {} tower's graph has {} layers", edit.tower.name(), edit.total);
            return Err(self.error(path, problem).remedy("config and graph must be of the same model"));
        }
        self.counts += 1;
        self.replace(node, (edit.remaining() + self.beyond).to_string());
        Ok(())
    }

    fn per_layer(&mut self, node: &JsonNode, path: &str) -> Result<()> {
        if let JsonKind::Scalar(serde_json::Value::String(letters)) = &node.kind {
            if !LETTERS.iter().any(|key| ends_with_path(path, key)) {
                let problem = format!("is \"{letters}\", expected a list with one entry per layer");
                return Err(self.error(path, problem).remedy("correct the config"));
            }
            let letters: Vec<char> = letters.chars().collect();
            self.expect_length(letters.len(), path)?;
            let kept: String = self.edit.kept().iter().filter_map(|&layer| letters.get(layer)).collect();
            self.replace(node, serde_json::Value::from(kept).to_string());
            return Ok(());
        }
        let Some(elements) = node.elements().filter(|elements| !elements.is_empty()) else { return Ok(()) };
        self.expect_length(elements.len(), path)?;
        let kept: Vec<_> = self.edit.kept().into_iter().map(|layer| (layer, None)).collect();
        self.replace(node, self.document.array_with(node, &kept));
        Ok(())
    }

    /// Settings by layer index, rewritten with those of the kept layers.
    fn by_index(&mut self, node: &JsonNode, path: &str) -> Result<()> {
        let JsonKind::Object(members) = &node.kind else {
            return Err(self.error(path, "expected settings by the index of their layer"));
        };
        let mut kept = Vec::new();
        for (name, member) in members {
            let layer = name.parse::<usize>().ok().filter(|&layer| layer < self.edit.total).ok_or_else(|| {
                self.error(path, format!("names layer `{name}`, but there are {}", self.edit.total))
                    .remedy("config and graph must be of the same model")
            })?;
            if !self.edit.dropped().contains(&layer) {
                let text = self.document.text().get(member.span.clone()).unwrap_or_default();
                kept.push(format!("\"{}\": {text}", self.edit.kept_below(layer)));
            }
        }
        self.replace(node, format!("{{{}}}", kept.join(", ")));
        Ok(())
    }

    /// `[[["a", "b"], 2]]` means `a b a b`. Rewritten with the kind of each kept layer, repeated once.
    fn repeats(&mut self, node: &JsonNode, path: &str) -> Result<()> {
        let expected = || self.error(path, "expected a list of [kinds, how often]");
        let mut kinds = Vec::new();
        for group in node.elements().ok_or_else(expected)? {
            let Some([names, times]) = group.elements() else { return Err(expected()) };
            let (names, times) = (names.elements().ok_or_else(expected)?, self.whole_number(times, path)?);
            for _ in 0..times.min(self.edit.total + 1) {
                let texts = names.iter().map(|name| self.document.text().get(name.span.clone()).unwrap_or_default());
                kinds.extend(texts);
            }
        }
        self.expect_length(kinds.len(), path)?;
        let kept: Vec<&str> = self.edit.kept().iter().filter_map(|&layer| kinds.get(layer).copied()).collect();
        let text = format!("[[[{}], 1]]", kept.join(", "));
        self.replace(node, text);
        Ok(())
    }

    /// One layer index or a list.
    fn indices(&mut self, node: &JsonNode, rule: KeyRule, path: &str) -> Result<()> {
        let single = std::slice::from_ref(node);
        let is_list = node.elements().is_some();
        let mut kept = Vec::new();
        for (place, element) in node.elements().unwrap_or(single).iter().enumerate() {
            let layer = self.whole_number(element, path)?;
            if layer >= self.edit.total {
                return Err(self
                    .error(path, format!("names layer {layer}, but there are {}", self.edit.total))
                    .remedy("config and graph must be of the same model"));
            }
            let new = match (rule, self.edit.drops(layer)) {
                (_, false) => Some(self.edit.kept_below(layer)),
                (KeyRule::Taps, true) => Some(self.edit.kept_below(layer).checked_sub(1).ok_or_else(|| {
                    self.error(path, format!("reads layer {layer}, and no layer at or below it would be left"))
                        .remedy("keep that layer")
                })?),
                (_, true) => None,
            };
            if let Some(new) = new {
                kept.push((place, Some(new.to_string())));
            }
        }
        match (is_list, kept.as_slice()) {
            (true, _) if node.elements().is_some_and(|elements| !elements.is_empty()) => {
                self.replace(node, self.document.array_with(node, &kept));
            }
            (false, [(_, Some(new))]) => self.replace(node, new.clone()),
            (false, _) => {
                return Err(self.error(path, "names a layer that would be dropped").remedy("keep that layer"));
            }
            _ => {}
        }
        Ok(())
    }

    /// A number N, letters (`"LLLG"`) or a list that is repeated over the layers, or a list with one entry per layer.
    fn period(&mut self, parent: &JsonNode, node: &JsonNode, list: &str, phase: PeriodPhase, path: &str) -> Result<()> {
        let total = self.edit.total;
        let kinds: Vec<String> = match (&node.kind, node.elements()) {
            (_, Some(elements)) if elements.len() == total => return self.per_layer(node, path),
            (_, Some([])) => return Ok(()),
            (_, Some(elements)) => {
                elements.iter().map(|e| self.document.text().get(e.span.clone()).unwrap_or_default().into()).collect()
            }
            (JsonKind::Scalar(serde_json::Value::String(letters)), _) => match letters.chars().count() {
                count if count == total => return self.per_layer(node, path),
                _ => letters.chars().map(String::from).collect(),
            },
            _ => {
                let period = self.whole_number(node, path)?.min(total.saturating_add(1));
                let marked = match phase {
                    PeriodPhase::First => Some(0),
                    PeriodPhase::Last => period.checked_sub(1),
                    PeriodPhase::Key(key) => {
                        let offset = parent.get(key).ok_or_else(|| {
                            let problem = format!("has no `{key}` beside it");
                            self.error(path, problem).remedy("write the offset that the model has by default")
                        })?;
                        Some(self.whole_number(offset, key)?)
                    }
                };
                (0..period).map(|place| (Some(place) == marked).to_string()).collect()
            }
        };
        // Without repetition, or when the list in the same section takes precedence.
        let listed = parent.get(list).and_then(JsonNode::elements).is_some_and(|list| !list.is_empty());
        if kinds.len() < 2 || listed {
            return Ok(());
        }
        let kind = |layer: usize| kinds.get(layer % kinds.len());
        let broken = self.edit.kept().into_iter().enumerate().find(|(new, old)| kind(*new) != kind(*old));
        let Some((new, old)) = broken else { return Ok(()) };
        let every = kinds.len();
        let remedy = match list {
            "" => "drop whole periods".to_string(),
            list => format!("write the kind of each layer as `{list}` into the same section, or drop whole periods"),
        };
        Err(self
            .unsupported(
                path,
                format!(
                    "layer {old} would become layer {new}, which the pattern of every {every} layers makes another kind"
                ),
            )
            .remedy(remedy))
    }

    fn hidden_state(&mut self, node: &JsonNode, path: &str) -> Result<()> {
        let edit = self.edit;
        let single = std::slice::from_ref(node);
        for position in node.elements().unwrap_or(single) {
            let index = position.as_i64().ok_or_else(|| {
                self.error(path, "expected whole numbers").remedy("name hidden states by number, as in -2")
            })?;
            // Hidden state p is the input of layer p; total is the output of the last layer.
            let total = (edit.total + self.beyond) as i64;
            let from_start = if index < 0 { index.saturating_add(total + 1) } else { index };
            let from_start = usize::try_from(from_start).ok().filter(|state| *state <= edit.total);
            let from_start = from_start.ok_or_else(|| {
                self.error(path, format!("{index} is not a hidden state of {} layers", edit.total))
                    .remedy("config and graph must be of the same model")
            })?;
            let new = edit.kept_below(from_start);
            let remaining = (edit.remaining() + self.beyond) as i64;
            let new = if index < 0 { new as i64 - remaining - 1 } else { new as i64 };
            self.replace(position, new.to_string());
        }
        Ok(())
    }

    fn whole_number(&self, node: &JsonNode, path: &str) -> Result<usize> {
        node.as_usize().ok_or_else(|| {
            let found = self.document.text().get(node.span.clone()).unwrap_or_default();
            self.error(path, format!("is {found}, expected a whole number"))
                .remedy("correct the config, or take the key out if the model does not need it")
        })
    }

    fn expect_length(&self, length: usize, path: &str) -> Result<()> {
        if length == self.edit.total {
            return Ok(());
        }
        let problem = format!("has {length} entries, expected one for each of the {} layers", self.edit.total);
        Err(self.error(path, problem).remedy("config and graph must be of the same model"))
    }
}

/// `layer_types` of a section, empty where it has none.
fn kinds_of(section: &JsonNode) -> Vec<&str> {
    let kinds = section.get("layer_types").and_then(JsonNode::elements).unwrap_or_default();
    kinds.iter().map(|kind| kind.as_str().unwrap_or_default()).collect()
}

fn ends_with_path(path: &str, tail: &str) -> bool {
    path.strip_suffix(tail).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

#[cfg(test)]
#[path = "layers_tests.rs"]
mod tests;
