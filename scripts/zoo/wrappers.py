"""The exported modules: caches as plain input and output tensors, with example inputs."""
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

import networks


class ConvolutionState(LinearAttentionLayer):
    """A short convolution's last inputs, kept by assignment so that an exporter can follow it."""

    def __init__(self, state):
        super().__init__()
        self.conv_states = {0: state}
        # The general path for any number of tokens, rather than the one for a single token.
        self.record_past = True

    def update_conv_state(self, new, state_idx=0, conv_kernel_size=None, **_):
        full = torch.cat([self.conv_states[state_idx], new], dim=-1)
        self.conv_states[state_idx] = full[..., -self.conv_states[state_idx].shape[-1] :]
        return full

    @property
    def tensors(self):
        return [self.conv_states[0]]


def _filled(key, value):
    layer = DynamicLayer()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer


def _kinds(model):
    config = networks.text_model(model).config
    kinds = getattr(config, "layer_types", None)
    kinds = list(kinds) if kinds else ["full_attention"] * config.num_hidden_layers
    return [kinds[index] for index in getattr(model, "kept", range(len(kinds)))]


def state_names(model):
    """Names of the cached tensors, by layer: `key` and `value`, or `conv`."""
    return [
        [f"{index}.{part}" for part in (["conv"] if kind == "conv" else ["key", "value"])]
        for index, kind in enumerate(_kinds(model))
    ]


def empty_states(model, batch=1, past=0):
    """Zero states as they stand before the first token, or with `past` cached tokens."""
    config = networks.text_model(model).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tensors = []
    for kind in _kinds(model):
        if kind == "conv":
            tensors.append(torch.zeros(batch, config.hidden_size, config.conv_L_cache))
        else:
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            shape = (batch, heads, past, head_dim)
            tensors += [torch.randn(shape), torch.randn(shape)]
    return tensors


class Decoder(nn.Module):
    """inputs_embeds `[B, T, D]` or input_ids `[B, T]`, attention_mask `[B, P + T]`, position_ids, states -> logits, states."""

    def __init__(self, model, ids=False):
        super().__init__()
        self.lm = networks.text_model(model)
        self.head = model.get_output_embeddings()
        self.ids = ids
        self.kinds = _kinds(model)
        self.features = feature_names(model)

    def forward(self, tokens, attention_mask, position_ids, *states):
        if len(states) == 1 and isinstance(states[0], (list, tuple)):
            states = states[0]
        states = list(states)
        features = dict(zip(self.features, states))
        del states[: len(features)]
        cache = DynamicCache()
        cache.layers = []
        for kind in self.kinds:
            if kind == "conv":
                cache.layers.append(ConvolutionState(states.pop(0)))
            else:
                cache.layers.append(_filled(states.pop(0), states.pop(0)))
        cache.layer_class_to_replicate = None
        given = {"input_ids": tokens} if self.ids else {"inputs_embeds": tokens}
        out = self.lm(
            **given,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **deepstack(features),
        )
        presents = []
        for layer in cache.layers:
            presents += layer.tensors if isinstance(layer, ConvolutionState) else [layer.keys, layer.values]
        return (self.head(out.last_hidden_state), *presents)


def feature_names(model):
    """Inputs of image features that are added between layers, and the mask of their places before them."""
    count = getattr(model, "deepstack", 0)
    masked = count and "_deepstack_process" not in vars(networks.text_model(model))
    return ["visual_pos_masks"] * bool(masked) + [f"deepstack_features_{number}" for number in range(count)]


def deepstack(features):
    """The arguments under which Qwen3-VL's text part takes its features."""
    if not features:
        return {}
    mask = features.get("visual_pos_masks")
    embeds = [value for name, value in features.items() if name != "visual_pos_masks"]
    return {"visual_pos_masks": embeds[0] if mask is None else mask, "deepstack_visual_embeds": embeds}


class Encoder(nn.Module):
    """pixel_values `[B, 3, H, W]` -> image features `[B, N, D]`.

    Qwen's towers take the patches of a fixed grid, `[N, C * T * P * P]`, and Qwen3's gives DeepStack features too.
    """

    GRID = [[1, 8, 8]]

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.patches = hasattr(model, "blocks")

    def forward(self, pixel_values):
        if not self.patches:
            return self.model(pixel_values).last_hidden_state
        out = self.model(pixel_values, grid_thw=torch.tensor(self.GRID))
        return (out.pooler_output, *(getattr(out, "deepstack_features", None) or ()))


def pixels(model, batch, seed=5):
    """An input for `Encoder`."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model, "blocks"):
        config = model.config
        width = 3 * config.temporal_patch_size * config.patch_size**2
        return torch.randn((64, width), generator=generator)
    return torch.randn((batch, 3, 32, 32), generator=generator)


def encoder_outputs(model):
    """Names of what `Encoder` gives."""
    count = len(getattr(model.config, "deepstack_visual_indexes", ()))
    return ["image_features"] + [f"deepstack_features_{number}" for number in range(count)]


def positions(model, first, count):
    """Position ids: one row, or three for multimodal rotary embedding (as on an image grid, so that rows differ)."""
    config = networks.text_model(model).config
    row = torch.arange(first, first + count)[None]
    if "mrope_section" not in (getattr(config, "rope_parameters", None) or {}):
        return row
    return torch.stack([row // 4, row // 2, row])


def inputs(model, length=7, seed=3):
    """Prefill inputs and those of one cached step, by name."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = networks.text_model(model).config.vocab_size
    ids = torch.randint(3, vocabulary, (1, length + 1), generator=generator)
    embeds = networks.text_model(model).get_input_embeddings()(ids).detach()
    places = torch.zeros(1, length + 1, dtype=torch.bool)
    places[:, 1:4] = True
    features = {}
    for name in feature_names(model):
        if name == "visual_pos_masks":
            features[name] = places
        elif "visual_pos_masks" in features:
            features[name] = torch.randn((3, embeds.shape[-1]), generator=generator)
        else:
            features[name] = torch.randn(embeds.shape, generator=generator) * places[..., None]
    cut = lambda part, value: value[:, part] if value.shape[0] == 1 else value[: 3 * (part.start is None)]
    prefill = {name: cut(slice(None, length), value) for name, value in features.items()}
    step = {name: cut(slice(length, None), value) for name, value in features.items()}
    prefill |= {
        "input_ids": ids[:, :length],
        "inputs_embeds": embeds[:, :length],
        "attention_mask": torch.ones(1, length, dtype=torch.long),
        "position_ids": positions(model, 0, length),
    }
    step |= {
        "input_ids": ids[:, length:],
        "inputs_embeds": embeds[:, length:],
        "attention_mask": torch.ones(1, length + 1, dtype=torch.long),
        "position_ids": positions(model, length, 1),
    }
    return prefill, step
