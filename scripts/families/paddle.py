"""PaddleOCR-VL: patches in plain row order, merged two by two after the tower."""
import torch
from transformers import PaddleOCRVLProcessor
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

import base
import towers

PATCH, MERGE, SIDE = 14, 2, 4
TEMPLATE = """{{- cls_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ 'User: ' }}
{%- for part in message.content if part.type == 'image' -%}
{{ '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}
{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}
{{ part.text }}
{%- endfor -%}
{{ '\\n' }}
{%- elif message.role == 'assistant' -%}
{{ 'Assistant:\\n' }}
{%- for part in message.content if part.type == 'text' -%}
{{ part.text }}
{%- endfor -%}
{{ eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'Assistant:\\n' }}
{%- endif -%}"""


class PlainTower(towers.GridTower):
    """pixel_values `[N, 3, P, P]` in row order, and grids `[pictures, 3]` -> `[tokens, D]` in row order."""

    def __init__(self, model):
        super().__init__(model.visual, 1, side=SIDE)
        self.projector = model.projector

    def axis(self, index, size):
        """Neighbours in the learned grid, corners not aligned."""
        source = (index.to(torch.float32) + 0.5) * self.side / size.to(torch.float32) - 0.5
        low = torch.floor(source)
        share = source - low
        first = low.to(torch.int64)
        last = self.side - 1
        return [(first.clamp(0, last), 1 - share), ((first + 1).clamp(0, last), share)]

    def forward(self, pixel_values, grid):
        self.tower.config._attn_implementation = towers.SEGMENTS
        row, column, heights, widths, frame = self.places(pixel_values, grid)
        indices, weights = self.taps(row, column, heights, widths)
        given = {"position_ids": torch.stack([row, column], 1), "cu_seqlens": frame, "max_seqlen": 1}
        given |= {"interp_indices": indices, "interp_weights": weights}
        hidden = self.tower(pixel_values[None], grid_thw=grid, **given).last_hidden_state
        # Of each token the number of its first patch: tokens run over blocks of two by two patches, row by row.
        counts = grid[:, 0] * grid[:, 1] * grid[:, 2]
        first = torch.cumsum(counts, 0) - counts
        tokens = torch.arange(pixel_values.shape[0] // MERGE**2)
        ends = torch.cumsum(counts // MERGE**2, 0)
        picture = (tokens[:, None] >= ends[None, :]).to(torch.int64).sum(1)
        inside = tokens - (ends - counts // MERGE**2)[picture]
        width = grid[:, 2][picture]
        top, left = inside // (width // MERGE) * MERGE, inside % (width // MERGE) * MERGE
        corner = first[picture] + top * width + left
        hidden = self.projector.pre_norm(hidden)
        block = torch.cat([hidden[corner + y * width + x] for y in range(MERGE) for x in range(MERGE)], -1)
        return self.projector.linear_2(self.projector.act(self.projector.linear_1(block)))


def paddleocr_vl(name="paddleocr_vl"):
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    special = ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"]
    special += ["<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|video_pad|>"]
    named = {"image_token": "<|IMAGE_PLACEHOLDER|>", "cls_token": "<|begin_of_sentence|>"}
    tok = base.tokenizer(special, eos="</s>", bos="<s>", pad="<unk>", named=named)
    number = tok.convert_tokens_to_ids
    rotary = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 500000.0}
    text = base.TEXT | {
        "vocab_size": len(tok),
        "head_dim": 16,
        "rope_parameters": rotary,
        "bos_token_id": number("<s>"),
        "eos_token_id": number("</s>"),
        "pad_token_id": number("<unk>"),
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE * PATCH,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    config = PaddleOCRVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<|IMAGE_PLACEHOLDER|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|IMAGE_START|>"),
        vision_end_token_id=number("<|IMAGE_END|>"),
        tie_word_embeddings=False,
    )
    model = base.fill(PaddleOCRVLForConditionalGeneration(config), 23)
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": MERGE,
        "patch_size": PATCH,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 140 * 140, "shortest_edge": 56 * 56},
        "temporal_patch_size": 1,
    }
    processor = PaddleOCRVLProcessor(
        image_processor=PaddleOCRVLImageProcessorPil(**settings), tokenizer=tok, chat_template=TEMPLATE
    )
    hub = settings | {"min_pixels": 56 * 56, "max_pixels": 140 * 140}
    hub.pop("size")
    preprocessor = hub | {"image_processor_type": "PaddleOCRVLImageProcessor", "processor_class": "PaddleOCRVLProcessor"}
    inputs = {"pixel_values": torch.randn(48, 3, PATCH, PATCH), "image_grid_thw": torch.tensor([[1, 4, 6], [1, 6, 4]])}
    axes = {"pixel_values": {0: "num_patches"}, "image_grid_thw": {0: "num_images"}}
    axes["image_features"] = {0: "num_image_tokens"}
    tower = towers.Tower(PlainTower(model.model), inputs, axes)
    return base.Family(name, model, processor, preprocessor, tower, position_rows=3)


ROWS = [paddleocr_vl]
