#!/usr/bin/env python3
"""Quantises a small decoder with ONNX Runtime's own tools, and differentiates adapters beside its weights in PyTorch.

The decoder is the fixture's with its first three layers, as `interlace prune` writes it. Four forms are written:
`int4` and `int4-zeros` (MatMulNBitsQuantizer, symmetric in blocks of 32 and with zero points in blocks of 16),
`int8` (quantize_dynamic, a scale per channel) and `qdq` (quantize_static, QDQ format, a scale per channel,
calibrated on five texts). `gradients.npz` holds what PyTorch gives for each: transformers' own Llama classes with the
weights as the graph holds them, with adapters `y = x W + scale (x A) B` beside the seven products of layer 1, and the
gradients of `A` and `B` for the mean cross-entropy of the answers of three texts. Activations are rounded where the graph
rounds them, and the gradient passes straight through. In these three texts no rounded number lies on the border between two
steps, where its last bit, which differs between libraries, would decide.

    interlace prune fixtures/model --drop 3,4,5,6,7,8,9,10,11,12,13,14,15 -o /tmp/three
    python3 scripts/reference/quantised.py fixtures/model /tmp/three fixtures/quantised
    cd fixtures/quantised && tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf - *.onnx | zstd -19 -o models.tar.zst && rm *.onnx

Needs numpy, onnx, onnxruntime, torch and transformers.
"""

import argparse
import pathlib
import tempfile

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from finetune import PROJECTIONS, network, texts

LAYERS, TRAINED, RANK, SCALE = 3, 1, 2, 4.0
SAMPLES = 0, 6, 7
DISTURBED = False  # changes the last bit of what is rounded


def feeds_of(session, table, ids):
    feeds = {"inputs_embeds": table[ids][None], "attention_mask": np.ones((1, len(ids)), np.int64),
             "position_ids": np.arange(len(ids))[None]}
    for port in session.get_inputs():
        if port.name not in feeds:
            feeds[port.name] = np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32)
    return feeds


class Reader(CalibrationDataReader):
    def __init__(self, path, table):
        session = onnxruntime.InferenceSession(str(path))
        self.rows = iter([feeds_of(session, table, ids) for ids, _ in list(texts(len(table)))[:5]])

    def get_next(self):
        return next(self.rows, None)


def four_bits(source, target, block, symmetric):
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=block, is_symmetric=symmetric)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


def int8(source, target):
    quantize_dynamic(str(source), str(target), per_channel=True, weight_type=QuantType.QInt8)


def qdq(source, target, table):
    with tempfile.TemporaryDirectory() as folder:
        whole = pathlib.Path(folder) / "whole.onnx"
        model = onnx.load(source)
        onnx.save(model, whole)
        weights = {tensor.name for tensor in model.graph.initializer}
        attention = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] not in weights]
        quantize_static(str(whole), str(target), Reader(whole, table), quant_format=QuantFormat.QDQ, per_channel=True,
                        op_types_to_quantize=["MatMul"], nodes_to_exclude=attention, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


def unpacked(numbers):
    return np.stack([numbers & 15, numbers >> 4], -1).reshape(*numbers.shape[:-1], -1)


def products(path):
    """Of each product with a weight, in execution order: the name of its numbers, the floats [K, N], and how the first
    factor and the result are rounded (None, "dynamic", or scale and zero point)."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            numbers = unpacked(arrays[node.input[1]]).astype(np.float32)
            scales = arrays[node.input[2]].reshape(*numbers.shape[:2], 1)
            zeros = np.float32(8)
            if len(node.input) > 3 and node.input[3]:
                zeros = unpacked(arrays[node.input[3]].reshape(sizes["N"], -1))[:, :numbers.shape[1], None].astype(np.float32)
            floats = ((numbers - zeros) * scales).reshape(sizes["N"], -1)[:, :sizes["K"]].T
            yield node.input[1], floats, None, None
        elif node.op_type == "MatMulInteger":
            weight, zeros = arrays[node.input[1]].astype(np.float32), arrays[node.input[3]].astype(np.float32)
            name = node.input[1].removesuffix("_quantized")
            yield node.input[1], (weight - zeros) * arrays[name + "_scale"], "dynamic", None
        elif node.op_type == "MatMul" and node.input[1] in makers and makers[node.input[1]].op_type == "DequantizeLinear":
            expanding, rounding = makers[node.input[1]], makers[node.input[0]]
            if expanding.input[0] not in arrays:
                continue
            weight, scale, zeros = (arrays[name].astype(np.float32) for name in expanding.input)
            after = readers[node.output[0]]
            result = tuple(arrays[name] for name in after.input[1:]) if after.op_type == "QuantizeLinear" else None
            yield expanding.input[0], (weight - zeros) * scale, tuple(arrays[name] for name in rounding.input[1:]), result


def rounded(x, how):
    if how is None:
        return x
    if DISTURBED:
        x = x * (1 + 2.0 ** -23 * torch.sign(torch.randn_like(x)))
    if how == "dynamic":
        low, high = x.detach().min().clamp(max=0), x.detach().max().clamp(min=0)
        scale = (high - low) / 255
        zero = (-low / scale).clamp(0, 255).round()
        value = ((x.detach() / scale).round() + zero).clamp(0, 255)
        return x + ((value - zero) * scale - x).detach()
    return torch.fake_quantize_per_tensor_affine(x, float(how[0]), int(how[1]), 0, 255)


def filled(*size):
    """Adapters that are the same in every language."""
    return torch.sin(0.37 * torch.arange(size[0] * size[1], dtype=torch.float64)).reshape(size).float() * 0.05


class Product(torch.nn.Module):
    def __init__(self, floats, how, result, adapted):
        super().__init__()
        self.weight = torch.from_numpy(np.ascontiguousarray(floats))
        self.how, self.result, self.adapter = how, result, None
        if adapted:
            rows, columns = floats.shape
            self.adapter = [filled(rows, RANK).requires_grad_(), filled(RANK, columns).requires_grad_()]

    def forward(self, x):
        x = rounded(x, self.how)
        y = x @ self.weight
        if self.adapter:
            y = y + SCALE * (x @ self.adapter[0] @ self.adapter[1])
        return rounded(y, self.result)


def differentiated(root, path):
    net, table = network(root)
    net.model.layers = torch.nn.ModuleList(list(net.model.layers)[:LAYERS])
    net.config.num_hidden_layers = LAYERS
    net.requires_grad_(False)
    found = list(products(path))
    assert len(found) == 7 * LAYERS + 1, len(found)
    for number, (_, floats, *how) in enumerate(found[:-1]):
        layer = net.model.layers[number // 7]
        parent, name = PROJECTIONS[number % 7].split(".")
        setattr(getattr(layer, parent), name, Product(floats, *how, number // 7 == TRAINED))
    net.lm_head = Product(*found[-1][1:], False)
    samples = [list(texts(len(table)))[number] for number in SAMPLES]
    answers = sum(sum(mask[1:]) for _, mask in samples)
    loss = 0
    for ids, mask in samples:
        logits = net(input_ids=torch.tensor([ids])).logits[0]
        targets = torch.tensor([token if answer else -100 for token, answer in zip(ids[1:], mask[1:])])
        loss = loss + torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum") / answers
    loss.backward()
    result = {"loss": np.float32(loss.item())}
    for number, (name, *_) in enumerate(found[:-1]):
        if number // 7 == TRAINED:
            parent, own = PROJECTIONS[number % 7].split(".")
            adapter = getattr(getattr(net.model.layers[TRAINED], parent), own).adapter
            result |= {f"{name}.A": adapter[0].grad.numpy(), f"{name}.B": adapter[1].grad.numpy()}
    # The graph gives the same logits, without the adapters.
    for module in net.modules():
        if isinstance(module, Product):
            module.adapter = None
    session = onnxruntime.InferenceSession(str(path))
    ids, _ = samples[-1]
    want = session.run(["logits"], feeds_of(session, table, ids))[0]
    off = np.abs(net(input_ids=torch.tensor([ids])).logits.detach().numpy() - want).max() / np.abs(want).max()
    print(f"{path.name}: loss {loss.item():.6f}, logits of ONNX Runtime within {off:.1e} of the largest")
    assert off < 2e-2, off
    return result


def check_steady(root, path, found):
    """Last bits, which differ between libraries, must not decide how a number is rounded."""
    global DISTURBED
    DISTURBED = True
    for seed in range(4):
        torch.manual_seed(seed)
        for key, value in differentiated(root, path).items():
            off = np.linalg.norm(value - found[key]) / np.linalg.norm(found[key])
            assert off < 1e-5, f"{path.name}: the last bit of a rounded number changes {key} by {off}"
    DISTURBED = False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("three", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    source = arguments.three / "onnx" / "decoder_model_merged.onnx"
    _, table = network(arguments.model)
    forms = {
        "int4": lambda target: four_bits(source, target, 32, True),
        "int4-zeros": lambda target: four_bits(source, target, 16, False),
        "int8": lambda target: int8(source, target),
        "qdq": lambda target: qdq(source, target, table),
    }
    gradients = {}
    for name, write in forms.items():
        target = arguments.output / f"{name}.onnx"
        write(target)
        found = differentiated(arguments.model, target)
        check_steady(arguments.model, target, found)
        gradients |= {f"{name}/{key}": value for key, value in found.items()}
    np.savez_compressed(arguments.output / "gradients.npz", **gradients)


if __name__ == "__main__":
    main()
