"""InternVL3: tiles on the grid nearest to the picture's shape, a thumbnail last, features shuffled 2 x 2."""
from transformers import InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

import base
import towers

SIZE, PATCH = 56, 14
TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<IMG_CONTEXT>\\n' }}
{%- elif part.type == 'video' -%}
{{ '<video>\\n' }}
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
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def internvl(name="internvl", size=SIZE):
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tok = base.tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>", named=named)
    number = tok.convert_tokens_to_ids
    tokens = (size // PATCH // 2) ** 2
    vision = InternVLVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[size, size],
        patch_size=[PATCH, PATCH],
        use_absolute_position_embeddings=True,
    )
    config = InternVLConfig(
        text_config=Qwen2Config(**base.TEXT, vocab_size=len(tok), eos_token_id=number("<|im_end|>")),
        vision_config=vision,
        image_token_id=number("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
        image_seq_length=tokens,
    )
    model = base.fill(InternVLForConditionalGeneration(config), 15)
    settings = {
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "max_patches": 12,
        "min_patches": 1,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": size, "width": size},
    }
    whole = {"image_seq_length": tokens, "processor_class": "InternVLProcessor"}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(**settings),
        tokenizer=tok,
        video_processor=InternVLVideoProcessor(),
        image_seq_length=tokens,
        chat_template=TEMPLATE,
    )
    tower = towers.tile_tower(towers.Pooled(model.model), size)
    preprocessor = settings | {"image_processor_type": "GotOcr2ImageProcessorFast", "processor_class": "InternVLProcessor"}
    return base.Family(name, model, processor, preprocessor, tower, processor_config=whole)


def internvl_448():
    """As InternVL3 is published: 448 pixels, 256 tokens a tile. For measurements of time; too large for a fixture."""
    return internvl("internvl_448", 448)


ROWS = [internvl]
# Exported when they are named.
MORE = [internvl_448]
