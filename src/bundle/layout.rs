//! Which files make a model folder: one row per layout, one row per kind of file.

use serde::{Deserialize, Serialize};

use super::Listing;

/// What a component computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Pixels to image features in the decoder's width.
    VisionEncoder,
    /// Token ids (and, in some layouts, image features) to input embeddings.
    EmbedTokens,
    /// The language model, prefill and cached decode in one graph.
    Decoder,
    /// The language model's prefill, without cache inputs.
    DecoderPrefill,
    /// The language model's cached decode step.
    DecoderWithPast,
    /// The vision encoder's features to the decoder's width, where it is a file of its own.
    Projector,
    /// The language model's last hidden state to logits, where it is a file of its own.
    LmHead,
}

impl Role {
    /// True when the component holds the language model's layers.
    pub fn is_decoder(self) -> bool {
        matches!(self, Role::Decoder | Role::DecoderPrefill | Role::DecoderWithPast)
    }

    /// As messages and reports show it.
    pub fn name(self) -> &'static str {
        match self {
            Role::VisionEncoder => "vision_encoder",
            Role::EmbedTokens => "embed_tokens",
            Role::Decoder => "decoder",
            Role::DecoderPrefill => "decoder_prefill",
            Role::DecoderWithPast => "decoder_with_past",
            Role::Projector => "projector",
            Role::LmHead => "lm_head",
        }
    }
}

/// How a layout says which ONNX files are which.
#[derive(Clone, Copy, Debug)]
pub(super) enum Components {
    /// By path without suffix and extension.
    Stems(&'static [(&'static str, Role)]),
    /// By `model.decoder.filename` and its sisters in `genai_config.json`.
    GenaiConfig,
    /// By `components` in `export.json`.
    ExportJson,
}

/// One kind of model folder.
#[derive(Debug)]
pub struct Layout {
    /// As messages and reports show it.
    pub name: &'static str,
    pub(super) applies: fn(&Listing) -> bool,
    pub(super) components: Components,
}

/// All layouts, the first that applies wins.
pub(super) const LAYOUTS: &[Layout] = &[
    Layout { name: "genai", applies: |listing| listing.has("genai_config.json"), components: Components::GenaiConfig },
    Layout {
        name: "transformers-exporter",
        applies: |listing| listing.has("export.json"),
        components: Components::ExportJson,
    },
    Layout {
        name: "transformers.js",
        applies: |listing| listing.any(|path| path.starts_with("onnx/") && path.ends_with(".onnx")),
        components: Components::Stems(&[
            ("onnx/vision_encoder", Role::VisionEncoder),
            ("onnx/embed_tokens", Role::EmbedTokens),
            ("onnx/decoder_model_merged", Role::Decoder),
            ("onnx/decoder_model", Role::DecoderPrefill),
            ("onnx/decoder_with_past_model", Role::DecoderWithPast),
            ("onnx/model", Role::Decoder),
        ]),
    },
    Layout {
        name: "mobius",
        applies: |listing| listing.has("decoder/model.onnx") || listing.has("model/model.onnx"),
        components: Components::Stems(&[
            ("vision/model", Role::VisionEncoder),
            ("vision_encoder/model", Role::VisionEncoder),
            ("embedding/model", Role::EmbedTokens),
            ("decoder/model", Role::Decoder),
            ("model/model", Role::Decoder),
        ]),
    },
    Layout {
        name: "optimum",
        applies: |listing| listing.any(|path| !path.contains('/') && path.ends_with(".onnx")),
        components: Components::Stems(&[
            ("vision_encoder", Role::VisionEncoder),
            ("embed_tokens", Role::EmbedTokens),
            ("decoder_model_merged", Role::Decoder),
            ("decoder_model", Role::DecoderPrefill),
            ("decoder_with_past_model", Role::DecoderWithPast),
            ("model", Role::Decoder),
        ]),
    },
];

/// A lone `.onnx` file; everything else beside it is left alone.
pub(super) const SINGLE_FILE: Layout =
    Layout { name: "single file", applies: |_| false, components: Components::Stems(&[]) };

/// Precision variants, by the suffix that stands between stem and extension.
pub(super) const VARIANTS: &[&str] =
    &["", "fp16", "bf16", "q4", "q4f16", "q8", "quantized", "int8", "uint8", "bnb4", "optimized"];

/// What a file other than a component is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AssetKind {
    /// Read and, for dropped layers, rewritten.
    Config,
    /// Tokenizer, processor and template: carried over as they are.
    Tokenizer,
    /// Settings of the exporter or quantiser: carried over as they are.
    Tooling,
    /// For people: carried over, not part of the digest.
    Documentation,
    /// What interlace did so far.
    Record,
}

/// The name of the file that holds what interlace did.
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
    ("tokenizer.model", AssetKind::Tokenizer),
    ("sentencepiece.bpe.model", AssetKind::Tokenizer),
    ("spiece.model", AssetKind::Tokenizer),
    ("special_tokens_map.json", AssetKind::Tokenizer),
    ("chat_template.jinja", AssetKind::Tokenizer),
    ("chat_template.json", AssetKind::Tokenizer),
    ("vocab.json", AssetKind::Tokenizer),
    ("vocab.txt", AssetKind::Tokenizer),
    ("merges.txt", AssetKind::Tokenizer),
    ("added_tokens.json", AssetKind::Tokenizer),
    ("ort_config.json", AssetKind::Tooling),
    ("quantize_config.json", AssetKind::Tooling),
    ("quantization_config.json", AssetKind::Tooling),
    (RECORD_FILE, AssetKind::Record),
];

/// What `path` (relative, with `/`) is for; `None` when nobody claims it.
pub(super) fn classify(path: &str) -> Option<AssetKind> {
    if let Some((_, kind)) = NAMES.iter().find(|(name, _)| *name == path) {
        return Some(*kind);
    }
    is_documentation(path).then_some(AssetKind::Documentation)
}

/// Read-me files, licences, pictures, version-control settings.
fn is_documentation(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let upper = name.to_ascii_uppercase();
    let stems = ["README", "LICENSE", "LICENCE", "NOTICE", "COPYING", "CITATION", "USE_POLICY", "CHANGELOG"];
    let extensions = [".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"];
    let settings = [".gitattributes", ".gitignore", ".gitkeep"];
    stems.iter().any(|stem| upper.starts_with(stem))
        || extensions.iter().any(|extension| name.to_ascii_lowercase().ends_with(extension))
        || settings.contains(&name)
}

/// Why a file that nobody claims is often there, and what to do about it.
pub(super) fn remedy_for(path: &str) -> String {
    let weights = [".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack"];
    if weights.iter().any(|extension| path.ends_with(extension)) {
        return "weights in another format would no longer match the pruned network: move the file out of the folder"
            .into();
    }
    if path.ends_with(".onnx") {
        return format!(
            "component files are named STEM.onnx or STEM_VARIANT.onnx with a variant of {}; move it out of the folder, \
             or give the path of this one file",
            VARIANTS.iter().skip(1).copied().collect::<Vec<_>>().join(", ")
        );
    }
    "move it out of the folder if the model does not need it".into()
}
