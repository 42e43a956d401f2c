"""Gemma 4: patches with positions, embeddings for every layer, layers that share keys and values."""
import torch
from torch import nn
from transformers import Gemma4Processor
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor

import base
import decoders
import towers

LAYERS, SHARED, PER_LAYER, PATCHES = 8, 4, 8, 70 * 9
TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '\\n\\n<|image|>\\n\\n' }}
{%- elif part.type == 'text' -%}
{{ part.text | trim }}
{%- endif -%}
{%- endfor -%}
{{ '<turn|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|turn>model\\n' }}
{%- endif -%}"""


class PerLayerEmbeddings(nn.Module):
    """input_ids `[B, T]` -> embeddings `[B, T, D]` and those of every layer `[B, T, L, d]`; pictures count as padding."""

    outputs = ["inputs_embeds", "per_layer_inputs"]

    def __init__(self, model):
        super().__init__()
        self.text, self.config = model.model.language_model, model.config

    def forward(self, input_ids):
        padding = self.config.text_config.pad_token_id
        ids = torch.where(input_ids == self.config.image_token_id, padding, input_ids)
        return self.text.embed_tokens(ids), self.text.get_per_layer_inputs(ids)


class SharedDecoder(decoders.Decoder):
    """per_layer_inputs `[B, T, L, d]`; only the layers before the sharing ones have caches, some wider than others."""

    def __init__(self, family):
        super().__init__(family)
        self.layers -= self.lm.config.num_kv_shared_layers

    def arguments(self, extras, inputs_embeds, attention_mask, position_ids):
        return super().arguments(extras, inputs_embeds, attention_mask, position_ids) | extras

    def empty_states(self, batch, past):
        out = []
        for layer in list(self.lm.layers)[: self.layers]:
            size = layer.self_attn.head_dim
            heads = layer.self_attn.k_proj.out_features // size
            out += [torch.randn(batch, heads, past, size) for _ in range(2)]
        return out


class PositionTower(nn.Module):
    """pixel_values `[N, P, width]` and pixel_position_ids `[N, P, 2]`, column and row, -1 at padding -> `[tokens, D]`."""

    def __init__(self, model):
        super().__init__()
        self.tower, self.embed = model.vision_tower, model.embed_vision

    def forward(self, pixel_values, pixel_position_ids):
        return self.embed(inputs_embeds=self.tower(pixel_values, pixel_position_ids).last_hidden_state)


def gemma4(name="gemma4"):
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    special = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|image>", "<image|>", "<|image|>"]
    special += ["<|audio>", "<audio|>", "<|audio|>", "<|video|>"]
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    named |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    tok = base.tokenizer(special, eos="<turn|>", bos="<bos>", pad="<pad>", named=named, add_bos=True)
    number = tok.convert_tokens_to_ids
    text = base.TEXT | {
        "head_dim": 16,
        "global_head_dim": 32,
        "num_hidden_layers": LAYERS,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "sliding_window": 24,
        "num_kv_shared_layers": SHARED,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": PER_LAYER,
        "vocab_size": len(tok),
        "vocab_size_per_layer_input": len(tok),
        "final_logit_softcapping": 30.0,
        "eos_token_id": number("<turn|>"),
        "bos_token_id": number("<bos>"),
        "pad_token_id": number("<pad>"),
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 16,
        "position_embedding_size": 256,
        "pooling_kernel_size": 3,
    }
    config = Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        image_token_id=number("<|image|>"),
        video_token_id=number("<|video|>"),
        audio_token_id=number("<|audio|>"),
        boi_token_id=number("<|image>"),
        eoi_token_id=number("<image|>"),
        boa_token_id=number("<|audio>"),
        eoa_token_index=number("<audio|>"),
        tie_word_embeddings=False,
    )
    model = base.fill(Gemma4ForConditionalGeneration(config), 27)
    for key, parameter in model.named_parameters():
        # Attention is not scaled; larger norms make it so sharp that rounding shows.
        if key.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data *= 0.5
    settings = {
        "do_convert_rgb": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "max_soft_tokens": 70,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
    }
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessorPil(**settings),
        tokenizer=tok,
        video_processor=Gemma4VideoProcessor(),
        image_seq_length=70,
        chat_template=TEMPLATE,
    )
    images = settings | {"image_processor_type": "Gemma4ImageProcessor", "image_seq_length": 70}
    inputs = {"pixel_values": torch.rand(2, PATCHES, 768), "pixel_position_ids": torch.full((2, PATCHES, 2), -1)}
    inputs["pixel_position_ids"][:, :54] = torch.stack([torch.arange(54) % 9, torch.arange(54) // 9], -1)
    axes = {name: {0: "num_images"} for name in inputs} | {"image_features": {0: "num_image_tokens"}}
    tokens = {0: "batch_size", 1: "sequence_length"}
    return base.Family(
        name,
        model,
        processor,
        None,
        towers.Tower(PositionTower(model.model), inputs, axes),
        processor_config={"image_processor": images, "image_seq_length": 70, "processor_class": "Gemma4Processor"},
        extras=[decoders.Extra("per_layer_inputs", tokens, torch.randn(2, 3, LAYERS, PER_LAYER))],
        decoder=SharedDecoder,
        embed=PerLayerEmbeddings(model),
        nested_images=True,
        keep_places=True,
        # Healing moves no layer from which others read keys: here it moves layer 5.
        heal_drop=(6,),
    )


ROWS = [gemma4]
