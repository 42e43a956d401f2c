//! The model card of a changed model: the old card with a preface about the changes.

use std::fs;
use std::path::Path;

use super::record::RecordedStep;
use super::tower::Tower;

/// Markers around the preface, which let a later step replace it. The first marker also holds the base model's name.
const BEGIN: &str = "<!-- interlace: made from ";
const BEGIN_END: &str = " -->\n";
const END: &str = "<!-- interlace: end -->\n";

/// True for model cards.
pub fn is_card(file: &str) -> bool {
    let upper = file.to_ascii_uppercase();
    let stems = ["README", "MODEL_CARD", "MODELCARD"];
    !file.contains('/') && upper.ends_with(".MD") && stems.iter().any(|stem| upper.starts_with(stem))
}

/// The card with a preface about `history`, after its YAML front matter if it has one. An existing preface is replaced
/// and its base model kept; otherwise the base model is `base`.
pub(super) fn with_preface(card: &str, base: &str, history: &[RecordedStep], tool: &str) -> String {
    let (front, rest) = card.split_at(front_matter_length(card));
    let (old_base, rest) = without_preface(rest);
    let base = old_base.unwrap_or(base).replace(['<', '>', '`', '\n'], "_");
    let mut lines =
        vec![format!("**This is not the model that the text below describes.** It was made from `{base}` by {tool}:")];
    lines.extend(changes(history));
    lines.push("Figures, sizes and claims below are those of the model before these changes.".into());
    let quoted: String = lines.iter().map(|line| format!("> {line}\n")).collect();
    let gap = if front.is_empty() { "" } else { "\n" };
    format!("{front}{gap}{BEGIN}{base}{BEGIN_END}{quoted}{END}\n{}", rest.trim_start_matches(['\r', '\n']))
}

/// The changes of a history, one list entry each.
pub fn changes(history: &[RecordedStep]) -> Vec<String> {
    let mut lines: Vec<String> =
        [Tower::Text, Tower::Vision].into_iter().filter_map(|tower| removed(tower, history)).collect();
    let pruned = !lines.is_empty();
    let list = |layers: &[usize]| layers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    for step in history {
        if let RecordedStep::Prune { mlps, bridged, .. } = step {
            let removed = format!("- MLPs removed, with attention kept, in layers {}, counted from 0.", list(mlps));
            lines.extend((!mlps.is_empty()).then_some(removed));
            let added = format!("- nodes that make up for removed layers added behind layers {}.", list(bridged));
            lines.extend((!bridged.is_empty()).then_some(added));
        }
        if let RecordedStep::Finetune { layers, connector, samples, .. } = step {
            let of = if pruned { "remaining layers" } else { "layers of the language model" };
            let with = if *connector { " and the connector" } else { "" };
            lines.push(format!("- {} of the {of}{with} trained on {samples} samples.", layers.len()));
        }
        if let RecordedStep::Quantise { precisions } = step {
            lines.push(format!("- Written in the precisions {} too.", precisions.join(", ")));
        }
        if let RecordedStep::Vocabulary { kept, of } = step {
            lines.push(format!(
                "- The head has {kept} of {of} tokens, those of one domain. The others are never written."
            ));
        }
        if let RecordedStep::Pictures { keys } = step {
            let keys: Vec<String> = keys.iter().map(|(key, value)| format!("`{key}` is {value}")).collect();
            lines.push(format!("- Pictures have fewer tokens: {} in the image processor's config.", keys.join(", ")));
        }
        if let RecordedStep::ImageTokens { keep } = step {
            lines.push(match *keep < 1.0 {
                true => {
                    format!("- {}% of each picture's tokens are read, chosen by `token_pruner.onnx`.", 100.0 * keep)
                }
                false => "- All of each picture's tokens are read.".to_string(),
            });
        }
        if let RecordedStep::Graft { tensors } = step {
            lines.push(format!("- {tensors} tensors of a finetuned checkpoint written into the graphs."));
        }
    }
    lines
}

/// The YAML front matter of a card, fences included; empty without one.
pub fn front_matter(card: &str) -> &str {
    card.split_at(front_matter_length(card)).0
}

/// The base model that a card's preface names.
pub fn base_in_card(card: &str) -> Option<&str> {
    without_preface(card.split_at(front_matter_length(card)).1).0
}

/// One line about all layers removed from a tower.
fn removed(tower: Tower, history: &[RecordedStep]) -> Option<String> {
    let mut all = Vec::new();
    let mut total = None;
    for step in history {
        if let RecordedStep::Prune { tower: of, layers_before, dropped_original, .. } = step
            && *of == tower
        {
            total.get_or_insert(*layers_before);
            all.extend_from_slice(dropped_original);
        }
    }
    let total = total.filter(|_| !all.is_empty())?;
    all.sort_unstable();
    let list = all.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let (noun, name) = (
        if all.len() == 1 { "layer" } else { "layers" },
        match tower {
            Tower::Text => "language model",
            Tower::Vision => "vision encoder",
        },
    );
    Some(format!("- {} of {total} layers of the {name} removed: {noun} {list}, counted from 0.", all.len()))
}

/// Bytes of the block between two lines `---` at the beginning of a card, both lines included.
fn front_matter_length(card: &str) -> usize {
    let mut length = 0;
    for (number, line) in card.split_inclusive('\n').enumerate() {
        let fence = line.trim_end() == "---";
        if number == 0 && !fence {
            return 0;
        }
        length += line.len();
        if number > 0 && fence {
            return length;
        }
    }
    0
}

/// The base model named by an old preface, and the card without that preface.
fn without_preface(card: &str) -> (Option<&str>, &str) {
    let found = card.trim_start_matches(['\r', '\n']).strip_prefix(BEGIN).and_then(|rest| {
        let (base, rest) = rest.split_once(BEGIN_END)?;
        let (_, rest) = rest.split_once(END)?;
        Some((Some(base), rest))
    });
    found.unwrap_or((None, card))
}

/// Name of a model: its name on the hub when the folder is in the hub's cache, otherwise the folder's name.
pub(super) fn name_of(root: &Path) -> String {
    let full = fs::canonicalize(root).unwrap_or_else(|_| root.to_path_buf());
    let folder = || full.file_name().and_then(|name| name.to_str()).map(str::to_string);
    crate::hub::name_of(root).or_else(folder).unwrap_or_else(|| "a local folder".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prune(dropped: &[usize], before: usize) -> RecordedStep {
        let (dropped, dropped_original) = (dropped.to_vec(), dropped.to_vec());
        RecordedStep::Prune {
            tower: Tower::Text,
            layers_before: before,
            dropped,
            dropped_original,
            deepstack: None,
            compensated: Vec::new(),
            bridged: Vec::new(),
            mlps: Vec::new(),
            taps: Vec::new(),
        }
    }

    #[test]
    fn the_preface_after_the_front_matter_lists_the_removed_layers() {
        let card = "---\nlicense: mit\n---\n# Model\n\n97.3 % accuracy\n";
        let first = with_preface(card, "org/name", &[prune(&[2, 5], 8)], "interlace 1");
        assert!(first.starts_with("---\nlicense: mit\n---\n\n<!-- interlace: made from org/name -->\n"), "{first}");
        assert!(first.contains("> - 2 of 8 layers of the language model removed: layers 2, 5, counted from 0.\n"));
        assert!(first.ends_with("<!-- interlace: end -->\n\n# Model\n\n97.3 % accuracy\n"), "{first}");
        // A later step replaces the preface and keeps the first model's name.
        let step = RecordedStep::Finetune {
            layers: vec![1, 2],
            connector: false,
            samples: 40,
            settings: serde_json::Value::Null,
        };
        let second = with_preface(&first, "pruned", &[prune(&[2, 5], 8), step], "interlace 1");
        assert_eq!(second.matches("<!-- interlace: made from org/name -->").count(), 1, "{second}");
        assert!(second.contains("> - 2 of the remaining layers trained on 40 samples.\n"), "{second}");
        assert!(!second.contains("pruned"), "{second}");
        let step = RecordedStep::Finetune {
            layers: vec![0, 1],
            connector: false,
            samples: 40,
            settings: serde_json::Value::Null,
        };
        let whole = with_preface("# Model\n", "name", &[step], "interlace 1");
        assert!(whole.contains("> - 2 of the layers of the language model trained on 40 samples.\n"), "{whole}");
        let bare = with_preface("# Model\n", "name", &[prune(&[1], 8)], "interlace 1");
        assert!(bare.starts_with("<!-- interlace: made from name -->\n> **This is not the model"), "{bare}");
        assert!(bare.contains("removed: layer 1,"), "{bare}");
    }

    #[test]
    fn a_hub_cache_snapshot_is_named_after_its_repository() {
        for (path, want) in [
            ("/no/such/models--org--some--name/snapshots/0abc", "org/some--name"),
            ("/no/such/my-model", "my-model"),
            ("/", "a local folder"),
        ] {
            assert_eq!(name_of(Path::new(path)), want);
        }
    }
}
