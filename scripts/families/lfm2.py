"""LFM2-VL: flattened patches with a mask and shapes, decoder layers of short convolutions and of attention."""
import torch
from torch import nn
from transformers import Lfm2VlProcessor
from transformers.cache_utils import LinearAttentionLayer
from transformers.models.lfm2_vl.image_processing_lfm2_vl import Lfm2VlImageProcessor

import base
import decoders
import towers

KINDS = ["conv", "full_attention", "full_attention", "conv", "conv", "full_attention"]
TILE, PATCH, FACTOR = 128, 16, 2
TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<image>' }}
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


class ConvolutionState(LinearAttentionLayer):
    """A short convolution's last inputs, kept by assignment so that an exporter can follow it."""

    def __init__(self, state):
        super().__init__()
        self.conv_states = {0: state}
        # The general path for any number of tokens, rather than the one for a single token.
        self.record_past = True

    def update_conv_state(self, conv_states, state_idx=0, conv_kernel_size=None, **_):
        full = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        self.conv_states[state_idx] = full[..., -self.conv_states[state_idx].shape[-1] :]
        return full


class HybridDecoder(decoders.Decoder):
    """Caches by layer: `conv` `[B, D, kernel]` of convolutions, keys and values of attention."""

    def cache(self, states):
        cache, states = super().cache([]), list(states)
        for kind in self.lm.config.layer_types:
            if kind == "conv":
                cache.layers.append(ConvolutionState(states.pop(0)))
            else:
                cache.layers.append(decoders.filled(states.pop(0), states.pop(0)))
        return cache

    def presents(self, cache):
        out = []
        for layer in cache.layers:
            out += [layer.conv_states[0]] if isinstance(layer, ConvolutionState) else [layer.keys, layer.values]
        return out

    def state_names(self):
        out = []
        for index, kind in enumerate(self.lm.config.layer_types):
            out += [f"conv.{index}"] if kind == "conv" else [f"{index}.key", f"{index}.value"]
        return out

    def empty_states(self, batch, past):
        config = self.lm.config
        size = config.hidden_size // config.num_attention_heads
        out = []
        for kind in config.layer_types:
            if kind == "conv":
                out.append(torch.zeros(batch, config.hidden_size, config.conv_L_cache))
            else:
                out += [torch.randn(batch, config.num_key_value_heads, past, size) for _ in range(2)]
        return out


class FlatTower(nn.Module):
    """pixel_values `[N, P, width]`, mask `[N, P]` and spatial_shapes `[N, 2]` in patches -> `[tokens, D]`."""

    def __init__(self, model):
        super().__init__()
        self.tower, self.projector = model.vision_tower, model.multi_modal_projector

    def forward(self, pixel_values, pixel_attention_mask, spatial_shapes):
        hidden = self.tower(
            pixel_values=pixel_values, spatial_shapes=spatial_shapes, pixel_attention_mask=pixel_attention_mask
        ).last_hidden_state
        count, patches, width = hidden.shape
        across = spatial_shapes[:, 1, None] // FACTOR
        slot = torch.arange(patches // FACTOR**2)[None]
        real = slot < spatial_shapes[:, 0, None] // FACTOR * across
        top, left = slot // across * FACTOR, slot % across * FACTOR
        corners = [
            hidden.gather(1, ((top + y) * spatial_shapes[:, 1, None] + left + x).clamp(max=patches - 1)[..., None].expand(-1, -1, width))
            for y in range(FACTOR)
            for x in range(FACTOR)
        ]
        block = torch.cat(corners, -1)
        if self.projector.layer_norm is not None:
            block = self.projector.layer_norm(block)
        block = self.projector.linear_2(self.projector.act(self.projector.linear_1(block)))
        return block.reshape(-1, block.shape[-1])[real.flatten()]


def lfm2_vl(name="lfm2_vl"):
    from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

    special = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    special += ["<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    special += [f"<|img_row_{row}_col_{column}|>" for row in range(1, 11) for column in range(1, 11)]
    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }
    tok = base.tokenizer(special, eos="<|im_end|>", bos="<|startoftext|>", pad="<|pad|>", named=named, add_bos=True)
    number = tok.convert_tokens_to_ids
    text = Lfm2Config(
        **base.TEXT,
        layer_types=KINDS,
        conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
        vocab_size=len(tok),
        bos_token_id=number("<|startoftext|>"),
        eos_token_id=number("<|im_end|>"),
        pad_token_id=number("<|pad|>"),
    )
    vision = Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=PATCH,
        num_patches=16,
        vision_use_head=False,
    )
    config = Lfm2VlConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<image>"),
        projector_hidden_size=32,
        downsample_factor=FACTOR,
        tie_word_embeddings=False,
    )
    model = base.fill(Lfm2VlForConditionalGeneration(config), 18)
    settings = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "downsample_factor": FACTOR,
        "encoder_patch_size": PATCH,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_tokens": 128,
        "max_num_patches": 512,
        "max_pixels_tolerance": 0.1,
        "max_tiles": 10,
        "min_image_tokens": 4,
        "min_tiles": 2,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "return_row_col_info": True,
        "size": {"height": TILE, "width": TILE},
        "tile_size": TILE,
        "use_thumbnail": True,
    }
    processor = Lfm2VlProcessor(image_processor=Lfm2VlImageProcessor(**settings), tokenizer=tok, chat_template=TEMPLATE)
    inputs = {
        "pixel_values": torch.randn(2, 64, 3 * PATCH**2),
        "pixel_attention_mask": torch.ones(2, 64, dtype=torch.long),
        "spatial_shapes": torch.tensor([[8, 8], [4, 6]]),
    }
    axes = {name: {0: "num_tiles"} for name in inputs} | {"image_features": {0: "num_image_tokens"}}
    axes["pixel_values"] = axes["pixel_attention_mask"] = {0: "num_tiles", 1: "max_num_patches"}
    preprocessor = settings | {"image_processor_type": "Lfm2VlImageProcessorFast", "processor_class": "Lfm2VlProcessor"}
    return base.Family(
        name,
        model,
        processor,
        preprocessor,
        towers.Tower(FlatTower(model.model), inputs, axes),
        decoder=HybridDecoder,
        nested_images=True,
    )


ROWS = [lfm2_vl]
