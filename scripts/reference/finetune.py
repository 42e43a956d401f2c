#!/usr/bin/env python3
"""Finetunes the fixture decoder in PyTorch, pruned and whole, as the reference for tests of the trainer.

Builds the decoder with transformers' own Llama classes, fills it with the weights of the exported graph, deletes
decoder layers, and trains some of the others for a few steps with torch.optim.AdamW and transformers' cosine schedule
in float32; the same with no layer deleted and all layers trained (`whole` in the output), and with the head's weight
trained besides the layers (`with_head`). Every step uses the same eight texts, so that the order of samples does not matter.

    python3 scripts/reference/finetune.py fixtures/model fixtures/expected/finetune.json

Needs numpy, onnx, onnxruntime, torch and transformers. Set OMP_NUM_THREADS=1 on a busy machine.
"""

import argparse
import json
import math
import pathlib

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

DROPPED = [2, 5]  # as the dense model counts layers
TRAINED = [2, 4]  # as the pruned model counts them
STEPS = 6
LEARNING_RATE = 1e-3
WARMUP_RATIO = 0.03
MAX_GRAD_NORM = 1.0
PROJECTIONS = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]


def texts(vocabulary):
    """Eight texts without pictures: token ids, and which of them are answers."""
    for i in range(8):
        length = 6 + i
        ids = [(7 * i * i + 31 * t * t + 11 * t + 5 * i) % vocabulary for t in range(length)]
        yield ids, [t >= length // 2 for t in range(length)]


def initializers(path):
    model = onnx.load(path)
    return model.graph, {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def network(root):
    """The dense decoder with the exported weights, and the token embeddings."""
    config = json.loads((root / "config.json").read_text())["text_config"]
    foreign = {"architectures", "dtype", "model_type", "_name_or_path"}
    config = LlamaConfig(**{key: value for key, value in config.items() if key not in foreign})
    config._attn_implementation = "eager"
    graph, weights = initializers(root / "onnx" / "decoder_model_merged.onnx")
    state = {name: value for name, value in weights.items() if name.endswith("norm.weight")}
    # Linear layers come in execution order, transposed: seven per layer, then the head.
    linears = [weights[n.input[1]].T for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    assert len(linears) == 7 * config.num_hidden_layers + 1, len(linears)
    for number, weight in enumerate(linears[:-1]):
        state[f"model.layers.{number // 7}.{PROJECTIONS[number % 7]}.weight"] = weight
    _, embeddings = initializers(root / "onnx" / "embed_tokens.onnx")
    (table,) = [value for value in embeddings.values() if value.ndim == 2]
    state["model.embed_tokens.weight"] = table
    state["lm_head.weight"] = linears[-1]
    net = LlamaForCausalLM(config).float()
    net.lm_head.weight = torch.nn.Parameter(torch.empty(linears[-1].shape))
    net.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return net, table


def check_against_onnx(root, net, table):
    """The network must be the exported one before anything is trained."""
    ids, _ = list(texts(len(table)))[3]
    session = onnxruntime.InferenceSession(str(root / "onnx" / "decoder_model_merged.onnx"))
    feeds = {}
    for port in session.get_inputs():
        if port.name == "inputs_embeds":
            feeds[port.name] = table[ids][None]
        elif port.name == "attention_mask":
            feeds[port.name] = np.ones((1, len(ids)), np.int64)
        elif port.name == "position_ids":
            feeds[port.name] = np.arange(len(ids))[None]
        else:
            feeds[port.name] = np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32)
    exported = session.run(["logits"], feeds)[0]
    with torch.no_grad():
        own = net(input_ids=torch.tensor([ids])).logits.numpy()
    difference = float(np.abs(exported - own).max())
    assert difference < 1e-4, f"logits differ by {difference}"


def train(root, dropped, trained, steps_to_take, head=False):
    """Loss, gradient norm and learning rate of every step, with `dropped` layers deleted and `trained` of the rest trained,
    and the head's weight where `head` is set."""
    net, table = network(root)
    check_against_onnx(root, net, table)
    kept = [layer for number, layer in enumerate(net.model.layers) if number not in dropped]
    net.model.layers = torch.nn.ModuleList(kept)
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    net.config.num_hidden_layers = len(kept)
    net.requires_grad_(False)
    parameters = [p for number in trained for p in net.model.layers[number].requires_grad_(True).parameters()]
    if head:
        parameters.append(net.lm_head.weight.requires_grad_(True))
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(WARMUP_RATIO * steps_to_take), steps_to_take)
    samples = list(texts(len(table)))
    answers = sum(sum(mask[1:]) for _, mask in samples)
    steps = []
    for _ in range(steps_to_take):
        optimizer.zero_grad()
        loss = 0
        for ids, mask in samples:
            logits = net(input_ids=torch.tensor([ids])).logits[0]
            targets = torch.tensor([token if answer else -100 for token, answer in zip(ids[1:], mask[1:])])
            loss = loss + torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum") / answers
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        steps.append({
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "learning_rate": optimizer.param_groups[0]["lr"],
        })
        optimizer.step()
        schedule.step()
    return {"dropped": dropped, "trained": trained, "steps": steps}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = train(arguments.model, DROPPED, TRAINED, STEPS)
    layers = len(network(arguments.model)[0].model.layers)
    result["whole"] = train(arguments.model, [], list(range(layers)), STEPS)
    result["with_head"] = train(arguments.model, DROPPED, TRAINED, STEPS, head=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
