#!/usr/bin/env python3
"""Perplexity of running text in PyTorch with layers deleted, as JSON, for tests of `interlace eval`.

Builds the decoder with transformers' own Llama classes from the config of an Optimum folder and fills it with the
weights of its graph. Lines are tokenised one by one, joined and split into sequences; transformers computes the mean
loss over all tokens of a sequence except the first.

    python3 scripts/reference/perplexity.py fixtures/zoo/optimum/llama-with-past fixtures/zoo/text/text.jsonl 32 \
        > fixtures/zoo/text/perplexity.json

Needs numpy, onnx, torch, tokenizers and transformers.
"""

import json
import math
import pathlib
import sys

import onnx
import torch
from onnx import numpy_helper
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from finetune import PROJECTIONS

DROPS = [[], [2, 5], [3]]


def network(root, drop):
    config = LlamaConfig(**json.loads((root / "config.json").read_text()))
    graph = onnx.load(root / "model.onnx").graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: value for name, value in weights.items() if name.startswith("model.")}
    # Linear layers come in execution order, transposed: seven per layer, then the head.
    linears = [weights[n.input[1]].T for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    assert len(linears) == 7 * config.num_hidden_layers + 1, len(linears)
    for number, weight in enumerate(linears[:-1]):
        state[f"model.layers.{number // 7}.{PROJECTIONS[number % 7]}.weight"] = weight
    state["lm_head.weight"] = linears[-1]
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in drop]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model


@torch.no_grad()
def main():
    root, text, length = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    ids = [token for line in text.read_text().splitlines() for token in tokenizer.encode(json.loads(line)["text"]).ids]
    sequences = [ids[at : at + length] for at in range(0, len(ids), length)]
    sequences = [torch.tensor([sequence]) for sequence in sequences if len(sequence) > 1]
    rows = []
    for drop in DROPS:
        model = network(root, drop)
        losses = [model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in sequences]
        tokens = sum(sequence.shape[1] - 1 for sequence in sequences)
        rows.append({"drop": drop, "perplexity": math.exp(sum(losses) / tokens), "predicted_tokens": tokens})
    print(json.dumps({"sequence_length": length, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
