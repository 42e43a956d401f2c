"""A language model as a folder in the layout of transformers.js: one decoder that takes token ids.

usage: model.py GGUF OUT      GGUF: a file of SmolLM2-135M-Instruct or Gemma 3 270M with quantised weights; OUT: a new folder

The weights are expanded to f32; the dense model is this network, not the one before quantisation. The
exported graph is compared with PyTorch on a prefill and on a step with a cache.
"""
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from tokenizers import pre_tokenizers
from torch.export import Dim
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

TOLERANCE = 1e-3


def network(path):
    """The network in f32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.generation_config = GenerationConfig.from_model_config(model.config)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if model.config.model_type == "llama":
        # The file names SmolLM's splitting of texts (one token per digit) without spelling it out.
        by_digit = pre_tokenizers.Digits(individual_digits=True)
        by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_digit, by_byte])
    return model, tokenizer


def cached(key, value):
    layer = DynamicLayer()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer


class Decoder(torch.nn.Module):
    """input_ids `[B, T]`, attention_mask `[B, P + T]`, position_ids `[B, T]`, caches -> logits `[B, T, V]`, caches."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *states):
        states = list(states[0]) if states and isinstance(states[0], (list, tuple)) else list(states)
        cache = DynamicCache()
        cache.layers = [cached(key, value) for key, value in zip(states[::2], states[1::2])]
        cache.layer_class_to_replicate = None
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (out.logits, *[state for layer in cache.layers for state in (layer.keys, layer.values)])


def names(config):
    return [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]


def states(config, batch, past):
    shape = (batch, config.num_key_value_heads, past, config.head_dim)
    return [torch.randn(shape) for _ in names(config)]


def export(model, path):
    config = model.config
    config._attn_implementation = "eager"
    past = [f"past_key_values.{name}" for name in names(config)]
    present = [f"present.{name}" for name in names(config)]
    arguments = (
        torch.randint(3, config.vocab_size, (2, 3)),
        torch.ones(2, 8, dtype=torch.long),
        torch.arange(5, 8).expand(2, 3).contiguous(),
        *states(config, 2, 5),
    )
    tokens = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Decoder(model),
            arguments,
            str(path),
            input_names=["input_ids", "attention_mask", "position_ids", *past],
            output_names=["logits", *present],
            dynamic_shapes=(tokens, tokens, tokens, tuple({0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in past)),
            opset_version=18,
            dynamo=True,
            external_data=True,
            verbose=False,
        )


def check(model, tokenizer, path):
    """Largest difference of logits between ONNX Runtime and PyTorch, over a prefill and a step with a cache."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    config = model.config
    ids = tokenizer("The package manager reads its list of sources from a file.", return_tensors="pt").input_ids
    time = ids.shape[1]
    with torch.no_grad():
        want = model(input_ids=ids).logits.numpy()
    caches = {f"past_key_values.{name}": state.numpy() for name, state in zip(names(config), states(config, 1, 0))}
    worst, done = 0.0, 0
    for end in (time - 1, time):
        feeds = {
            "input_ids": ids[:, done:end].numpy(),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(done, end)[None],
        }
        logits, *present = session.run(None, feeds | caches)
        worst = max(worst, float(np.abs(logits - want[:, done:end]).max()))
        caches = dict(zip(caches, present))
        done = end
    return worst


def main():
    source, out = map(Path, sys.argv[1:])
    (out / "onnx").mkdir(parents=True)
    model, tokenizer = network(source)
    torch.manual_seed(0)
    export(model, out / "onnx" / "model.onnx")
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    difference = check(model, tokenizer, out / "onnx" / "model.onnx")
    print(json.dumps({"largest_difference_of_logits": difference}))
    if not difference <= TOLERANCE:
        sys.exit(f"logits differ by {difference}, at most {TOLERANCE} is allowed")


if __name__ == "__main__":
    main()
