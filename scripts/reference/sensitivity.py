#!/usr/bin/env python3
"""Checks the divergences of `interlace export --sensitivity` with numpy and ONNX Runtime.

The prompts are ready tensors, so nothing is tokenised here. For each row: the vision encoder, the embedding, the features in place of
the image tokens, one prefill of the decoder, and `sum(p * ln(p / q))` at every position whose next token is an answer, in float64.
Measured are the written variant and, for some parts, the float graph with the weights of that part alone expanded from the 4-bit files.

    interlace export fixtures/model --precision int4 --data fixtures/data/ready.npz --max-kl 2e-5 -o /tmp/mixed
    interlace export fixtures/model --precision int4 --data fixtures/data/ready.npz --sensitivity -o /tmp/four
    python3 scripts/reference/sensitivity.py fixtures/model fixtures/data/ready.npz /tmp/mixed /tmp/four

Needs numpy, onnx and onnxruntime.
"""

import json
import pathlib
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from precision import blocks, constants, table

COMPONENTS = {"decoder": "decoder_model_merged", "embed_tokens": "embed_tokens", "vision_encoder": "vision_encoder"}


def file_of(root, role, suffix=""):
    return root / f"onnx/{COMPONENTS[role]}{suffix}.onnx"


class Model:
    """The three graphs; `replaced` has models in memory."""

    def __init__(self, root, suffix="", replaced=None):
        self.token = json.loads((root / "config.json").read_text())["image_token_id"]
        self.sessions = {}
        for role in COMPONENTS:
            own = (replaced or {}).get(role)
            source = own.SerializeToString() if own else str(file_of(root, role, suffix))
            self.sessions[role] = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])

    def run(self, role, feeds, output):
        session = self.sessions[role]
        named = {port.name: port for port in session.get_inputs()}
        return session.run([output], {name: value for name, value in feeds.items() if name in named})[0]

    def logits(self, row):
        ids = row["input_ids"][None]
        embeds = self.run("embed_tokens", {"input_ids": ids}, "inputs_embeds").copy()
        pictures = {"pixel_values": row["pixel_values"][None].astype(np.float32), "pixel_attention_mask": row["pixel_attention_mask"][None]}
        features = self.run("vision_encoder", pictures, "image_features")
        embeds[ids == self.token] = features.reshape(-1, embeds.shape[-1])
        feeds = {"inputs_embeds": embeds, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
        for port in self.sessions["decoder"].get_inputs():
            if port.name.startswith("past_key_values"):
                feeds[port.name] = np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32)
        return self.run("decoder", feeds, "logits")[0].astype(np.float64)


def rows_of(path):
    data = np.load(path)
    for number in range(len(data["input_ids"])):
        kept = data["attention_mask"][number] == 1
        row = {"input_ids": data["input_ids"][number][kept], "labels": data["labels"][number][kept]}
        yield row | {name: data[name][number] for name in ("pixel_values", "pixel_attention_mask")}


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(floats, other, rows):
    total = count = 0
    for row in rows:
        p, q = log_softmax(floats.logits(row)), log_softmax(other.logits(row))
        answers = np.append(row["labels"][1:] != -100, False)
        total += (np.exp(p) * (p - q))[answers].sum()
        count += answers.sum()
    return total / count, count


def expanded(source, quantised, wanted):
    """The float graph with the weights that `wanted` names as the 4-bit graph has them."""
    model, four = onnx.load(source), onnx.load(quantised)
    own, values = constants(four), {}
    for node in four.graph.node:
        if node.op_type == "MatMulNBits":
            values[node.input[1].removesuffix("_Q4")] = blocks(node, own, False)[0].T
        elif node.op_type == "GatherBlockQuantized":
            values[node.input[0].removesuffix("_Q4")] = table(node, own, False)[0]
    replaced = 0
    for tensor in model.graph.initializer:
        if tensor.name in values and wanted(tensor.name):
            value = values[tensor.name]
            assert list(tensor.dims) == list(value.shape), tensor.name
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), tensor.name))
            replaced += 1
    assert replaced, source
    return model


def main():
    root, data, mixed, four = map(pathlib.Path, sys.argv[1:])
    rows = list(rows_of(data))
    floats = Model(root)
    said = json.loads((mixed / "interlace-precision.json").read_text())["sensitivity"]
    worst = 0.0

    def show(what, theirs, model):
        nonlocal worst
        found, tokens = divergence(floats, model, rows)
        assert tokens == said["answer_tokens"], (tokens, said["answer_tokens"])
        worst = max(worst, abs(found - theirs) / theirs)
        print(f"{what:<34}{theirs:>14.4e}{found:>14.4e}{abs(found - theirs) / theirs:>10.1e}")

    print(f"{'KL in nats':<34}{'interlace':>14}{'numpy':>14}{'relative':>10}")
    show("written with the budget", said["budget"]["kl"], Model(mixed, "_q4"))
    show("int4 everywhere", said["budget"]["int4_kl"], Model(four, "_q4"))
    report = json.loads((four / "interlace-precision.json").read_text())["sensitivity"]
    for part in report["parts"]:
        role = part["role"]
        if part["part"] == "all":
            graph = expanded(file_of(root, role), file_of(four, role, "_q4"), lambda name: True)
            show(f"{role}, all, int4", part["int4_kl"], Model(root, replaced={role: graph}))
    # The sizes name the whole model.
    size = sum(path.stat().st_size for path in (mixed / "onnx").glob("*_q4.onnx*"))
    assert size == said["budget"]["size_bytes"], (size, said["budget"]["size_bytes"])
    assert worst < 1e-3, worst


if __name__ == "__main__":
    main()
