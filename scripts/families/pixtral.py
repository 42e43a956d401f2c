"""Mistral 3: pictures of any size padded to one size, with their own sizes as an input; a token at the end of each row."""
import torch
from torch import nn
from transformers import PixtralProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

import base
import towers

PATCH, MERGE = 14, 2
TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ '[SYSTEM_PROMPT]' + message.content[0].text + '[/SYSTEM_PROMPT]' }}
{%- elif message.role == 'user' -%}
{{ '[INST]' }}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '[IMG]' }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{{ '[/INST]' }}
{%- else -%}
{%- for part in message.content if part.type == 'text' -%}
{{ part.text }}
{%- endfor -%}
{{ eos_token }}
{%- endif -%}
{%- endfor -%}"""


class PaddedTower(nn.Module):
    """pixel_values `[N, 3, H, W]`, padded right and below, and image_sizes `[N, 2]` -> `[tokens, D]`.

    All patches form one sequence; a mask keeps pictures and padding apart, and padding is left out at the end. Without
    `image_sizes` every picture fills its plane.
    """

    def __init__(self, model):
        super().__init__()
        self.tower, self.projector = model.vision_tower, model.multi_modal_projector

    def forward(self, pixel_values, image_sizes=None):
        patches = self.tower.patch_conv(pixel_values)
        count, width, rows, columns = patches.shape
        row = torch.arange(rows)[None, :, None].expand(count, rows, columns)
        column = torch.arange(columns)[None, None, :].expand(count, rows, columns)
        picture = torch.arange(count)[:, None, None].expand(count, rows, columns)
        if image_sizes is None:
            real = row >= 0
        else:
            real = (row < image_sizes[:, 0, None, None] // PATCH) & (column < image_sizes[:, 1, None, None] // PATCH)
        # Patches of padding form a picture of their own, so that no row of the mask is empty.
        picture = torch.where(real, picture, -1 - picture).flatten()
        hidden = self.tower.ln_pre(patches.flatten(2).transpose(1, 2).reshape(1, -1, width))
        places = torch.stack([row.flatten(), column.flatten()], 1)
        rotary = self.tower.patch_positional_embedding(hidden, places)
        seen = picture[:, None] == picture[None, :]
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        hidden = self.tower.transformer(hidden, attention_mask=mask, position_embeddings=rotary).last_hidden_state
        hidden = self.projector.norm(hidden.reshape(count, rows // MERGE, MERGE, columns // MERGE, MERGE, width))
        hidden = hidden.permute(0, 1, 3, 5, 2, 4).reshape(-1, width * MERGE**2)
        hidden = self.projector.patch_merger.merging_layer(hidden)
        hidden = self.projector.linear_2(self.projector.act(self.projector.linear_1(hidden)))
        if image_sizes is None:
            return hidden
        return hidden[real[:, ::MERGE, ::MERGE].flatten()]


def mistral3(name="mistral3", sizes=True):
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    special += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    tok = base.tokenizer(special, eos="</s>", bos="<s>", pad="<pad>", add_bos=True)
    number = tok.convert_tokens_to_ids
    text = MistralConfig(
        **base.TEXT,
        head_dim=16,
        sliding_window=None,
        vocab_size=len(tok),
        bos_token_id=number("<s>"),
        eos_token_id=number("</s>"),
    )
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=8,
        image_size=280,
        patch_size=PATCH,
    )
    config = Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=number("[IMG]"),
        spatial_merge_size=MERGE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = base.fill(Mistral3ForConditionalGeneration(config), 17)
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
        "patch_size": PATCH,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 280},
    }
    whole = {
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
        "image_token": "[IMG]",
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessorPil(**settings), tokenizer=tok, chat_template=TEMPLATE, **whole
    )
    inputs = {"pixel_values": torch.randn(2, 3, 56, 84)}
    axes = {"pixel_values": {0: "num_images", 2: "height", 3: "width"}, "image_features": {0: "num_image_tokens"}}
    if sizes:
        inputs["image_sizes"] = torch.tensor([[56, 84], [28, 56]])
        axes["image_sizes"] = {0: "num_images"}
    tower = towers.Tower(PaddedTower(model.model), inputs, axes)
    preprocessor = settings | {"image_processor_type": "PixtralImageProcessorFast", "processor_class": "PixtralProcessor"}
    return base.Family(
        name,
        model,
        processor,
        preprocessor,
        tower,
        processor_config=whole | {"processor_class": "PixtralProcessor"},
        one_by_one=not sizes,
    )


def mistral3_plain():
    """The vision encoder takes no sizes, so pictures go through it one at a time without padding."""
    return mistral3("mistral3_plain", sizes=False)


ROWS = [mistral3, mistral3_plain]
