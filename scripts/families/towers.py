"""The exported form of the vision parts, each with an example input and its dynamic axes."""
import dataclasses

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclasses.dataclass
class Tower:
    """One vision encoder: the module, example inputs by name, axes by name, and output names."""

    module: nn.Module
    inputs: dict
    axes: dict
    outputs: list = dataclasses.field(default_factory=lambda: ["image_features"])
    exporter: str = "ts17"


SEGMENTS = "flash_attention_of_segments"


def attention_of_segments(module, query, key, value, attention_mask, cu_seq_lens_q=None, scaling=None, **_):
    """Attention within segments that are given as one number per patch, not as cumulative lengths.

    It replaces a loop over pictures, which no exporter follows, by a mask. Shapes `[1, heads, N, size]`.
    """
    apart = cu_seq_lens_q[:, None] != cu_seq_lens_q[None, :]
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    scores = scores.masked_fill(apart[None, None], torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS[SEGMENTS] = attention_of_segments


class GridTower(nn.Module):
    """Towers that take packed patches `[N, width]` and the grids `[pictures, 3]` of their pictures.

    Everything that Hugging Face computes from the grids in loops is computed here per patch, so the exported graph
    takes any number of pictures of any size.
    """

    def __init__(self, tower, merge, windows=None, side=None):
        super().__init__()
        self.tower, self.merge, self.windows, self.side = tower, merge, windows, side

    def places(self, patches, grid):
        """Row, column, height and frame number of each patch, in the order of merge blocks."""
        counts = grid[:, 0] * grid[:, 1] * grid[:, 2]
        ends = torch.cumsum(counts, 0)
        index = torch.arange(patches.shape[0])
        picture = (index[:, None] >= ends[None, :]).to(torch.int64).sum(1)
        heights, widths, area = grid[:, 1][picture], grid[:, 2][picture], (grid[:, 1] * grid[:, 2])[picture]
        inside = index - (ends - counts)[picture]
        frame, inside = inside // area, inside % area
        merge = self.merge
        block, inner = inside // merge**2, inside % merge**2
        row = (block // (widths // merge)) * merge + inner // merge
        column = (block % (widths // merge)) * merge + inner % merge
        return row, column, heights, widths, picture * 4096 + frame

    def taps(self, row, column, heights, widths):
        """Four neighbours in the learned grid of positions and their weights."""
        down, across = self.axis(row, heights), self.axis(column, widths)
        pairs = [(y * self.side + x, wy * wx) for y, wy in down for x, wx in across]
        return torch.stack([pair[0] for pair in pairs], 1), torch.stack([pair[1] for pair in pairs], 1)

    def axis(self, index, size):
        """Two neighbours on one axis of the learned grid and their weights, corners aligned."""
        source = index.to(torch.float32) * (self.side - 1) / torch.clamp(size - 1, min=1).to(torch.float32)
        low = torch.floor(source)
        share = source - low
        first = low.to(torch.int64)
        return [(first, 1 - share), (torch.clamp(first + 1, max=self.side - 1), share)]

    def forward(self, pixel_values, grid):
        self.tower.config._attn_implementation = SEGMENTS
        row, column, heights, widths, frame = self.places(pixel_values, grid)
        given = {"position_ids": torch.stack([row, column], 1), "cu_seqlens": frame, "max_seqlen": 1}
        if self.side:
            given["interp_indices"], given["interp_weights"] = self.taps(row, column, heights, widths)
        if self.windows:
            # Windows are segments too; patches keep their order.
            size = self.windows * self.merge
            window = (frame * 4096 + row // size) * 4096 + column // size
            order = torch.arange(pixel_values.shape[0] // self.merge**2)
            given |= {"window_index": order, "cu_window_seqlens": window, "max_window_seqlen": 1}
        out = self.tower(pixel_values, grid_thw=grid, **given)
        return (out.pooler_output, *(getattr(out, "deepstack_features", None) or ()))


def grid_tower(tower, merge, width, grid_name="image_grid_thw", deepstack=0, kind=GridTower, **settings):
    grid = torch.tensor([[1, 4, 6], [1, 6, 4]])
    names = ["image_features"] + [f"deepstack_features_{number}" for number in range(deepstack)]
    axes = {"pixel_values": {0: "num_patches"}, grid_name: {0: "num_images"}}
    axes |= {name: {0: "num_image_tokens"} for name in names}
    return Tower(
        kind(tower, merge, **settings),
        {"pixel_values": torch.randn(48, width), grid_name: grid},
        axes,
        names,
    )


class TileTower(nn.Module):
    """Towers that take whole tiles `[N, 3, H, W]`: what one layer of the tower gives, through the projector.

    `skip` leading positions (a class token) are left out.
    """

    def __init__(self, tower, projector, layer=None, skip=0):
        super().__init__()
        self.tower, self.projector, self.layer, self.skip = tower, projector, layer, skip

    def forward(self, pixel_values):
        if self.layer is None:
            hidden = self.tower(pixel_values).last_hidden_state
        else:
            hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        return self.projector(hidden[:, self.skip :])


class Pooled(nn.Module):
    """What `get_image_features` gives for tiles `[N, 3, H, W]`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values).pooler_output


def tile_tower(module, size, exporter="ts17"):
    axes = {"pixel_values": {0: "num_tiles"}, "image_features": {0: "num_tiles"}}
    return Tower(module, {"pixel_values": torch.randn(2, 3, size, size)}, axes, exporter=exporter)


class MaskedTileTower(nn.Module):
    """Idefics3: tiles `[B, N, 3, H, W]` and `[B, N, H, W]` of what is no padding -> `[B x N, tokens, D]`."""

    def __init__(self, vision, connector, patch):
        super().__init__()
        self.vision, self.connector, self.patch = vision, connector, patch

    def forward(self, pixel_values, pixel_attention_mask):
        pixels, mask = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
        count, height, width = mask.shape
        mask = mask.to(torch.int64).reshape(count, height // self.patch, self.patch, width // self.patch, self.patch)
        hidden = self.vision(pixels, patch_attention_mask=mask.sum((2, 4)) > 0).last_hidden_state
        return self.connector(hidden)


def masked_tile_tower(vision, connector, patch, size):
    axes = {0: "batch_size", 1: "num_images"}
    inputs = {
        "pixel_values": torch.randn(2, 3, 3, size, size),
        "pixel_attention_mask": torch.ones(2, 3, size, size, dtype=torch.bool),
    }
    names = {name: axes for name in inputs}
    return Tower(MaskedTileTower(vision, connector, patch), inputs, names, exporter="dyn18")
