"""Common code of the families: the row type of a family, sizes, weights, tokenizer and the removal of layers."""
import copy
import dataclasses
import inspect
import math

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

LAYERS = 6
DROP = (1, 4)
# Sizes of the text part. The vocabulary is set when the tokenizer is known.
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
CORPUS = [
    "What is in this picture? A red square, a blue circle and a green line.",
    "Describe the image. The image shows the colour of the sky over a house.",
    "How many are there? There are two. Is it the same as the other one? Yes, no.",
    "Answer the question using a single word or phrase. Please answer with the option letter only.",
    "user assistant system model User Assistant USER ASSISTANT helpful You are a",
]


@dataclasses.dataclass
class Family:
    """One family: the network, its processor and how its parts are exported."""

    name: str
    # Hugging Face's model, in f32 and evaluation mode.
    model: nn.Module
    # Hugging Face's processor with the image processor of the Pillow back end.
    processor: object
    # preprocessor_config.json as the hub's repositories have it; `None` where processor_config.json holds it.
    preprocessor: dict | None
    # The vision part: a `towers.Tower`.
    tower: object
    # Graph inputs of the decoder beside embeddings, mask, positions and caches: a list of `decoders.Extra`.
    extras: list = dataclasses.field(default_factory=list)
    # processor_config.json, for families that have one.
    processor_config: dict | None = None
    # Settings laid over what the model's config says.
    config: dict = dataclasses.field(default_factory=dict)
    # Whether the text part's keys lie at the top of config.json.
    flat: bool = False
    # The class that is exported as the text part, if not `decoders.Decoder`.
    decoder: type | None = None
    # Rows of position ids.
    position_rows: int = 1
    # Settings of the exporter: TorchScript at 17 or dynamo at 18.
    decoder_exporter: str = "ts17"
    # Token embeddings, where they are more than a look-up.
    embed: nn.Module | None = None
    # Whether the processor wants the pictures of each prompt in a list of their own.
    nested_images: bool = False
    # Which files the graphs are, and whether image features are merged by the embeddings' graph.
    layout: str = "transformers.js"
    # Generation settings beside the end of text.
    generation: dict = dataclasses.field(default_factory=dict)
    # Outputs of the processor that the exported decoder has no input for.
    refused: set = dataclasses.field(default_factory=set)
    # Image features where they are not what the whole network makes of the processor's outputs.
    features: object = None
    # Whether pictures go through the vision encoder one at a time, without padding.
    one_by_one: bool = False
    # The first position, where positions do not begin at 0.
    first_position: int = 0
    # The prompt of a question about so many pictures, for a family without a chat template.
    written: object = None
    # Whether layers have something added between them by number, so that there are two ways to delete one.
    counts_layers: bool = False
    # Whether layers read something by number that stays theirs when another is deleted.
    keep_places: bool = False
    # Layers that are dropped where a network is healed, if not `DROP`.
    heal_drop: tuple = ()
    # Whether a video is among the cases.
    shows_video: bool = False
    # The graph behind the text part, where it gives no logits itself.
    head: nn.Module | None = None
    # The graph behind the vision part that brings features to the decoder's width: a `towers.Tower`.
    projector: object = None

    @property
    def image_token_id(self):
        config = self.model.config
        found = getattr(config, "image_token_id", None)
        return found if found is not None else config.image_token_index

    def accepted(self):
        """Arguments that the network takes from a processor's outputs."""
        return set(inspect.signature(self.model.forward).parameters) - self.refused

    def prunings(self):
        """Names of the pruned networks, and whether what is added between layers keeps its place."""
        return [("pruned", self.keep_places)] + [("pruned_keep", True)] * self.counts_layers


def tokenizer(special, eos, bos=None, pad=None, named=None, add_bos=False):
    """A byte-level BPE of a few hundred entries; `special` are whole tokens behind the learned ones."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False, initial_alphabet=alphabet)
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_special_tokens(list(special))
    if add_bos:
        number = inner.token_to_id(bos)
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
        )
        inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=eos,
        bos_token=bos,
        pad_token=pad or eos,
        extra_special_tokens=named or {},
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        padding_side="left",
    )


@torch.no_grad()
def fill(model, seed):
    """Random values for every parameter, rounded to few different ones so that they compress well.

    Some initialisers leave zeros, and zeros compare nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    centred = any(word in type(model).__name__ for word in ("Gemma3F", "PaliGemma"))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre, scale = 0.0, 0.1
        if "norm" in name.lower() and name.endswith("weight"):
            centre = 0.0 if centred and "vision" not in name else 1.0
        elif "embed_tokens" in name or "position_embedding" in name or "pos_embed" in name:
            scale = 1.0
        elif parameter.ndim >= 2:
            fan_in = parameter[0].numel() if parameter.ndim != 3 else max(parameter.shape[1:])
            scale = fan_in**-0.5
        step = 2.0 ** (math.floor(math.log2(scale)) - 2)
        parameter.copy_(centre + (noise * scale / step).round() * step)
    return model.float().eval()


def text_model(model):
    """The stack of decoder layers."""
    inner = getattr(model, "model", model)
    for name in ("language_model", "text_model"):
        found = getattr(inner, name, None)
        if found is not None:
            return found
    return inner


def without_layers(model, drop, keep_places=False):
    """A copy without the given decoder layers: each deleted, or the identity with `keep_places`.

    The two differ where the network does something between layers that it counts.
    """
    pruned = copy.deepcopy(model)
    text = text_model(pruned)
    if keep_places:
        for index in drop:
            text.layers[index] = Identity()
    else:
        text.layers = nn.ModuleList(layer for index, layer in enumerate(text.layers) if index not in drop)
    kept = [layer for layer in text.layers if not isinstance(layer, Identity)]
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    kinds = getattr(text.config, "layer_types", None)
    if kinds and not keep_places:
        text.config.layer_types = [kind for index, kind in enumerate(kinds) if index not in drop]
    text.config.num_hidden_layers = len(kept) if not keep_places else len(text.layers)
    return pruned


class Identity(nn.Module):
    def forward(self, hidden_states, *_, **__):
        return hidden_states
