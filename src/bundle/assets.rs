//! Purposes of the files that are not components.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};

use super::layout::VARIANTS;

/// Purpose of a file other than a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AssetKind {
    /// Read, and rewritten when layers are dropped.
    Config,
    /// Tokenizer, processor and template: copied, with settings that readers other than transformers 5 look for there.
    Tokenizer,
    /// Settings of the exporter or quantiser: copied unchanged.
    Tooling,
    /// Documentation: copied, not part of the digest.
    Documentation,
    /// Record of the steps that interlace has run, and records of exports, which are no longer true of a changed model.
    Record,
    /// Unrelated to the network (remote code, marks of a download, settings of other tools): copied unchanged, listed
    /// in the record, not part of the digest.
    Other,
}

impl AssetKind {
    /// The purpose of a file in a model's folder by its name alone; `None` for unknown names.
    pub fn named(name: &str) -> Option<Self> {
        named(name)
    }

    /// True for licences and notices.
    pub fn is_licence(name: &str) -> bool {
        let upper = name.to_ascii_uppercase();
        ["LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY"].iter().any(|stem| upper.starts_with(stem))
    }
}

/// Name of the manifest in an export's folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Name of the record of an export, beside its manifest.
pub const EXPORT_FILE: &str = "interlace-export.json";

/// Name of the file with the record of interlace's steps.
pub const RECORD_FILE: &str = "interlace.json";

/// Files by exact name, in the folder itself.
const NAMES: &[(&str, AssetKind)] = &[
    ("config.json", AssetKind::Config),
    ("genai_config.json", AssetKind::Config),
    ("export.json", AssetKind::Config),
    ("generation_config.json", AssetKind::Tokenizer),
    ("preprocessor_config.json", AssetKind::Tokenizer),
    ("processor_config.json", AssetKind::Tokenizer),
    ("video_preprocessor_config.json", AssetKind::Tokenizer),
    ("vision_processor.json", AssetKind::Tokenizer),
    ("image_processor.json", AssetKind::Tokenizer),
    ("speech_processor.json", AssetKind::Tokenizer),
    ("tokenizer.json", AssetKind::Tokenizer),
    ("tokenizer_config.json", AssetKind::Tokenizer),
    ("sentencepiece.bpe.model", AssetKind::Tokenizer),
    ("spiece.model", AssetKind::Tokenizer),
    ("special_tokens_map.json", AssetKind::Tokenizer),
    ("chat_template.jinja", AssetKind::Tokenizer),
    ("chat_template.json", AssetKind::Tokenizer),
    ("vocab.json", AssetKind::Tokenizer),
    ("vocab.txt", AssetKind::Tokenizer),
    ("merges.txt", AssetKind::Tokenizer),
    ("added_tokens.json", AssetKind::Tokenizer),
    ("tekken.json", AssetKind::Tokenizer),
    ("ort_config.json", AssetKind::Tooling),
    ("quantize_config.json", AssetKind::Tooling),
    ("quantization_config.json", AssetKind::Tooling),
    ("training_args.bin", AssetKind::Other),
    (".DS_Store", AssetKind::Other),
    (".msc", AssetKind::Other),
    (".mv", AssetKind::Other),
    (".mdl", AssetKind::Other),
    (RECORD_FILE, AssetKind::Record),
    (EXPORT_FILE, AssetKind::Record),
    ("interlace-precision.json", AssetKind::Record),
];

/// Extensions of graphs and of weights in formats that no component reads.
const WEIGHTS: &[&str] = &[
    ".safetensors",
    ".bin",
    ".gguf",
    ".ggml",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".npz",
    ".npy",
    ".ort",
    ".tflite",
    ".pb",
    ".engine",
    ".mlmodel",
    ".onnx_data",
    ".onnx.data",
    ".data",
    ".dat",
    ".weight",
    ".weights",
];

/// Files that file managers leave in a folder.
pub(super) const MARKS: &[&str] = &[".DS_Store", "Thumbs.db", "desktop.ini"];

/// Extensions of text files. External data of a graph may have any name except these.
const TEXTS: &[&str] = &[
    ".txt", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".jinja", ".cfg", ".ini", ".sh", ".py", ".lock", ".csv",
    ".tsv", ".xml", ".log",
];

/// Number of leading bytes that decide whether a file is text.
const HEAD_BYTES: u64 = 64 << 10;

/// The purpose of `path` (relative to `root`, with `/`); `None` when the file may be a graph or weights that no
/// component claims.
///
/// For an unknown name the first bytes decide: text is unrelated to the network, binary content may be weights.
///
/// Errors: `Error::Io` when such a file cannot be read.
pub(super) fn classify(root: &Path, path: &str) -> Result<Option<AssetKind>> {
    match named(path) {
        Some(AssetKind::Other) if path == MANIFEST_FILE && is_own_manifest(&root.join(path)) => {
            Ok(Some(AssetKind::Record))
        }
        Some(kind) => Ok(Some(kind)),
        None if is_graph(path) || is_weights(path) => Ok(None),
        None => Ok(is_text(&root.join(path))?.then_some(AssetKind::Other)),
    }
}

/// True for a manifest that this tool wrote; other tools use the name too.
pub(super) fn is_own_manifest(path: &Path) -> bool {
    #[derive(Deserialize)]
    struct Head {
        tool: String,
        target: String,
    }
    let head = std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<Head>(&bytes).ok());
    head.is_some_and(|head| head.tool.starts_with("interlace ") && !head.target.is_empty())
}

/// The purpose according to the name alone; `None` for unknown names.
pub(super) fn named(path: &str) -> Option<AssetKind> {
    if let Some((_, kind)) = NAMES.iter().find(|(name, _)| *name == path) {
        return Some(*kind);
    }
    if is_graph(path) || is_weights(path) {
        return None;
    }
    let name = path.rsplit('/').next().unwrap_or(path);
    let template = path.starts_with("additional_chat_templates/") && name.ends_with(".jinja");
    // `tokenizer.model.v3` occurs in Mistral's releases.
    if template || path.starts_with("tokenizer.model") || name.ends_with(".tiktoken") {
        return Some(AssetKind::Tokenizer);
    }
    if is_documentation(name) {
        return Some(AssetKind::Documentation);
    }
    (MARKS.contains(&name) || TEXTS.iter().any(|ending| name.ends_with(ending))).then_some(AssetKind::Other)
}

/// Read-me files, licences, pictures, sounds, version-control settings.
fn is_documentation(name: &str) -> bool {
    let (upper, lower) = (name.to_ascii_uppercase(), name.to_ascii_lowercase());
    let stems = ["README", "LICENSE", "LICENCE", "NOTICE", "COPYING", "CITATION", "USE_POLICY", "CHANGELOG"];
    let extensions = [
        ".md", ".rst", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".webm", ".wav",
        ".mp3", ".flac", ".ipynb",
    ];
    let settings = [".gitattributes", ".gitignore", ".gitkeep"];
    stems.iter().any(|stem| upper.starts_with(stem))
        || extensions.iter().any(|extension| lower.ends_with(extension))
        || settings.contains(&name)
}

fn is_graph(path: &str) -> bool {
    path.to_ascii_lowercase().ends_with(".onnx")
}

fn is_weights(path: &str) -> bool {
    let lower = path.to_ascii_lowercase();
    // `model.onnx_data_3`: the fourth file of a graph's data.
    let data = lower.rsplit_once(".onnx_data_").is_some_and(|(_, number)| number.parse::<u32>().is_ok());
    data || WEIGHTS.iter().any(|extension| lower.ends_with(extension))
}

/// True when the first bytes are UTF-8 without control characters that texts do not contain.
fn is_text(path: &Path) -> Result<bool> {
    let failed = |e| Error::io("read", path, e);
    let mut head = Vec::new();
    File::open(path).map_err(failed)?.take(HEAD_BYTES).read_to_end(&mut head).map_err(failed)?;
    let text = match std::str::from_utf8(&head) {
        Ok(text) => text,
        // A character may be cut off at the end of the bytes read.
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&head[..error.valid_up_to()]).unwrap_or_default()
        }
        Err(_) => return Ok(false),
    };
    Ok(!text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t' | '\u{c}' | '\u{1b}')))
}

/// The error for a file that may be part of the network and that no component claims. `layout` is the folder's layout;
/// `unreadable` names a component whose list of weights could not be read.
pub(super) fn unclaimed(root: &Path, path: &str, layout: &str, unreadable: Option<&str>) -> Error {
    let subject = format!("file `{path}` in `{}`", root.display());
    let name = path.rsplit('/').next().unwrap_or(path);
    if is_graph(path) && name.starts_with("encoder_model") {
        let problem = "is the encoder of an encoder-decoder, whose decoder reads it by cross-attention";
        return Error::unsupported(subject, problem).remedy(
            "layers can be dropped from models whose decoder reads pictures as tokens; Florence-2, Donut, Whisper and \
             the like are none",
        );
    }
    let mut problem = format!("nothing is known about it in a {layout} folder");
    if let Some(unreadable) = unreadable {
        problem.push_str(&format!(", and {unreadable}"));
    }
    Error::invalid(subject, problem).remedy(remedy_for(path))
}

/// The likely reason for such a file, and the remedy.
fn remedy_for(path: &str) -> String {
    if is_graph(path) {
        return format!(
            "component files are named STEM.onnx or STEM_VARIANT.onnx with a variant of {}; move it out of the folder, \
             or give the path of this one file",
            VARIANTS.iter().skip(1).copied().collect::<Vec<_>>().join(", ")
        );
    }
    if is_weights(path) {
        return "no graph in the folder reads it, and weights in another format would no longer match the pruned \
                network: move the file out of the folder"
            .into();
    }
    "it is no text and no graph reads it, so it may hold weights: move it out of the folder if the model does not need \
     it"
    .into()
}
