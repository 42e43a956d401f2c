//! The table of model families: the processor class of each, the support of each verb, and the tests that cover it.

use std::fmt::Write;

/// Support of a family by a verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Supported, with pictures.
    Yes,
    /// Supported on running text and ready tensors only.
    Text,
    /// Not supported.
    No,
}

/// The tests that cover a row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// Names of whole-pipeline tests in `tests/suite/families.rs`.
    Pipeline(&'static [&'static str]),
    /// Only the processor is tested. Its name in `fixtures/processor/families.json`.
    Processor(&'static str),
    /// The processor is that of the named row. The family itself is not tested.
    Shared(&'static str),
    /// Name of another test.
    Test(&'static str),
}

/// One family of models.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Common name.
    pub name: &'static str,
    /// `model_type` in `config.json`.
    pub model_types: &'static [&'static str],
    /// Class in transformers that the processor follows; `None` when pictures are not supported.
    pub class: Option<&'static str>,
    /// Support by each of [`VERBS`], in this order.
    pub reach: [Reach; VERBS.len()],
    /// Tests that cover the row.
    pub proof: Proof,
    /// Special features of the family, or the reason that a verb does not support it.
    pub note: &'static str,
}

/// The verbs of the table, in the order of its columns.
pub const VERBS: [&str; 6] = ["inspect", "prune", "score", "finetune", "eval", "generate"];

const ALL: [Reach; 6] = [Reach::Yes; 6];
const TEXT: [Reach; 6] = [Reach::Yes, Reach::Yes, Reach::Text, Reach::Text, Reach::Text, Reach::Text];
const NONE: [Reach; 6] = [Reach::No; 6];

const fn row(
    name: &'static str,
    model_types: &'static [&'static str],
    class: &'static str,
    proof: Proof,
    note: &'static str,
) -> Family {
    Family { name, model_types, class: Some(class), reach: ALL, proof, note }
}

const fn without(
    name: &'static str,
    model_types: &'static [&'static str],
    reach: [Reach; 6],
    proof: Proof,
    note: &'static str,
) -> Family {
    Family { name, model_types, class: None, reach, proof, note }
}

/// All families.
pub const FAMILIES: &[Family] = &[
    row("Qwen2-VL", &["qwen2_vl"], "Qwen2VLProcessor", Proof::Pipeline(&["qwen2_vl"]), ""),
    row(
        "Qwen2.5-VL",
        &["qwen2_5_vl"],
        "Qwen2VLProcessor",
        Proof::Pipeline(&["qwen2_5_vl", "qwen2_5_vl_in_mobius_layout", "qwen2_5_vl_in_genai_layout"]),
        "transformers.js, Mobius and GenAI layouts",
    ),
    row(
        "Qwen3-VL",
        &["qwen3_vl"],
        "Qwen3VLProcessor",
        Proof::Pipeline(&[
            "qwen3_vl",
            "qwen3_vl_with_a_mask",
            "qwen3_vl_packed",
            "qwen3_vl_without_deepstack",
            "qwen3_vl_reads_a_video",
        ]),
        "DeepStack features as inputs, with a mask, or packed into `inputs_embeds`; videos as frames with times; a warning \
         where the graph lacks DeepStack",
    ),
    row("Qwen3-VL-MoE", &["qwen3_vl_moe"], "Qwen3VLProcessor", Proof::Pipeline(&["qwen3_vl_moe"]), ""),
    row(
        "Qwen3.5",
        &["qwen3_5", "qwen3_5_moe"],
        "Qwen3VLProcessor",
        Proof::Shared("Qwen3-VL"),
        "linear-attention layers keep `past_conv` and `past_recurrent` states",
    ),
    row("LFM3-VL", &["lfm3_vl"], "Qwen2VLProcessor", Proof::Shared("Qwen2-VL"), ""),
    row("SmolVLM, SmolVLM2", &["smolvlm"], "Idefics3Processor", Proof::Pipeline(&["smolvlm"]), "pictures only"),
    row("Idefics3", &["idefics3"], "Idefics3Processor", Proof::Pipeline(&["idefics3"]), "Granite-Docling-258M too"),
    row(
        "Granite-Docling",
        &["granite_docling"],
        "GraniteDoclingProcessor",
        Proof::Pipeline(&["granite_docling"]),
        "DeepStack",
    ),
    row(
        "LLaVA-1.5",
        &["llava", "vipllava"],
        "LlavaProcessor",
        Proof::Pipeline(&["llava", "llava_with_a_projector_of_its_own", "llava_in_one_graph"]),
        "also with a projector of its own, and as one graph of ids and pixels",
    ),
    row(
        "LLaVA-OneVision",
        &["llava_onevision"],
        "LlavaOnevisionProcessor",
        Proof::Pipeline(&["llava_onevision", "llava_onevision_with_tiles"]),
        "one tile of a picture, as transformers.js feeds it; tiles of any resolution where the graph takes `image_sizes` \
         and packs their features",
    ),
    row("FastVLM", &["fast_vlm", "llava_qwen2"], "LlavaProcessor", Proof::Pipeline(&["fast_vlm"]), ""),
    row(
        "Moondream",
        &["moondream1"],
        "LlavaProcessor",
        Proof::Pipeline(&["moondream"]),
        "its own prompt, without a template",
    ),
    row(
        "InternVL3",
        &["internvl"],
        "InternVLProcessor",
        Proof::Pipeline(&["internvl"]),
        "1 to 12 tiles and a thumbnail",
    ),
    row(
        "Gemma 3",
        &["gemma3"],
        "Gemma3Processor",
        Proof::Pipeline(&["gemma3", "gemma3_two_way"]),
        "with and without `token_type_ids`",
    ),
    Family {
        reach: [Reach::Yes, Reach::Yes, Reach::No, Reach::No, Reach::Yes, Reach::Yes],
        ..row(
            "Gemma 3n",
            &["gemma3n"],
            "Gemma3nProcessor",
            Proof::Pipeline(&["gemma3n"]),
            "four residual streams side by side are neither scored nor healed: name layers with `prune --drop`; an audio \
             encoder is carried along",
        )
    },
    row(
        "Gemma 4",
        &["gemma4"],
        "Gemma4Processor",
        Proof::Pipeline(&["gemma4"]),
        "layers from which others read keys are not healed; an audio encoder is carried along",
    ),
    row(
        "PaliGemma 2",
        &["paligemma"],
        "PaliGemmaProcessor",
        Proof::Pipeline(&["paligemma", "paligemma_two_way"]),
        "its own prompt, one question with a picture; with and without `token_type_ids`",
    ),
    row(
        "Mistral 3, Pixtral",
        &["mistral3", "pixtral"],
        "PixtralProcessor",
        Proof::Pipeline(&["mistral3", "mistral3_one_picture_at_a_time"]),
        "with and without `image_sizes`",
    ),
    row("LightOnOCR", &["lighton_ocr"], "PixtralProcessor", Proof::Shared("Mistral 3, Pixtral"), ""),
    row(
        "LFM2-VL",
        &["lfm2_vl"],
        "Lfm2VlProcessor",
        Proof::Pipeline(&["lfm2_vl"]),
        "torchvision pixels: there is no Pillow class",
    ),
    row("GLM-4.1V", &["glm4v"], "Glm4vProcessor", Proof::Pipeline(&["glm4v"]), "pictures only"),
    row("GLM-OCR", &["glm_ocr"], "Glm4vProcessor", Proof::Pipeline(&["glm_ocr"]), "pictures only"),
    row("GLM-4.5V, GLM-4.6V", &["glm4v_moe", "glm46v"], "Glm4vProcessor", Proof::Shared("GLM-4.1V"), ""),
    row("PaddleOCR-VL", &["paddleocr_vl"], "PaddleOCRVLProcessor", Proof::Pipeline(&["paddleocr_vl"]), ""),
    row("Aya-Vision", &["aya_vision"], "AyaVisionProcessor", Proof::Pipeline(&["aya_vision"]), ""),
    row("Ovis2", &["ovis2"], "Ovis2Processor", Proof::Pipeline(&["ovis2"]), ""),
    row(
        "MiniCPM-V 4.6",
        &["minicpmv4_6", "minicpmv4_7"],
        "MiniCPMV4_6Processor",
        Proof::Pipeline(&["minicpm_v"]),
        "pictures only; compared with Qwen 3 as its text part, where the published model has Qwen 3.5",
    ),
    row(
        "Janus",
        &["janus", "multi_modality"],
        "JanusProcessor",
        Proof::Pipeline(&["janus"]),
        "`prepare_inputs_embeds` and a head of its own; what draws pictures is carried along",
    ),
    row("DeepSeek-VL", &["deepseek_vl"], "DeepseekVLProcessor", Proof::Processor("deepseek_vl"), ""),
    without(
        "Phi-3.5-vision",
        &["phi3_v"],
        TEXT,
        Proof::Test("families_without_a_processor_run_on_text_with_a_warning"),
        "its processor is code of its own repository, which transformers does not have",
    ),
    without(
        "MiniCPM-V 2.6",
        &["minicpmv"],
        TEXT,
        Proof::Test("families_without_a_processor_run_on_text_with_a_warning"),
        "its processor is code of its own repository; transformers has that of 4.6",
    ),
    without(
        "Kimi-VL",
        &["kimi_vl"],
        TEXT,
        Proof::Test("families_without_a_processor_run_on_text_with_a_warning"),
        "its processor is code of its own repository, which transformers does not have",
    ),
    without(
        "InternVL as its authors publish it",
        &["internvl_chat"],
        TEXT,
        Proof::Test("families_without_a_processor_run_on_text_with_a_warning"),
        "its processor is code of its own repository; transformers has that of the converted models (`internvl`)",
    ),
    without(
        "DeepSeek-VL2",
        &["deepseek_vl_v2"],
        TEXT,
        Proof::Test("families_without_a_processor_run_on_text_with_a_warning"),
        "its processor is code of its own repository, which transformers does not have",
    ),
    without(
        "Llama 3.2 Vision",
        &["mllama"],
        [Reach::Yes, Reach::Yes, Reach::No, Reach::No, Reach::No, Reach::No],
        Proof::Test("cross_attention_layers_have_a_kind_of_their_own"),
        "pictures come in by cross-attention (`cross_attention_states`), which is not fed",
    ),
    without(
        "Florence-2",
        &["florence2"],
        NONE,
        Proof::Test("an_unclaimed_file_is_refused_by_name"),
        "an encoder-decoder: its layers attend to two sequences",
    ),
    without(
        "Donut",
        &["vision-encoder-decoder"],
        NONE,
        Proof::Test("an_unclaimed_file_is_refused_by_name"),
        "an encoder-decoder: its layers attend to two sequences",
    ),
];

/// The family with this `model_type`.
pub fn family_of(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_types.contains(&model_type))
}

/// The table as Markdown.
pub fn family_table() -> String {
    let mut text = format!(
        "| family | {} | shown by | remarks |\n|---|{}---|---|\n",
        VERBS.join(" | "),
        "---|".repeat(VERBS.len())
    );
    for family in FAMILIES {
        let run = !matches!(family.proof, Proof::Shared(_) | Proof::Processor(_));
        let reach = family.reach.map(|reach| match reach {
            Reach::Yes if run => "yes",
            Reach::Yes => "(yes)",
            Reach::Text => "text",
            Reach::No => "–",
        });
        let proof = match family.proof {
            Proof::Pipeline(_) => "pipeline".to_string(),
            Proof::Processor(_) => "processor".to_string(),
            Proof::Shared(other) => format!("processor of {other}"),
            Proof::Test(_) => "refusal".to_string(),
        };
        let types = family.model_types.iter().map(|kind| format!("`{kind}`")).collect::<Vec<_>>().join(", ");
        let _ = writeln!(text, "| {} ({types}) | {} | {proof} | {} |", family.name, reach.join(" | "), family.note);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_model_type_belongs_to_one_family() {
        let mut seen = HashSet::new();
        for kind in FAMILIES.iter().flat_map(|family| family.model_types) {
            assert!(seen.insert(kind), "{kind}");
        }
    }

    #[test]
    fn a_partly_supported_family_has_a_note() {
        for family in FAMILIES {
            let whole = family.reach == ALL;
            assert!(whole || !family.note.is_empty(), "{}", family.name);
            assert_eq!(family.class.is_some(), family.reach[4] == Reach::Yes, "{}", family.name);
        }
    }
}
