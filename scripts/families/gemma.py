"""Gemma 3 and PaliGemma 2: one square picture, decoders with or without bidirectional attention."""
import torch
from transformers import Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

import base
import decoders
import towers

SIZE, PATCH, TOKENS, WINDOW = 112, 14, 4, 24
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- if message.content is string -%}
{{ message.content | trim }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<start_of_image>' }}
{%- elif part.type == 'text' -%}
{{ part.text | trim }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\\n' }}
{%- endif -%}"""
SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
NAMED = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


class TwoWay(decoders.Decoder):
    """token_type_ids `[B, T]`: places of 1 that touch see each other both ways, as Gemma 3's image tokens do."""

    def groups(self, token_types):
        image = token_types == 1
        before = torch.nn.functional.pad(image[:, :-1].to(torch.int64), (1, 0)) == 1
        number = torch.cumsum((image & ~before).to(torch.int64), 1)
        return torch.where(image, number, torch.zeros_like(number))

    def arguments(self, extras, inputs_embeds, attention_mask, position_ids):
        new, total = inputs_embeds.shape[1], attention_mask.shape[1]
        places = torch.arange(total)
        queries = places[total - new :]
        group = self.groups(extras["token_type_ids"])
        known = torch.nn.functional.pad(group, (total - new, 0))
        together = (group[:, :, None] == known[:, None, :]) & (group[:, :, None] > 0)
        causal = places[None, :] <= queries[:, None]
        near = causal & (queries[:, None] - places[None, :] < self.lm.config.sliding_window)
        real = attention_mask[:, None, :] == 1

        def mask(seen):
            seen = ((seen[None] | together) & real)[:, None]
            return torch.where(seen, 0.0, torch.finfo(torch.float32).min)

        masks = {"full_attention": mask(causal), "sliding_attention": mask(near)}
        return {"inputs_embeds": inputs_embeds, "attention_mask": masks, "position_ids": position_ids}


def token_types():
    example = torch.tensor([[0, 1, 1], [1, 1, 0]])
    return [decoders.Extra("token_type_ids", {0: "batch_size", 1: "sequence_length"}, example)]


def gemma3(name="gemma3", two_way=False):
    """The decoder as it is published sees image tokens one way only."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    tok = base.tokenizer(SPECIAL, eos="<end_of_turn>", bos="<bos>", pad="<pad>", named=NAMED, add_bos=True)
    number = tok.convert_tokens_to_ids
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    text = Gemma3TextConfig(
        **base.TEXT,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=kinds,
        vocab_size=len(tok),
        eos_token_id=number("<end_of_turn>"),
        bos_token_id=number("<bos>"),
        pad_token_id=number("<pad>"),
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=TOKENS,
        image_token_index=number("<image_soft_token>"),
        boi_token_index=number("<start_of_image>"),
        eoi_token_index=number("<end_of_image>"),
        tie_word_embeddings=False,
    )
    model = base.fill(Gemma3ForConditionalGeneration(config), 16)
    settings = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_seq_length": TOKENS,
        "image_std": [0.5, 0.5, 0.5],
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": SIZE, "width": SIZE},
    }
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(**settings),
        tokenizer=tok,
        image_seq_length=TOKENS,
        chat_template=TEMPLATE,
    )
    preprocessor = settings | {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"}
    return base.Family(
        name,
        model,
        processor,
        preprocessor,
        towers.tile_tower(towers.Pooled(model.model), SIZE),
        processor_config={"image_seq_length": TOKENS, "processor_class": "Gemma3Processor"},
        extras=token_types() if two_way else [],
        decoder=TwoWay if two_way else None,
        refused=set() if two_way else {"token_type_ids"},
        nested_images=True,
    )


def gemma3_two_way():
    """The decoder takes `token_type_ids` and sees the image tokens of one picture both ways, as Hugging Face does."""
    return gemma3("gemma3_two_way", two_way=True)


ROWS = [gemma3, gemma3_two_way]


class Prefix(decoders.Decoder):
    """token_type_ids `[B, T]`: the prefix (0) sees itself both ways, what follows (1) sees what came before."""

    def arguments(self, extras, inputs_embeds, attention_mask, position_ids):
        new, total = inputs_embeds.shape[1], attention_mask.shape[1]
        places = torch.arange(total)
        queries = places[total - new :]
        prefix = extras["token_type_ids"] == 0
        known = torch.nn.functional.pad(prefix.to(torch.int64), (total - new, 0)) == 1
        together = prefix[:, :, None] & known[:, None, :]
        causal = places[None, :] <= queries[:, None]
        real = attention_mask[:, None, :] == 1
        seen = ((causal[None] | together) & real)[:, None]
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        masks = {"full_attention": mask, "sliding_attention": mask}
        return {"inputs_embeds": inputs_embeds, "attention_mask": masks, "position_ids": position_ids}


def paligemma(name="paligemma", two_way=False):
    """PaliGemma 2 (Gemma 2 as text part); no chat template. The decoder as it is published sees one way only."""
    from transformers import (
        Gemma2Config,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipVisionConfig,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tok = base.tokenizer(["<pad>", "<eos>", "<bos>", "<image>"], eos="<eos>", bos="<bos>", pad="<pad>", add_bos=True)
    size = 56
    settings = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_seq_length": 16,
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": size, "width": size},
    }
    images = SiglipImageProcessorPil(**settings)
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor=images, tokenizer=tok)
    number = tok.convert_tokens_to_ids
    text = Gemma2Config(
        **base.TEXT,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4096,
        vocab_size=len(tok),
        eos_token_id=number("<eos>"),
        bos_token_id=number("<bos>"),
        pad_token_id=number("<pad>"),
    )
    config = PaliGemmaConfig(
        text_config=text.to_dict(),
        vision_config=SiglipVisionConfig(**(VISION | {"image_size": size}), vision_use_head=False).to_dict(),
        image_token_index=number("<image>"),
        projection_dim=32,
        tie_word_embeddings=False,
    )
    model = base.fill(PaliGemmaForConditionalGeneration(config), 19)
    # Published files say `null`; with it the class takes RGB alone, without it, as here, what its default makes of a picture.
    preprocessor = settings | {"do_convert_rgb": None, "image_processor_type": "SiglipImageProcessor"}
    preprocessor |= {"processor_class": "PaliGemmaProcessor"}
    return base.Family(
        name,
        model,
        processor,
        preprocessor,
        towers.tile_tower(towers.Pooled(model.model), size),
        extras=token_types() if two_way else [],
        decoder=Prefix if two_way else None,
        refused=set() if two_way else {"token_type_ids"},
        nested_images=True,
        first_position=1,
        written=lambda question, pictures: "<image>" * pictures + question,
    )


def paligemma_two_way():
    """The decoder takes `token_type_ids`, and the prompt sees itself both ways, as in Hugging Face."""
    return paligemma("paligemma_two_way", two_way=True)


ROWS += [paligemma, paligemma_two_way]
