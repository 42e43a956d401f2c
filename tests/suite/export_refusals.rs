//! Models that a target does not take: every refusal names the thing, what was found, what is expected, and what to do.

use super::cli::{interlace, stderr};
use super::families::Family;

/// Archive, model in it, target, and the parts of the message: the thing with what was found, what is expected, what to do.
const REFUSED: &[(&str, &str, &str, [&str; 3])] = &[
    (
        "gemma3",
        "gemma3_two_way",
        "genai",
        [
            "`token_type_ids` (",
            "holds token types, and ONNX Runtime GenAI feeds a decoder embeddings",
            "`--to generate` or",
        ],
    ),
    (
        "paligemma",
        "paligemma_two_way",
        "genai",
        ["`token_type_ids` (", "mask, positions and caches alone", "`--to generate` or `--to triton`"],
    ),
    (
        "gemma3n",
        "gemma3n",
        "genai",
        ["`per_layer_inputs` (", "holds embeddings for each layer, and ONNX Runtime GenAI feeds", "`--to generate` or"],
    ),
    (
        "gemma4",
        "gemma4",
        "genai",
        ["`per_layer_inputs` (", "holds embeddings for each layer, and ONNX Runtime GenAI feeds", "`--to generate` or"],
    ),
    (
        "qwen3_vl",
        "qwen3_vl_masked",
        "genai",
        ["`deepstack_features_0` (", "`[batch, tokens, width]` for one level", "packed into `inputs_embeds`"],
    ),
    (
        "lfm2_vl",
        "lfm2_vl",
        "genai",
        ["caches ", "ONNX Runtime GenAI keeps keys and values of every layer", "`--to generate` or"],
    ),
    (
        "glm_ocr",
        "glm_ocr",
        "genai",
        ["positions in three rows", "does not compute for `glm_ocr`", "`--to generate` or `--to triton`"],
    ),
    ("llava", "llava_projector", "genai", ["projector", "is not joined", "export it within the vision encoder"]),
    (
        "gemma3",
        "gemma3_two_way",
        "transformers-js",
        [
            "reads `token_type_ids`",
            "it feeds input_ids, inputs_embeds, attention_mask",
            "`--to generate` or `--to triton`",
        ],
    ),
    (
        "mistral3",
        "mistral3",
        "transformers-js",
        ["reads `image_sizes`", "never feeds", "one view of a picture of one size, or use `--to generate`"],
    ),
    (
        "aya_vision",
        "aya_vision",
        "transformers-js",
        ["model type `aya_vision`", "of pictures and text it has gemma3, gemma3n", "`--to generate`, `--to triton`"],
    ),
    ("janus", "janus", "generate", ["reads ", "expected `input_ids` alone", "use the components of another target"]),
    (
        "llava",
        "llava_single",
        "generate",
        [
            "`pixel_values` (",
            "feeds embeddings or token ids, mask, positions, caches",
            "use the components of another target",
        ],
    ),
];

#[test]
fn every_refusal_names_the_thing_what_is_expected_and_what_to_do() {
    for (archive, name, target, parts) in REFUSED {
        let family = Family::open(archive, name);
        let output = interlace(family.here(), &["export", name, "--to", target, "-o", "out"]);
        assert_eq!(output.status.code(), Some(2), "{name} {target}: {}", stderr(&output));
        for part in parts {
            assert!(stderr(&output).contains(part), "{name} {target}: {part}: {}", stderr(&output));
        }
        assert!(!family.here().join("out").exists(), "{name} {target}");
    }
}

/// What is written instead says in a note why it is less.
#[test]
fn a_repository_of_components_alone_says_why() {
    for (archive, name, why) in
        [("janus", "janus", "expected `input_ids` alone"), ("llava", "llava_projector", "projector")]
    {
        let family = Family::open(archive, name);
        let text = family.run(&["--json", "export", name, "--to", "triton", "-o", "out", "-q"]);
        let found: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let notes = found["notes"].to_string();
        assert!(notes.contains("the client runs the loop") && notes.contains(why), "{name}: {notes}");
    }
}
