"""Exports networks that have no layers to drop, and shows the errors of `inspect` and `prune`.

Whisper's decoder, with and without cache, and its encoder and decoder in one graph; T5 likewise; a ResNet; a perceptron.
Whisper's encoder alone is a plain stack of layers and is accepted.

usage: refused.py OUT_DIR --interlace BINARY
"""
import argparse
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

WIDTH, LAYERS = 32, 3


class Calls(nn.Module):
    """A network under another signature."""

    def __init__(self, model, call):
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *inputs):
        return self.call(self.model, *inputs)


def whisper():
    sizes = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in SIZES.items()}
    config = WhisperConfig(
        vocab_size=100, d_model=WIDTH, num_mel_bins=8, max_source_positions=50, max_target_positions=32, **sizes,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )
    config._attn_implementation = "eager"
    return WhisperForConditionalGeneration(config).eval()


SIZES = {"layers": LAYERS, "attention_heads": 4, "ffn_dim": 64}


def t5():
    config = T5Config(
        vocab_size=100, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def decoder(model, ids, memory):
    # With a mask the exporter need not look for several texts in one row.
    mask = torch.ones_like(ids)
    out = model.model.decoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=memory, use_cache=False)
    return model.proj_out(out.last_hidden_state)


def cached(model, ids, *states):
    """One step of Whisper's decoder: keys and values of its own tokens and of the encoder's come from outside."""
    own, other = DynamicCache(), DynamicCache()
    for layer in range(LAYERS):
        own.update(*states[4 * layer : 4 * layer + 2], layer)
        other.update(*states[4 * layer + 2 : 4 * layer + 4], layer)
    cache = EncoderDecoderCache(own, other)
    cache.is_updated = dict.fromkeys(range(LAYERS), True)
    memory = torch.zeros(1, 50, WIDTH)
    mask = torch.ones(1, 6, dtype=torch.long)
    out = model.model.decoder(
        input_ids=ids, attention_mask=mask, encoder_hidden_states=memory, past_key_values=cache, use_cache=True
    )
    return (model.proj_out(out.last_hidden_state), *(part for layer in own.layers for part in (layer.keys, layer.values)))


IDS = torch.zeros(1, 4, dtype=torch.long)
MEMORY = torch.randn(1, 50, WIDTH)
MELS = torch.randn(1, 8, 100)
STATES = [torch.randn(1, 4, length, 8) for _ in range(LAYERS) for length in (5, 5, 50, 50)]

# What is exported, its inputs, and whether it is refused.
CASES = {
    "whisper_decoder": (whisper, decoder, (IDS, MEMORY), True),
    "whisper_decoder_with_past": (whisper, cached, (IDS[:, :1], *STATES), True),
    "whisper": (
        whisper,
        lambda model, mels, ids: model(
            input_features=mels, decoder_input_ids=ids, decoder_attention_mask=torch.ones_like(ids), use_cache=False
        ).logits,
        (MELS, IDS),
        True,
    ),
    "whisper_encoder": (whisper, lambda model, mels: model.model.encoder(mels).last_hidden_state, (MELS,), False),
    "t5_decoder": (
        t5,
        lambda model, ids, memory: model(decoder_input_ids=ids, encoder_outputs=(memory,), use_cache=False).logits,
        (IDS, MEMORY),
        True,
    ),
    "t5": (t5, lambda model, a, b: model(input_ids=a, decoder_input_ids=b, use_cache=False).logits, (IDS, IDS), True),
    "resnet": (
        lambda: ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2], layer_type="basic")
        ).eval(),
        lambda model, x: model(x).last_hidden_state,
        (torch.randn(1, 3, 64, 64),),
        True,
    ),
    "perceptron": (
        lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))),
        lambda model, x: model(x),
        (torch.randn(1, 16),),
        True,
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--interlace", required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    wrong = 0
    for name, (build, call, inputs, refused) in CASES.items():
        path = args.out / f"{name}.onnx"
        with torch.no_grad():
            torch.onnx.export(Calls(build(), call), inputs, str(path), opset_version=17, dynamo=False)
        out = args.out / f"{name}-pruned"
        for command in (["inspect", path], ["prune", path, "--drop", "1", "-o", out]):
            ran = subprocess.run([args.interlace, "-q", *map(str, command)], capture_output=True, text=True)
            good = (ran.returncode == 2) == refused and out.exists() == (not refused and command[0] == "prune")
            wrong += not good
            said = " ".join(ran.stderr.split()) if ran.returncode else "taken"
            print("ok  " if good else "BAD ", name, command[0], said, sep="\t", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
