"""Aya-Vision, Ovis2 and Granite-Docling: InternVL's grid of tiles with other tokens and towers."""
import torch
from torch import nn
from transformers import AyaVisionProcessor, GraniteDoclingProcessor, Ovis2Processor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

import base
import decoders
import towers

SIZE, PATCH = 56, 14
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
SETTINGS = {
    "crop_to_patches": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": SIZE, "width": SIZE},
}


def turns(image, before=""):
    """A template of the `<|im_start|>` form with a family's own image token."""
    return (
        before
        + """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '"""
        + image
        + """' }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}"""
    )


AYA_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{ '<|START_OF_TURN_TOKEN|>' }}
{{- '<|CHATBOT_TOKEN|>' if message.role == 'assistant' else '<|USER_TOKEN|>' -}}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<image>' }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{{ '<|END_OF_TURN_TOKEN|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}
{%- endif -%}"""


def aya_vision(name="aya_vision"):
    """Tiles are named by number; the image token of the ids is not that of the template."""
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, SiglipVisionConfig

    special = ["<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"]
    special += ["<|CHATBOT_TOKEN|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>"]
    special += ["<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "TILE", *[f"TILE_{number}" for number in range(1, 13)]]
    tok = base.tokenizer(special, eos="<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>", pad="<PAD>", add_bos=True)
    number = tok.convert_tokens_to_ids
    text = Cohere2Config(
        **base.TEXT,
        sliding_window=24,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        logit_scale=1.0,
        vocab_size=len(tok),
        bos_token_id=number("<BOS_TOKEN>"),
        eos_token_id=number("<|END_OF_TURN_TOKEN|>"),
        pad_token_id=number("<PAD>"),
    )
    config = AyaVisionConfig(
        text_config=text,
        vision_config=SiglipVisionConfig(**SIGLIP, vision_use_head=False),
        image_token_index=number("<|IMG_PATCH|>"),
        downsample_factor=2,
        tie_word_embeddings=False,
    )
    model = base.fill(AyaVisionForConditionalGeneration(config), 24)
    settings = SETTINGS | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_patches": 1, "max_patches": 12}
    whole = {"patch_size": PATCH, "img_size": SIZE, "downsample_factor": 2}
    processor = AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(**settings), tokenizer=tok, chat_template=AYA_TEMPLATE, **whole
    )
    preprocessor = settings | {"image_processor_type": "GotOcr2ImageProcessor", "processor_class": "AyaVisionProcessor"}
    tower = towers.tile_tower(towers.Pooled(model.model), SIZE)
    return base.Family(
        name,
        model,
        processor,
        preprocessor,
        tower,
        processor_config=whole | {"processor_class": "AyaVisionProcessor"},
        decoder_exporter="dyn18",
    )


class IndicatorEmbeddings(nn.Module):
    """Token embeddings; marks around a picture take their rows from the table of visual words."""

    def __init__(self, model):
        super().__init__()
        self.table = model.get_input_embeddings()
        marks = torch.tensor(model.config.visual_indicator_token_ids)
        visual = model.model.visual_embeddings_table.weight[-len(marks) :].detach()
        rows = self.table.weight.detach().clone()
        rows[marks] = visual
        self.table = nn.Embedding.from_pretrained(rows)

    def forward(self, input_ids):
        return self.table(input_ids)


class Pooled(towers.Pooled):
    """Ovis2's features, one weighted visual word per token."""

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values).pooler_output


def ovis2(name="ovis2"):
    """A picture's whole first, then its tiles, with marks between columns and rows."""
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2VisionConfig, Qwen2Config

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>"]
    special += ["<IMG_ROW>", "<IMG_END>", "<image>"]
    tok = base.tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>")
    number = tok.convert_tokens_to_ids
    vision = Ovis2VisionConfig(
        **SIGLIP, vocab_size=64, hidden_stride=2, num_visual_indicator_tokens=5, tokenize_function="softmax"
    )
    config = Ovis2Config(
        text_config=Qwen2Config(**base.TEXT, vocab_size=len(tok), eos_token_id=number("<|im_end|>")),
        vision_config=vision,
        image_token_id=number("<IMG_ATOM>"),
        visual_indicator_token_ids=[number(f"<IMG_{part}>") for part in ("START", "GRID", "COL", "ROW", "END")],
        vocab_size=len(tok),
        hidden_size=base.TEXT["hidden_size"],
        tie_word_embeddings=False,
    )
    model = base.fill(Ovis2ForConditionalGeneration(config), 25)
    # Never an answer: Hugging Face embeds a mark that it generated itself as any other token.
    model.lm_head.weight.data[config.visual_indicator_token_ids] = 0
    settings = SETTINGS | {"image_mean": list(OPENAI_CLIP_MEAN), "image_std": list(OPENAI_CLIP_STD)}
    settings |= {"min_patches": 1, "max_patches": 9, "use_covering_area_grid": True}
    processor = Ovis2Processor(
        image_processor=Ovis2ImageProcessorPil(**settings),
        tokenizer=tok,
        image_seq_length=4,
        chat_template=turns("<image>\\n"),
    )
    preprocessor = settings | {"image_processor_type": "Ovis2ImageProcessor", "processor_class": "Ovis2Processor"}
    return base.Family(
        name,
        model,
        processor,
        preprocessor,
        towers.tile_tower(Pooled(model.model), SIZE),
        processor_config={"image_seq_length": 4, "processor_class": "Ovis2Processor"},
        embed=IndicatorEmbeddings(model),
    )


class TappedTower(nn.Module):
    """Granite-Docling: tiles `[B, N, 3, H, W]` -> image features and those for the first decoder layers, `[tokens, D]`."""

    def __init__(self, vision):
        super().__init__()
        self.vision = vision

    def forward(self, pixel_values):
        features, tapped = self.vision.connector(*self.vision.encode(pixel_values.flatten(0, 1)), fine=False)
        return (features, *tapped)


class GraniteDeepStack(decoders.DeepStack):
    """DeepStack, and logits scaled as the family does."""

    def logits(self, hidden):
        return self.head(hidden) / self.lm.config.logits_scaling


def granite_docling(name="granite_docling"):
    from transformers import GraniteDoclingConfig, GraniteDoclingForConditionalGeneration

    special = ["<|pad|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>"]
    special += ["<global-img>", *[f"<row_{row}_col_{column}>" for row in range(1, 17) for column in range(1, 17)]]
    tok = base.tokenizer(special, eos="<|im_end|>", bos="<|end_of_text|>", pad="<|pad|>")
    number = tok.convert_tokens_to_ids
    text = base.TEXT | {
        "vocab_size": len(tok),
        "bos_token_id": number("<|end_of_text|>"),
        "eos_token_id": number("<|im_end|>"),
        "pad_token_id": number("<|pad|>"),
        "embedding_multiplier": 2.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
    }
    text.pop("tie_word_embeddings")
    vision = SIGLIP | {"num_hidden_layers": 3, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0, 1, 2]}
    vision |= {"use_fine_route": False}
    config = GraniteDoclingConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<image>"),
        pad_token_id=number("<|pad|>"),
        tie_word_embeddings=False,
    )
    model = base.fill(GraniteDoclingForConditionalGeneration(config), 26)
    settings = SETTINGS | {"image_mean": list(OPENAI_CLIP_MEAN), "image_std": list(OPENAI_CLIP_STD)}
    settings |= {"min_patches": 1, "max_patches": 32}
    processor = GraniteDoclingProcessor(
        image_processor=GraniteDoclingImageProcessorPil(**settings),
        tokenizer=tok,
        image_seq_len=4,
        chat_template=turns("<image>"),
    )
    preprocessor = settings | {
        "image_processor_type": "GraniteDoclingImageProcessor",
        "processor_class": "GraniteDoclingProcessor",
    }
    names = ["image_features", *[f"deepstack_features_{k}" for k in range(3)]]
    axes = {"pixel_values": {0: "batch_size", 1: "num_tiles"}} | {name: {0: "num_image_tokens"} for name in names}
    tower = towers.Tower(TappedTower(model.model.vision_model), {"pixel_values": torch.randn(2, 2, 3, SIZE, SIZE)}, axes, names)
    tokens = {0: "batch_size", 1: "sequence_length"}
    return base.Family(
        name,
        model,
        processor,
        preprocessor,
        tower,
        processor_config={"image_seq_len": 4, "processor_class": "GraniteDoclingProcessor"},
        extras=[decoders.Extra(f"deepstack_features_{k}", tokens, torch.randn(2, 3, 32)) for k in range(3)],
        decoder=GraniteDeepStack,
        nested_images=True,
        counts_layers=True,
    )


ROWS = [aya_vision, ovis2, granite_docling]
