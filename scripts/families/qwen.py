"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed patches, grids, positions in three rows, DeepStack."""
import torch
from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

import base
import decoders
import towers

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = """{%- for message in messages -%}
{%- if loop.first and message.role != 'system' and default_system -%}
{{ '<|im_start|>system\\n' + default_system + '<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}"""
SYSTEM = "{%- set default_system = 'You are a helpful assistant.' -%}"


def tokenizer():
    return base.tokenizer(SPECIAL, eos="<|im_end|>", pad="<|endoftext|>")


def ids(tok):
    number = tok.convert_tokens_to_ids
    return {
        "image_token_id": number("<|image_pad|>"),
        "video_token_id": number("<|video_pad|>"),
        "vision_start_token_id": number("<|vision_start|>"),
        "vision_end_token_id": number("<|vision_end|>"),
    }


def text(tok, **more):
    number = tok.convert_tokens_to_ids
    rotary = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    ends = {"bos_token_id": number("<|endoftext|>"), "eos_token_id": number("<|im_end|>"), "pad_token_id": None}
    return base.TEXT | {"vocab_size": len(tok), "rope_parameters": rotary} | ends | more


VISION = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}


def clip(patch, small, large):
    return {
        "min_pixels": small,
        "max_pixels": large,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
    }


def row(name, model, tok, processor, video, settings, preprocessor, template, tower, **more):
    images = Qwen2VLImageProcessorPil(**settings)
    whole = processor(image_processor=images, tokenizer=tok, video_processor=video, chat_template=template)
    return base.Family(name, model, whole, preprocessor, tower, position_rows=3, **more)


def qwen2_vl(name="qwen2_vl"):
    """The vision encoder takes `grid_thw`; config.json has the text part's keys at its top, as in the hub's first form."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tok = tokenizer()
    vision = VISION | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 14}
    config = Qwen2VLConfig(text_config=text(tok), vision_config=vision, tie_word_embeddings=False, **ids(tok))
    model = base.fill(Qwen2VLForConditionalGeneration(config), 7)
    settings = clip(14, 56 * 56, 112 * 112)
    tower = towers.grid_tower(model.model.visual, 2, 3 * 2 * 14 * 14, grid_name="grid_thw")
    preprocessor = settings | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    return row(
        name, model, tok, Qwen2VLProcessor, Qwen2VLVideoProcessor(), settings, preprocessor, SYSTEM + TEMPLATE, tower, flat=True
    )


def qwen2_5_vl(name="qwen2_5_vl", layout="transformers.js"):
    """Windowed attention in the first layer of the tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tok = tokenizer()
    vision = VISION | {
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config=text(tok), vision_config=vision, tie_word_embeddings=False, **ids(tok))
    model = base.fill(Qwen2_5_VLForConditionalGeneration(config), 8)
    settings = clip(14, 56 * 56, 140 * 140)
    tower = towers.grid_tower(model.model.visual, 2, 3 * 2 * 14 * 14, windows=2)
    preprocessor = settings | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    video = Qwen2VLVideoProcessor()
    template = SYSTEM + TEMPLATE
    return row(name, model, tok, Qwen2_5_VLProcessor, video, settings, preprocessor, template, tower, layout=layout)


def qwen2_5_vl_mobius():
    """One folder per graph; the embeddings' graph merges the image features."""
    return qwen2_5_vl("qwen2_5_vl_mobius", layout="mobius")


def qwen2_5_vl_genai():
    """ONNX Runtime GenAI's files and its config, with Hugging Face's beside it."""
    return qwen2_5_vl("qwen2_5_vl_genai", layout="genai")


QWEN3_IMAGES = {
    "size": {"longest_edge": 128 * 128, "shortest_edge": 64 * 64},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
QWEN3_VISION = VISION | {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "patch_size": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1, 2],
}


def qwen3_vl_network(seed, moe):
    import transformers

    tok = tokenizer()
    more = {"head_dim": 16}
    if moe:
        more |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    family = "Qwen3VLMoe" if moe else "Qwen3VL"
    config = getattr(transformers, family + "Config")(
        text_config=text(tok, **more), vision_config=QWEN3_VISION, tie_word_embeddings=False, **ids(tok)
    )
    return tok, base.fill(getattr(transformers, family + "ForConditionalGeneration")(config), seed)


def qwen3_row(name, seed, deepstack=3, moe=False, **more):
    tok, model = qwen3_vl_network(seed, moe)
    if not deepstack:
        # The network as the graphs have it; the config still says otherwise.
        model.model.visual.deepstack_visual_indexes = []
    tower = towers.grid_tower(model.model.visual, 2, 3 * 2 * 16 * 16, deepstack=deepstack, side=4)
    preprocessor = QWEN3_IMAGES | {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}
    return row(
        name, model, tok, Qwen3VLProcessor, Qwen3VLVideoProcessor(), QWEN3_IMAGES, preprocessor, TEMPLATE, tower, **more
    )


def dense_features():
    axes = {0: "batch_size", 1: "sequence_length"}
    return [decoders.Extra(f"deepstack_features_{k}", axes, torch.randn(2, 3, 32)) for k in range(3)]


def qwen3_vl(name="qwen3_vl", seed=9, **more):
    """Features of three tower layers, inputs of the decoder, `[B, T, D]` with zeros where there is text."""
    made = qwen3_row(name, seed, extras=dense_features(), decoder=decoders.DeepStack, counts_layers=True, **more)
    made.shows_video = name == "qwen3_vl"
    return made


def qwen3_vl_masked():
    """Features for the image tokens alone and a mask of their places."""
    mask = decoders.Extra(
        "visual_pos_masks", {0: "batch_size", 1: "sequence_length"}, torch.tensor([[True, False, True], [False, True, True]])
    )
    features = [decoders.Extra(f"deepstack_features_{k}", {0: "num_image_tokens"}, torch.randn(4, 32)) for k in range(3)]
    return qwen3_row(
        "qwen3_vl_masked", 9, extras=[mask, *features], decoder=decoders.MaskedDeepStack, decoder_exporter="dyn18", counts_layers=True
    )


def qwen3_vl_packed():
    """Features behind the embeddings in one wider `inputs_embeds`."""
    return qwen3_row("qwen3_vl_packed", 9, decoder=decoders.PackedDeepStack, counts_layers=True)


def qwen3_vl_plain():
    """Without DeepStack, as transformers.js runs it, under a config that has it."""
    return qwen3_row("qwen3_vl_plain", 9, deepstack=0)


def qwen3_vl_moe():
    return qwen3_vl("qwen3_vl_moe", 10, moe=True)


ROWS = [qwen3_vl, qwen2_vl, qwen2_5_vl, qwen2_5_vl_mobius, qwen2_5_vl_genai, qwen3_vl_masked, qwen3_vl_packed, qwen3_vl_plain, qwen3_vl_moe]
