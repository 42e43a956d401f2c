"""Janus: a token embedding graph with pixel inputs (`prepare_inputs_embeds`), and a separate graph for the language model's head."""
import torch
from torch import nn
from transformers import JanusProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

import base
import decoders
import towers

SIZE, PATCH = 56, 14
TOKENS = (SIZE // PATCH) ** 2
TEMPLATE = """{%- for message in messages -%}
{{ '<|User|>: ' if message.role == 'user' else '<|Assistant|>: ' }}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<image_placeholder>\\n' }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{{ '\\n\\n' if message.role == 'user' else eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|Assistant|>:' }}
{%- endif -%}"""


class Prepare(nn.Module):
    """input_ids `[B, T]`, pixel_values `[B, N, 3, H, W]` and two masks -> embeddings `[B, T, D]`.

    images_seq_mask `[B, T]` is true at image tokens, images_emb_mask `[B, N, tokens]` at features that are used.
    """

    def __init__(self, model):
        super().__init__()
        self.table, self.model = base.text_model(model).get_input_embeddings(), model.model

    def forward(self, input_ids, pixel_values, images_seq_mask, images_emb_mask):
        embeds = self.table(input_ids)
        # A blank picture before the others, so that a prompt without pictures has one to encode.
        pixels = torch.cat([torch.zeros(1, 3, SIZE, SIZE), pixel_values.flatten(0, 1)])
        features = self.model.get_image_features(pixels).pooler_output[1:]
        width = embeds.shape[-1]
        features = features.reshape(-1, width)[images_emb_mask.reshape(-1)]
        # A row of zeros before the features, so that a prompt without pictures has a row to point at.
        rows = torch.cat([torch.zeros(1, width), features])
        image = images_seq_mask.reshape(-1).to(torch.int64)
        number = torch.cumsum(image, 0) * image
        merged = torch.where(image[:, None] == 1, rows[number], embeds.reshape(-1, width))
        return merged.reshape(embeds.shape)


class Headless(decoders.Decoder):
    """The stack of layers alone: its last hidden state, which `lm_head` brings to logits."""

    result = "last_hidden_state"

    def logits(self, hidden):
        return hidden


class Head(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.head = model.get_output_embeddings()

    def forward(self, hidden_states):
        return self.head(hidden_states)


def prepare(model):
    inputs = {
        "input_ids": torch.ones(1, 40, dtype=torch.long),
        "pixel_values": torch.randn(1, 2, 3, SIZE, SIZE),
        "images_seq_mask": torch.arange(40)[None] < 2 * TOKENS,
        "images_emb_mask": torch.ones(1, 2, TOKENS, dtype=torch.bool),
    }
    tokens = {0: "batch_size", 1: "sequence_length"}
    axes = {"input_ids": tokens, "images_seq_mask": tokens, "inputs_embeds": tokens}
    axes |= {"pixel_values": {0: "batch_size", 1: "num_images"}, "images_emb_mask": {0: "batch_size", 1: "num_images"}}
    return towers.Tower(Prepare(model), inputs, axes, ["inputs_embeds"])


def janus(name="janus"):
    from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    special = ["<pad>", "<s>", "</s>", "<image_placeholder>", "<begin_of_image>", "<end_of_image>"]
    named = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tok = base.tokenizer(special, eos="</s>", bos="<s>", pad="<pad>", named=named, add_bos=True)
    number = tok.convert_tokens_to_ids
    text = LlamaConfig(**base.TEXT, vocab_size=len(tok), bos_token_id=number("<s>"), eos_token_id=number("</s>"))
    vision = JanusVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        mlp_ratio=2.0,
        projection_dim=32,
        num_image_tokens=TOKENS,
    )
    codes = JanusVQVAEConfig(
        embed_dim=4,
        num_embeddings=16,
        base_channels=32,
        channel_multiplier=[1],
        num_res_blocks=1,
        latent_channels=32,
        projection_dim=32,
        image_token_embed_dim=32,
        num_patches=4,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=codes,
        image_token_id=number("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    model = base.fill(JanusForConditionalGeneration(config), 33)
    settings = {
        "background_color": [127, 127, 127],
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
        "min_size": 14,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": SIZE, "width": SIZE},
    }
    whole = {"num_image_tokens": TOKENS, "use_default_system_prompt": False}
    processor = JanusProcessor(
        image_processor=JanusImageProcessorPil(**settings), tokenizer=tok, chat_template=TEMPLATE, **whole
    )
    return base.Family(
        name,
        model,
        processor,
        settings | {"image_processor_type": "JanusImageProcessor", "processor_class": "JanusProcessor"},
        prepare(model),
        processor_config=whole | {"processor_class": "JanusProcessor"},
        config={"model_type": "multi_modality"},
        decoder=Headless,
        layout="prepare_inputs_embeds",
        head=Head(model),
    )


ROWS = [janus]
