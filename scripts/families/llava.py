"""LLaVA-1.5 and LLaVA-OneVision: one square tile, or the first tile of any-resolution."""
import torch
from transformers import LlavaOnevisionProcessor, LlavaProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

import base
import decoders
import towers

SIZE, PATCH = 56, 14
CLIP_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEMPLATE = """{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ message.content[0].text + ' ' }}
{%- else -%}
{{ message.role | upper + ': ' }}
{%- for part in message.content if part.type == 'image' -%}
{{ '<image>\\n' }}
{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}
{{ part.text + ' ' }}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'ASSISTANT:' }}
{%- endif -%}"""


class Selected(torch.nn.Module):
    """What one layer of a tower gives, the class token left out."""

    def __init__(self, tower, layer):
        super().__init__()
        self.tower, self.layer = tower, layer

    def forward(self, pixel_values):
        return self.tower(pixel_values, output_hidden_states=True).hidden_states[self.layer][:, 1:]


def llava(name="llava", layout="transformers.js"):
    """LLaVA-1.5: the last layer but one of a CLIP tower without its class token; answers end without a token."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tok = base.tokenizer(["<unk>", "<s>", "</s>", "<image>", "<pad>"], eos="</s>", bos="<s>", pad="<pad>", add_bos=True)
    number = tok.convert_tokens_to_ids
    text = LlamaConfig(**base.TEXT, vocab_size=len(tok), bos_token_id=number("<s>"), eos_token_id=number("</s>"))
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**CLIP_VISION),
        image_token_index=number("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = base.fill(LlavaForConditionalGeneration(config), 11)
    settings = {
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": SIZE},
    }
    whole = {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": PATCH}
    whole |= {"vision_feature_select_strategy": "default"}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**settings), tokenizer=tok, chat_template=TEMPLATE, **whole
    )
    inner = model.model
    tower = towers.tile_tower(towers.TileTower(inner.vision_tower, inner.multi_modal_projector, -2, 1), SIZE)
    preprocessor = settings | {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    more = {}
    if layout == "transformers-exporter":
        tower = towers.tile_tower(Selected(inner.vision_tower, -2), SIZE)
        axes = {"image_features": {0: "num_tiles"}, "projected_features": {0: "num_tiles"}}
        example = {"image_features": torch.randn(2, (SIZE // PATCH) ** 2, CLIP_VISION["hidden_size"])}
        more["projector"] = towers.Tower(inner.multi_modal_projector, example, axes, ["projected_features"])
    if layout == "single":
        pixels = {0: "num_tiles"}
        more["extras"] = [decoders.Extra("pixel_values", pixels, torch.randn(1, 3, SIZE, SIZE))]
        more["decoder"] = decoders.Whole
    processor_config = whole | {"processor_class": "LlavaProcessor"}
    return base.Family(
        name, model, processor, preprocessor, tower, processor_config=processor_config, layout=layout, **more
    )


def llava_projector():
    """The projector as a graph of its own, as the exporter of transformers writes it."""
    return llava("llava_projector", "transformers-exporter")


def llava_single():
    """The whole network in one graph, which reads ids and pixels."""
    return llava("llava_single", "single")


ONEVISION_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + ' ' }}
{%- for part in message.content if part.type == 'image' -%}
{{ '<image>' }}
{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}
{{ '\\n' + part.text }}
{%- endfor -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}"""


class OneTile(LlavaOnevisionProcessor):
    """Every picture as its first tile alone, the whole of it, which is what transformers.js feeds."""

    def replace_image_token(self, image_inputs, image_idx, **_):
        return self.image_token * self.num_image_tokens

    def __call__(self, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        if "pixel_values" in made:
            made["pixel_values"] = made["pixel_values"][:, 0].contiguous()
            for name in ("image_sizes", "batch_num_images"):
                made.pop(name, None)
        return made


def llava_onevision(name="llava_onevision"):
    """One tile a picture; a finished answer is written differently from the place where a prompt ends."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tok = base.tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>")
    number = tok.convert_tokens_to_ids
    pinpoints = [[SIZE * a, SIZE * b] for a in range(1, 7) for b in range(1, 7)]
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**base.TEXT, vocab_size=len(tok), eos_token_id=number("<|im_end|>")),
        vision_config=SiglipVisionConfig(**(CLIP_VISION | {"num_hidden_layers": 2}), vision_use_head=False),
        image_token_index=number("<image>"),
        video_token_index=number("<video>"),
        vision_feature_layer=-1,
        image_grid_pinpoints=pinpoints,
    )
    model = base.fill(LlavaOnevisionForConditionalGeneration(config), 12)
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": pinpoints,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": SIZE, "width": SIZE},
    }
    whole = {
        "image_token": "<image>",
        "num_image_tokens": (SIZE // PATCH) ** 2,
        "video_token": "<video>",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "full",
    }
    processor = OneTile(
        image_processor=LlavaOnevisionImageProcessorPil(**settings),
        tokenizer=tok,
        video_processor=LlavaOnevisionVideoProcessor(),
        chat_template=ONEVISION_TEMPLATE,
        **whole,
    )
    inner = model.model
    module = towers.TileTower(inner.vision_tower, inner.multi_modal_projector, -1)
    preprocessor = settings | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
    }

    def features(pixel_values, **_):
        """One tile a picture, without the new-line feature."""
        with torch.no_grad():
            return module(pixel_values).flatten(0, 1)

    return base.Family(
        name,
        model,
        processor,
        preprocessor,
        towers.tile_tower(module, SIZE),
        processor_config=whole | {"processor_class": "LlavaOnevisionProcessor"},
        features=features,
    )


class FlatMap(torch.nn.Module):
    """A convolutional tower whose map `[N, D, H, W]` is read row by row."""

    def __init__(self, model):
        super().__init__()
        self.tower, self.projector = model.vision_tower.timm_model, model.multi_modal_projector

    def forward(self, pixel_values):
        return self.projector(self.tower.forward_features(pixel_values).flatten(2).permute(0, 2, 1))


def fast_vlm(name="fast_vlm"):
    """A FastViT tower (needs timm), whose map is 64 times smaller than the picture."""
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, Qwen2Config

    tok = base.tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"], eos="<|im_end|>", pad="<|endoftext|>")
    number = tok.convert_tokens_to_ids
    size = 256
    vision = {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci3",
        "do_pooling": True,
        "hidden_size": 64,
        "initializer_range": 0.02,
        "model_args": {"inference_mode": True, "layers": [1, 1, 1, 1, 1], "embed_dims": [8, 8, 16, 32, 32]},
    }
    config = FastVlmConfig(
        text_config=Qwen2Config(**base.TEXT, vocab_size=len(tok), eos_token_id=number("<|im_end|>")),
        vision_config=vision,
        image_token_index=number("<image>"),
        image_seq_length=16,
    )
    model = base.fill(FastVlmForConditionalGeneration(config), 20)
    settings = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": size},
    }
    whole = {"image_token": "<image>", "num_additional_image_tokens": 0, "patch_size": 64}
    whole |= {"vision_feature_select_strategy": "full"}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**settings), tokenizer=tok, chat_template=FAST_TEMPLATE, **whole
    )
    preprocessor = settings | {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    tower = towers.tile_tower(FlatMap(model.model), size)
    return base.Family(
        name, model, processor, preprocessor, tower, processor_config=whole | {"processor_class": "LlavaProcessor"}
    )


FAST_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<image>\\n' }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}"""
MOONDREAM_TEMPLATE = """{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- for part in message.content if part.type == 'image' -%}
{{ '<image>\\n\\n' }}
{%- endfor -%}
{{ 'Question: ' }}
{%- for part in message.content if part.type == 'text' -%}
{{ part.text }}
{%- endfor -%}
{{ '\\n\\nAnswer:' }}
{%- else -%}
{%- for part in message.content if part.type == 'text' -%}
{{ ' ' + part.text }}
{%- endfor -%}
{{ eos_token + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}"""


def moondream(name="moondream"):
    """Moondream's form as transformers.js has it: Phi, whose attention and feed-forward part stand side by side."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PhiConfig, SiglipVisionConfig

    tok = base.tokenizer(["<|endoftext|>", "<image>"], eos="<|endoftext|>", bos="<|endoftext|>", pad="<|endoftext|>")
    number = tok.convert_tokens_to_ids
    end = number("<|endoftext|>")
    text = PhiConfig(
        **base.TEXT, vocab_size=len(tok), partial_rotary_factor=0.5, bos_token_id=end, eos_token_id=end, pad_token_id=end
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=SiglipVisionConfig(**(CLIP_VISION | {"num_hidden_layers": 2}), vision_use_head=False),
        image_token_index=number("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    model = base.fill(LlavaForConditionalGeneration(config), 28)
    settings = {
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": SIZE, "width": SIZE},
    }
    whole = {"image_token": "<image>", "num_additional_image_tokens": 0, "patch_size": PATCH}
    whole |= {"vision_feature_select_strategy": "full"}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**settings), tokenizer=tok, chat_template=MOONDREAM_TEMPLATE, **whole
    )
    inner = model.model
    return base.Family(
        name,
        model,
        processor,
        settings | {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"},
        towers.tile_tower(towers.TileTower(inner.vision_tower, inner.multi_modal_projector, -1), SIZE),
        processor_config=whole | {"processor_class": "LlavaProcessor"},
        config={"model_type": "moondream1"},
    )


ROWS = [llava, llava_projector, llava_single, llava_onevision, fast_vlm, moondream]
