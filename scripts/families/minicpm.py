"""MiniCPM-V 4.6: the whole picture and slices of it, packed as patches in one row; features are merged twice."""
import torch
from torch import nn
from transformers import MiniCPMV4_6Processor
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor

import base
import tiles
import towers

SIZE, PATCH = 112, 14
NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


class SliceTower(nn.Module):
    """pixel_values `[1, 3, P, P x patches]` and the grids of slices `[N, 2]` -> features `[tokens, D]`.

    What Hugging Face computes per slice in loops is computed per patch, so the graph takes any number of slices.
    """

    def __init__(self, model):
        super().__init__()
        self.tower, self.merger = model.vision_tower, model.merger.mlp[0]
        self.at = model.config.insert_layer_id

    def places(self, sizes, count):
        """Slice, row, column and grid of each patch, and where its slice begins."""
        areas = sizes[:, 0] * sizes[:, 1]
        ends = torch.cumsum(areas, 0)
        index = torch.arange(count)
        number = (index[:, None] >= ends[None, :]).to(torch.int64).sum(1)
        begin = (ends - areas)[number]
        height, width = sizes[:, 0][number], sizes[:, 1][number]
        row, column = (index - begin) // width, (index - begin) % width
        return number, row, column, height, width, begin

    def positions(self, row, column, height, width):
        """The nearest place in the learned grid of positions."""
        side = self.tower.embeddings.num_patches_per_side
        bounds = torch.arange(1 / side, 1.0, 1 / side)
        near = lambda index, size: (index.to(torch.float32) / size.to(torch.float32))[:, None] >= bounds[None, :]
        return near(row, height).to(torch.int64).sum(1) * side + near(column, width).to(torch.int64).sum(1)

    def blocks(self, sizes, count):
        """The order of patches in which each 2 x 2 block stands together."""
        _, row, column, _, width, begin = self.places(sizes, count)
        inner = (row % 2) * 2 + column % 2
        target = begin + ((row // 2) * (width // 2) + column // 2) * 4 + inner
        return torch.argsort(target)

    def forward(self, pixel_values, target_sizes):
        tower = self.tower
        tower.config._attn_implementation = towers.SEGMENTS
        patches = tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        number, row, column, height, width, _ = self.places(target_sizes, patches.shape[1])
        places = self.positions(row, column, height, width)
        hidden = patches + tower.embeddings.position_embedding(places)[None]
        sizes, segments = target_sizes, number
        for index, layer in enumerate(tower.encoder.layers):
            hidden = self.layer(layer, hidden, segments)
            if index == self.at:
                hidden = self.merge(tower.vit_merger, hidden, sizes)
                sizes = sizes // 2
                segments = self.places(sizes, hidden.shape[1])[0]
        hidden = tower.post_layernorm(hidden)
        return self.merger(hidden[0][self.blocks(sizes, hidden.shape[1])].reshape(-1, 4 * hidden.shape[-1]))

    def attention(self, module, hidden, segments):
        heads = lambda x: x.reshape(1, -1, module.num_heads, module.head_dim).transpose(1, 2)
        query, key, value = (heads(part(hidden)) for part in (module.q_proj, module.k_proj, module.v_proj))
        out, _ = towers.attention_of_segments(module, query, key, value, None, segments, module.scaling)
        return module.out_proj(out.reshape(1, -1, module.dim))

    def layer(self, layer, hidden, segments):
        hidden = hidden + self.attention(layer.self_attn, layer.layer_norm1(hidden), segments)
        return hidden + layer.mlp(layer.layer_norm2(hidden))

    def merge(self, merger, hidden, sizes):
        """Four neighbours become one, after attention among them."""
        hidden = hidden[:, self.blocks(sizes, hidden.shape[1])]
        window = torch.arange(hidden.shape[1]) // 4
        hidden = hidden + self.attention(merger.self_attn, merger.layer_norm1(hidden), window)
        blocks = hidden.reshape(-1, 4, hidden.shape[-1])
        made = merger.linear_2(merger.act(merger.linear_1(merger.pre_norm(blocks.flatten(1)))))
        return (made + blocks.mean(1))[None]


def minicpm_v(name="minicpm_v"):
    """The text part of the published model is Qwen 3.5; here it is Qwen 3, whose layers are all of one kind."""
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED.values()]
    tok = base.tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>", named=NAMED)
    number = tok.convert_tokens_to_ids
    text = base.TEXT | {"model_type": "qwen3", "head_dim": 16, "vocab_size": len(tok), "eos_token_id": number("<|im_end|>")}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    config = MiniCPMV4_6Config(
        text_config=text,
        vision_config=vision,
        insert_layer_id=1,
        image_size=SIZE,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        tie_word_embeddings=False,
    )
    model = base.fill(MiniCPMV4_6ForConditionalGeneration(config), 32)
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "downsample_mode": "16x",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_slice_nums": 9,
        "patch_size": PATCH,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "scale_resolution": SIZE,
        "slice_mode": True,
        "use_image_id": True,
    }
    processor = MiniCPMV4_6Processor(
        image_processor=MiniCPMV4_6ImageProcessorPil(**settings),
        video_processor=MiniCPMV4_6VideoProcessor(),
        tokenizer=tok,
        chat_template=tiles.turns("<|image_pad|>\\n"),
    )
    sizes = torch.tensor([[8, 8], [4, 12], [4, 12]])
    inputs = {"pixel_values": torch.randn(1, 3, PATCH, PATCH * 160), "target_sizes": sizes}
    axes = {"pixel_values": {3: "packed_width"}, "target_sizes": {0: "num_slices"}, "image_features": {0: "num_image_tokens"}}
    return base.Family(
        name,
        model,
        processor,
        settings | {"image_processor_type": "MiniCPMV4_6ImageProcessor", "processor_class": "MiniCPMV4_6Processor"},
        towers.Tower(SliceTower(model.model), inputs, axes),
        processor_config={"processor_class": "MiniCPMV4_6Processor"},
        nested_images=True,
    )


ROWS = [minicpm_v]
