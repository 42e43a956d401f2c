"""Gemma 3n: four parallel residual streams, embeddings for every layer, layers that share keys and values."""
import torch
from torch import nn
from transformers import Gemma3nProcessor
from transformers.models.gemma3n.feature_extraction_gemma3n import Gemma3nAudioFeatureExtractor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import base
import decoders
import gemma
import gemma4
import towers

SIZE, TOKENS, PER_LAYER = 256, 16, gemma4.PER_LAYER
SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<start_of_audio>"]
# Tokens from here on are embedded by the vision and by the audio part.
SPECIAL += ["<end_of_image>", "<image_soft_token>", "<end_of_audio>", "<audio_soft_token>"]
NAMED = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
    "audio_token": "<audio_soft_token>",
}
TEMPLATE = gemma.TEMPLATE.replace("<start_of_image>", "<image_soft_token>")


class Embeddings(nn.Module):
    """input_ids `[B, T]` -> embeddings `[B, T, D]` and those of every layer `[B, T, L, d]`."""

    outputs = ["inputs_embeds", "per_layer_inputs"]

    def __init__(self, model):
        super().__init__()
        self.text, self.vision, self.audio = (
            model.model.language_model,
            model.model.embed_vision,
            model.model.embed_audio,
        )

    def hard(self, part, ids, inside):
        """What a part of its own makes of its tokens, anything at the others."""
        return part(input_ids=torch.where(inside, ids, part.vocab_offset + part.vocab_size - 1))

    def forward(self, input_ids):
        embeds = self.text.embed_tokens(input_ids)
        audio = input_ids >= self.audio.vocab_offset
        vision = (input_ids >= self.vision.vocab_offset) & ~audio
        embeds = torch.where(vision[..., None], self.hard(self.vision, input_ids, vision), embeds)
        embeds = torch.where(audio[..., None], self.hard(self.audio, input_ids, audio), embeds)
        return embeds, self.text.get_per_layer_inputs(input_ids)


class Tower(nn.Module):
    """pixel_values `[N, 3, H, W]` -> `[N, tokens, D]`."""

    def __init__(self, model):
        super().__init__()
        self.tower, self.embed = model.vision_tower.timm_model, model.embed_vision

    def forward(self, pixel_values):
        hidden = self.tower.forward_features(pixel_values).flatten(2).permute(0, 2, 1)
        return self.embed(inputs_embeds=hidden * hidden.shape[-1] ** 0.5)


def gemma3n(name="gemma3n"):
    from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration

    tok = base.tokenizer(SPECIAL, eos="<end_of_turn>", bos="<bos>", pad="<pad>", named=NAMED, add_bos=True)
    number = tok.convert_tokens_to_ids
    text = base.TEXT | {
        "head_dim": 16,
        "num_hidden_layers": gemma4.LAYERS,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "sliding_window": 24,
        "num_kv_shared_layers": gemma4.SHARED,
        "hidden_size_per_layer_input": PER_LAYER,
        "vocab_size": len(tok),
        "vocab_size_per_layer_input": number("<end_of_image>"),
        "laurel_rank": 4,
        "altup_num_inputs": 4,
        "activation_sparsity_pattern": [0.95, 0.95] + [0.0] * 6,
        "final_logit_softcapping": 30.0,
        "eos_token_id": number("<end_of_turn>"),
        "bos_token_id": number("<bos>"),
        "pad_token_id": number("<pad>"),
    }
    vision = {
        "architecture": "fastvit_mci3",
        "do_pooling": False,
        "hidden_size": 64,
        "vocab_size": 2,
        "vocab_offset": number("<end_of_image>"),
        "model_args": {"inference_mode": True, "layers": [1, 1, 1, 1, 1], "embed_dims": [8, 8, 16, 32, 32]},
    }
    audio = {
        "vocab_size": 2,
        "vocab_offset": number("<end_of_audio>"),
        "hidden_size": 16,
        "input_feat_size": 32,
        "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 2,
        "sscp_conv_channel_size": [4, 4],
    }
    config = Gemma3nConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        vision_soft_tokens_per_image=TOKENS,
        image_token_id=number("<image_soft_token>"),
        audio_token_id=number("<audio_soft_token>"),
        boi_token_id=number("<start_of_image>"),
        eoi_token_id=number("<end_of_image>"),
        boa_token_id=number("<start_of_audio>"),
        eoa_token_id=number("<end_of_audio>"),
        tie_word_embeddings=False,
    )
    model = base.fill(Gemma3nForConditionalGeneration(config), 31)
    for layer in model.model.language_model.layers:
        # The same figure as a number: exporters do not know the inverse error function.
        sparsity = layer.mlp.activation_sparsity
        if sparsity:
            spread = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(sparsity)))
            layer.mlp._gaussian_topk = lambda inputs, spread=spread: torch.relu(
                inputs - inputs.mean(-1, keepdim=True) - inputs.std(-1, keepdim=True, unbiased=False) * spread
            )
    settings = {
        "do_convert_rgb": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": SIZE, "width": SIZE},
    }
    processor = Gemma3nProcessor(
        feature_extractor=Gemma3nAudioFeatureExtractor(),
        image_processor=SiglipImageProcessorPil(**settings),
        tokenizer=tok,
        chat_template=TEMPLATE,
        image_seq_length=TOKENS,
    )
    preprocessor = settings | {"image_processor_type": "SiglipImageProcessorFast", "processor_class": "Gemma3nProcessor"}
    whole = {"audio_seq_length": 188, "image_seq_length": TOKENS, "processor_class": "Gemma3nProcessor"}
    tokens = {0: "batch_size", 1: "sequence_length"}
    return base.Family(
        name,
        model,
        processor,
        preprocessor,
        towers.tile_tower(Tower(model.model), SIZE),
        processor_config=whole,
        extras=[decoders.Extra("per_layer_inputs", tokens, torch.randn(2, 3, gemma4.LAYERS, PER_LAYER))],
        decoder=gemma4.SharedDecoder,
        embed=Embeddings(model),
        nested_images=True,
        keep_places=True,
        heal_drop=(6,),
    )


ROWS = [gemma3n]
