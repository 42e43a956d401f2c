"""The exported form of the text part: caches as plain input and output tensors, and the families' additional inputs."""
import dataclasses
import inspect

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

import base


@dataclasses.dataclass
class Extra:
    """One more input of the decoder: its name, dynamic axes and an example for 2 rows of 3 tokens."""

    name: str
    axes: dict
    example: torch.Tensor


def filled(key, value):
    layer = DynamicLayer()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer


class Decoder(nn.Module):
    """inputs_embeds `[B, T, D]`, attention_mask `[B, P + T]`, position_ids, extras, caches -> logits, caches."""

    def __init__(self, family):
        super().__init__()
        self.lm = base.text_model(family.model)
        self.head = family.model.get_output_embeddings()
        self.names = [extra.name for extra in family.extras]
        config = self.lm.config
        self.layers = config.num_hidden_layers
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def cache(self, states):
        cache = DynamicCache()
        cache.layers = [filled(key, value) for key, value in zip(states[::2], states[1::2])]
        cache.layer_class_to_replicate = None
        return cache

    def arguments(self, extras, inputs_embeds, attention_mask, position_ids):
        """Arguments of the stack of layers; families with more inputs say how they enter."""
        return {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}

    def forward(self, inputs_embeds, attention_mask, position_ids, *rest):
        rest = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else list(rest)
        extras, states = dict(zip(self.names, rest)), rest[len(self.names) :]
        cache = self.cache(states)
        arguments = self.arguments(extras, inputs_embeds, attention_mask, position_ids)
        hidden = self.lm(**arguments, cache=cache, use_cache=True).last_hidden_state
        return (self.logits(hidden), *self.presents(cache))

    def logits(self, hidden):
        logits = self.head(hidden)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def presents(self, cache):
        return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]

    def state_names(self):
        return [f"{index}.{part}" for index in range(self.layers) for part in ("key", "value")]

    def empty_states(self, batch, past):
        config = self.lm.config
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return [torch.randn(batch, heads, past, size) for _ in range(2 * self.layers)]


class DeepStack(Decoder):
    """Qwen3-VL: features `[B, T, D]` added behind the first layers, zero where there is text."""

    def __init__(self, family):
        super().__init__(family)
        self.lm._deepstack_process = lambda hidden, _, features: hidden + features

    def arguments(self, extras, inputs_embeds, attention_mask, position_ids):
        features = list(extras.values())
        return super().arguments(extras, inputs_embeds, attention_mask, position_ids) | {
            "visual_pos_masks": features[0],
            "deepstack_visual_embeds": features,
        }


class PackedDeepStack(DeepStack):
    """The same with the features behind the embeddings in one tensor, `[B, T, D x (1 + features)]`."""

    def __init__(self, family):
        super().__init__(family)
        self.parts = 1 + len(family.model.config.vision_config.deepstack_visual_indexes)

    def arguments(self, extras, inputs_embeds, attention_mask, position_ids):
        embeds, *features = inputs_embeds.chunk(self.parts, dim=-1)
        return Decoder.arguments(self, extras, embeds, attention_mask, position_ids) | {
            "visual_pos_masks": features[0],
            "deepstack_visual_embeds": features,
        }


class MaskedDeepStack(Decoder):
    """The same with features `[N, D]` for the image tokens alone, and a mask of their places."""

    def arguments(self, extras, inputs_embeds, attention_mask, position_ids):
        mask, *features = extras.values()
        return super().arguments(extras, inputs_embeds, attention_mask, position_ids) | {
            "visual_pos_masks": mask,
            "deepstack_visual_embeds": features,
        }


class Whole(Decoder):
    """A whole network in one graph: input_ids `[B, T]` in the place of embeddings, and pixel_values of all pictures."""

    reads = "input_ids"

    def __init__(self, family):
        super().__init__(family)
        self.tower, self.image_token = family.tower.module, family.image_token_id

    def arguments(self, extras, inputs_embeds, attention_mask, position_ids):
        embeds = self.lm.get_input_embeddings()(inputs_embeds)
        width = embeds.shape[-1]
        pixels = extras["pixel_values"]
        # A blank picture before the others: its first feature is what text points at, and so is there without pictures.
        features = self.tower(torch.cat([torch.zeros_like(pixels[:1].sum(0, keepdim=True)), pixels]))
        each = features.shape[1]
        image = (inputs_embeds == self.image_token).reshape(-1)
        number = torch.cumsum(image.to(torch.int64), 0) * image.to(torch.int64) + (each - 1) * image.to(torch.int64)
        merged = torch.where(image[:, None], features.reshape(-1, width)[number], embeds.reshape(-1, width))
        return super().arguments(extras, merged.reshape(embeds.shape), attention_mask, position_ids)


def takes(module, name):
    """Whether a module's forward names an argument."""
    return name in inspect.signature(module.forward).parameters
