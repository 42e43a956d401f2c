"""LLaVA-1.5 and LLaVA-OneVision: one square tile, the first tile of any-resolution, or all of them."""
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


class TilesTower(torch.nn.Module):
    """All tiles of one picture `[1, T, 3, H, W]` and its size `[1, 2]` -> the features that stand in the prompt `[N, D]`.

    The tower and the plan of the packing are traced, and computed as tensors where Hugging Face computes with Python's
    numbers. The packing itself is a script, because what it does depends on the plan.
    """

    def __init__(self, model):
        super().__init__()
        config = model.config
        self.tiles = towers.TileTower(model.vision_tower, model.multi_modal_projector, config.vision_feature_layer)
        self.tile = config.vision_config.image_size
        self.edge = self.tile // config.vision_config.patch_size
        self.most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        self.newline = model.image_newline
        self.register_buffer("resolutions", torch.tensor(config.image_grid_pinpoints, dtype=torch.float64))

    def best_resolution(self, height, width):
        """The resolution `[2]` that keeps the most pixels; of several, the first that wastes the fewest."""
        heights, widths = self.resolutions[:, 0], self.resolutions[:, 1]
        scale = torch.minimum(widths / width, heights / height)
        kept = torch.minimum(torch.floor(width * scale) * torch.floor(height * scale), width * height)
        wasted = widths * heights - kept
        wasted = torch.where(kept == torch.max(kept, 0, keepdim=True).values, wasted, torch.full_like(wasted, torch.inf))
        return self.resolutions[torch.argmin(wasted, 0, keepdim=True)][0]

    def plan(self, image_sizes):
        """Rows and columns of tiles; rows and columns of features cut off at each end; the size that they are scaled to.

        Every number is a tensor `[1]` of doubles: the exporter makes single precision of tensors without axes.
        """
        sizes = image_sizes[0].to(torch.float64)
        height, width = sizes[:1], sizes[1:]
        grid = self.best_resolution(height, width) / self.tile
        rows, columns = grid[:1] * self.edge, grid[1:] * self.edge
        # Rounded to seven digits before it is cut, as Hugging Face does.
        whole = lambda edge: torch.floor(torch.round(edge * 1e7) / 1e7)
        wide = width / height > columns / rows
        above = torch.floor((rows - whole(height * (columns / width))) / 2)
        beside = torch.floor((columns - whole(width * (rows / height))) / 2)
        none = torch.zeros_like(above)
        cut = torch.cat([torch.where(wide, above, none), torch.where(wide, none, beside)])
        kept = torch.cat([rows, columns]) - 2 * cut
        ratio = torch.sqrt(kept[:1] * kept[1:] / (self.most * self.edge**2))
        # Python's `//`, which is exact.
        small = torch.round((kept - torch.fmod(kept, ratio)) / ratio)
        size = torch.where(ratio > 1.1, small, kept)
        return grid.to(torch.int64), cut.to(torch.int64), size.to(torch.int64)

    def forward(self, pixel_values, image_sizes):
        features = self.tiles(pixel_values.flatten(0, 1))
        return packed(features, self.newline, self.edge, *self.plan(image_sizes))


@torch.jit.script
def packed(features, newline, edge: int, grid, cut, size):
    """Hugging Face's `pack_image_features` of one picture whose plan is known."""
    if features.size(0) == 1:
        return torch.cat([features[0], newline[None]])
    rows, columns = int(grid[0]), int(grid[1])
    width = features.size(2)
    tiles = features[1:].reshape(rows, columns, edge, edge, width)
    joined = tiles.permute(4, 0, 2, 1, 3).reshape(width, rows * edge, columns * edge)
    above, beside = int(cut[0]), int(cut[1])
    joined = joined[:, above : rows * edge - above, beside : columns * edge - beside]
    high, wide = int(size[0]), int(size[1])
    if joined.size(1) != high or joined.size(2) != wide:
        joined = torch.nn.functional.interpolate(joined[None], [high, wide], mode="bilinear")[0]
    joined = torch.cat([joined, newline[:, None, None].expand(width, high, 1)], dim=2)
    return torch.cat([features[0], joined.flatten(1).transpose(0, 1)])


def tiles_tower(model, size):
    return towers.Tower(
        TilesTower(model),
        {"pixel_values": torch.randn(1, 7, 3, size, size), "image_sizes": torch.tensor([[2 * size - 3, 3 * size]])},
        {"pixel_values": {1: "num_tiles"}, "image_features": {0: "num_image_tokens"}},
    )


def llava_onevision(name="llava_onevision", size=SIZE, tiles=False):
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
    pinpoints = [[size * a, size * b] for a in range(1, 7) for b in range(1, 7)]
    vision = CLIP_VISION | {"num_hidden_layers": 2, "image_size": size}
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**base.TEXT, vocab_size=len(tok), eos_token_id=number("<|im_end|>")),
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
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
        "size": {"height": size, "width": size},
    }
    whole = {
        "image_token": "<image>",
        "num_image_tokens": (size // PATCH) ** 2,
        "video_token": "<video>",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "full",
    }
    processor = (LlavaOnevisionProcessor if tiles else OneTile)(
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

    more = {"nested_images": True, "one_by_one": True} if tiles else {"features": features}
    return base.Family(
        name,
        model,
        processor,
        preprocessor,
        tiles_tower(inner, size) if tiles else towers.tile_tower(module, size),
        processor_config=whole | {"processor_class": "LlavaOnevisionProcessor"},
        **more,
    )


def llava_onevision_tiles():
    """The tiles of any resolution, packed in the graph. Small tiles, so that a photo has more of them than `anyres_max_9`."""
    return llava_onevision("llava_onevision_tiles", 3 * PATCH, tiles=True)


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


ROWS = [llava, llava_projector, llava_single, llava_onevision, llava_onevision_tiles, fast_vlm, moondream]
