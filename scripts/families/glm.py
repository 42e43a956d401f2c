"""GLM-4.1V and GLM-OCR: Qwen's patches and grids with other tokens, towers that merge by a convolution."""
import torch
from transformers import Glm4vProcessor, Glm46VProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor

import base
import towers

SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
SPECIAL += ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>"]
TEMPLATE = """{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '<|assistant|>\\n' }}
{%- for part in message.content if part.type == 'text' -%}
{{ part.text }}
{%- endfor -%}
{%- else -%}
{{ '<|' + message.role + '|>\\n' }}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<|begin_of_image|><|image|><|end_of_image|>' }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>\\n' }}
{%- endif -%}"""


class GlmTower(towers.GridTower):
    """Position embeddings are sampled by the size of each patch's own picture."""

    def forward(self, pixel_values, grid):
        counts = grid[:, 0] * grid[:, 1] * grid[:, 2]
        embeddings = getattr(self.tower, "embeddings", None)
        if embeddings is not None and not hasattr(embeddings, "whole"):
            embeddings.whole = embeddings.forward
        if embeddings is not None:
            embeddings.forward = lambda hidden, _, shapes, row, column: embeddings.whole(hidden, counts, shapes, row, column)
        return super().forward(pixel_values, grid)


def row(name, family, seed, processor, images, video, kind):
    import transformers

    tok = base.tokenizer(SPECIAL, eos="<|endoftext|>", pad="<|endoftext|>")
    number = tok.convert_tokens_to_ids
    rotary = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = base.TEXT | {"vocab_size": len(tok), "rope_parameters": rotary}
    text |= {"eos_token_id": [number("<|endoftext|>"), number("<|user|>")], "pad_token_id": number("<|endoftext|>")}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "image_size": 56,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "hidden_act": "silu",
    }
    if family == "GlmOcr":
        text |= {"head_dim": 16}
    config = getattr(transformers, family + "Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<|image|>"),
        video_token_id=number("<|video|>"),
        image_start_token_id=number("<|begin_of_image|>"),
        image_end_token_id=number("<|end_of_image|>"),
        video_start_token_id=number("<|begin_of_video|>"),
        video_end_token_id=number("<|end_of_video|>"),
        tie_word_embeddings=False,
    )
    model = base.fill(getattr(transformers, family + "ForConditionalGeneration")(config), seed)
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
        "merge_size": 2,
        "patch_size": 14,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 112 * 112 * 2, "shortest_edge": 56 * 56 * 2},
        "temporal_patch_size": 2,
    }
    whole = processor(image_processor=images(**settings), tokenizer=tok, video_processor=video(), chat_template=TEMPLATE)
    preprocessor = settings | {"image_processor_type": kind, "processor_class": processor.__name__}
    tower = towers.grid_tower(model.model.visual, 2, 3 * 2 * 14 * 14, kind=GlmTower)
    return base.Family(
        name,
        model,
        whole,
        preprocessor,
        tower,
        position_rows=3,
        decoder_exporter="dyn18",
        generation={"eos_token_id": [number("<|endoftext|>"), number("<|user|>")]},
    )


def glm4v(name="glm4v"):
    """Answers end without a token of their own; generation ends where the next user begins."""
    return row(name, "Glm4v", 21, Glm4vProcessor, Glm4vImageProcessorPil, Glm4vVideoProcessor, "Glm4vImageProcessor")


def glm_ocr(name="glm_ocr"):
    return row(name, "GlmOcr", 22, Glm46VProcessor, Glm46VImageProcessorPil, Glm46VVideoProcessor, "Glm46VImageProcessor")


ROWS = [glm4v, glm_ocr]
