//! Layouts of model folders: one row per layout, one row per kind of file.

use serde::{Deserialize, Serialize};

use super::listing::Listing;

/// Part of the model that a component computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Pixels to image features in the decoder's width.
    VisionEncoder,
    /// Token ids (and, in some layouts, image features or pixels) to input embeddings.
    EmbedTokens,
    /// The language model, prefill and cached decode in one graph.
    Decoder,
    /// The language model's prefill, without cache inputs.
    DecoderPrefill,
    /// The language model's cached decode step.
    DecoderWithPast,
    /// The vision encoder's features to the decoder's width, where it is a file of its own.
    Projector,
    /// Embeddings of a prompt with pictures to the tokens that the decoder reads: leaves image tokens out.
    TokenPruner,
    /// The language model's last hidden state to logits, where it is a file of its own.
    LmHead,
    /// Sounds to features in the decoder's width: carried along, not run.
    AudioEncoder,
    /// A part of drawing pictures (heads and embeddings of picture codes, codes to pixels): carried along, not run.
    ImageGenerator,
}

impl Role {
    /// True when the component holds the language model's layers.
    pub fn is_decoder(self) -> bool {
        matches!(self, Role::Decoder | Role::DecoderPrefill | Role::DecoderWithPast)
    }

    /// True when no verb runs the component. It is copied unchanged.
    pub fn is_carried(self) -> bool {
        matches!(self, Role::AudioEncoder | Role::ImageGenerator)
    }

    /// True when the component has weights, so that it has precision variants.
    pub fn has_weights(self) -> bool {
        self != Role::TokenPruner
    }

    /// Name in messages and reports.
    pub fn name(self) -> &'static str {
        match self {
            Role::VisionEncoder => "vision_encoder",
            Role::EmbedTokens => "embed_tokens",
            Role::Decoder => "decoder",
            Role::DecoderPrefill => "decoder_prefill",
            Role::DecoderWithPast => "decoder_with_past",
            Role::Projector => "projector",
            Role::TokenPruner => "token_pruner",
            Role::LmHead => "lm_head",
            Role::AudioEncoder => "audio_encoder",
            Role::ImageGenerator => "image_generator",
        }
    }
}

/// Rule by which a layout assigns ONNX files to components.
#[derive(Clone, Copy, Debug)]
pub(super) enum Components {
    /// By path without variant suffix and extension.
    Stems(&'static [(&'static str, Role)]),
    /// By `model.decoder.filename` and the corresponding keys of `genai_config.json`.
    GenaiConfig,
    /// By `components` in `export.json`.
    ExportJson,
}

/// One kind of model folder.
#[derive(Debug)]
pub struct FolderLayout {
    /// Name in messages and reports.
    pub name: &'static str,
    /// The tool that writes it, and how its files identify the graphs.
    pub summary: &'static str,
    pub(super) applies: fn(&Listing) -> bool,
    pub(super) components: Components,
}

impl FolderLayout {
    /// True when a component's precision variants differ by the suffix of their files' names.
    pub fn names_variants(&self) -> bool {
        matches!(self.components, Components::Stems(_))
    }
}

/// All layouts. The first one that matches is used.
pub const LAYOUTS: &[FolderLayout] = &[
    FolderLayout {
        name: "genai",
        summary: "ONNX Runtime GenAI: `genai_config.json` names the graphs of `model.decoder`, `vision`, `embedding` and `speech`",
        applies: |listing| listing.has("genai_config.json"),
        components: Components::GenaiConfig,
    },
    FolderLayout {
        name: "transformers-exporter",
        summary: "the exporter of transformers: `export.json` names the components, a projector or a head of its own among them",
        applies: |listing| listing.has("export.json"),
        components: Components::ExportJson,
    },
    FolderLayout {
        name: "transformers.js",
        summary: "onnx-community: `onnx/decoder_model_merged.onnx` or `model.onnx`, `vision_encoder.onnx`, `embed_tokens.onnx` or \
                  `prepare_inputs_embeds.onnx`, each with precision variants",
        applies: |listing| listing.any(|path| path.starts_with("onnx/") && path.ends_with(".onnx")),
        components: Components::Stems(&[
            ("onnx/vision_encoder", Role::VisionEncoder),
            ("onnx/embed_tokens", Role::EmbedTokens),
            ("onnx/prepare_inputs_embeds", Role::EmbedTokens),
            ("onnx/decoder_model_merged", Role::Decoder),
            ("onnx/decoder_model", Role::DecoderPrefill),
            ("onnx/decoder_with_past_model", Role::DecoderWithPast),
            ("onnx/model", Role::Decoder),
            ("onnx/language_model", Role::Decoder),
            ("onnx/multi_modal_projector", Role::Projector),
            ("onnx/lm_head", Role::LmHead),
            ("onnx/audio_encoder", Role::AudioEncoder),
            ("onnx/gen_head", Role::ImageGenerator),
            ("onnx/gen_img_embeds", Role::ImageGenerator),
            ("onnx/image_decode", Role::ImageGenerator),
        ]),
    },
    FolderLayout {
        name: "mobius",
        summary: "Mobius: a folder for each graph, as in `decoder/model.onnx`, `vision_encoder/model.onnx`, `embedding/model.onnx`",
        applies: |listing| listing.has("decoder/model.onnx") || listing.has("model/model.onnx"),
        components: Components::Stems(&[
            ("vision/model", Role::VisionEncoder),
            ("vision_encoder/model", Role::VisionEncoder),
            ("embedding/model", Role::EmbedTokens),
            ("audio_encoder/model", Role::AudioEncoder),
            ("audio/model", Role::AudioEncoder),
            ("speech/model", Role::AudioEncoder),
            ("decoder/model", Role::Decoder),
            ("model/model", Role::Decoder),
        ]),
    },
    FolderLayout {
        name: "optimum",
        summary: "Optimum, and lone graphs beside their configs: the names of onnx-community in the folder itself",
        applies: |listing| listing.any(|path| !path.contains('/') && path.ends_with(".onnx")),
        components: Components::Stems(&[
            ("vision_encoder", Role::VisionEncoder),
            ("embed_tokens", Role::EmbedTokens),
            ("prepare_inputs_embeds", Role::EmbedTokens),
            ("decoder_model_merged", Role::Decoder),
            ("decoder_model", Role::DecoderPrefill),
            ("decoder_with_past_model", Role::DecoderWithPast),
            ("model", Role::Decoder),
            ("language_model", Role::Decoder),
            ("multi_modal_projector", Role::Projector),
            ("lm_head", Role::LmHead),
            ("audio_encoder", Role::AudioEncoder),
            ("gen_head", Role::ImageGenerator),
            ("gen_img_embeds", Role::ImageGenerator),
            ("image_decode", Role::ImageGenerator),
        ]),
    },
];

/// A single `.onnx` file. Other files of its folder are ignored.
pub const SINGLE_FILE: FolderLayout = FolderLayout {
    name: "single file",
    summary: "one `.onnx` file alone",
    applies: |_| false,
    components: Components::Stems(&[]),
};

/// Precision variants, the most precise first, by the suffix between stem and extension.
pub(super) const VARIANTS: &[&str] = &[
    "",
    "optimized",
    "fp16",
    "bf16",
    "q8",
    "quantized",
    "int8",
    "uint8",
    "q4",
    "q4f16",
    "bnb4",
    "q2",
    "q2f16",
    "q1",
    "q1f16",
];
