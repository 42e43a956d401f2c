#!/usr/bin/env python3
"""Compares the weights of `interlace export --precision` with those of ONNX Runtime's own quantisers, on the same graph.

For each form the weights are turned into floats again, by the formula of the operator and, for `MatMulNBits` and
`GatherBlockQuantized`, by ONNX Runtime too. Printed are the root of the mean square of all differences to the float weights,
divided by that of the weights, and the bytes of numbers, scales and zero points.

    interlace export fixtures/model --precision int4,int8 -o /tmp/searched
    interlace export fixtures/model --precision int4 --rounding nearest -o /tmp/nearest
    interlace export fixtures/model --precision int4 --zero-points -o /tmp/zeros
    interlace export fixtures/model --precision int8-qdq --data fixtures/data/finetune-small.parquet -o /tmp/qdq
    python3 scripts/reference/precision.py fixtures/model --searched /tmp/searched --nearest /tmp/nearest --zeros /tmp/zeros --qdq /tmp/qdq

Needs numpy, onnx and onnxruntime.
"""

import argparse
import logging
import pathlib
import tempfile

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

COMPONENTS = "decoder_model_merged", "vision_encoder", "embed_tokens"


def constants(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def attributes(node):
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def nibbles(numbers):
    return np.stack([numbers & 15, numbers >> 4], -1).reshape(*numbers.shape[:-1], -1)


def run(node, constants, feeds, output):
    """What ONNX Runtime gives for one node alone."""
    node = onnx.NodeProto.FromString(node.SerializeToString())
    types = {name: onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feeds.items()}
    inputs = [onnx.helper.make_tensor_value_info(name, types[name], value.shape) for name, value in feeds.items()]
    outputs = [onnx.helper.make_tensor_value_info(node.output[0], output, None)]
    own = [numpy_helper.from_array(constants[name], name) for name in node.input if name in constants]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs, own)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def blocks(node, constants, checked):
    """`[N, K]` of a `MatMulNBits`, and its bytes."""
    own, parts = attributes(node), [constants[name] for name in node.input[1:] if name]
    rows, columns, block = own["N"], own["K"], own["block_size"]
    count = -(-columns // block)
    numbers = nibbles(parts[0].reshape(rows, count, -1)).astype(np.float32)
    scales = parts[1].reshape(rows, count, 1).astype(np.float32)
    zeros = nibbles(parts[2].reshape(rows, -1))[:, :count, None].astype(np.float32) if len(parts) > 2 else 8.0
    values = ((numbers - zeros) * scales).reshape(rows, -1)[:, :columns]
    if checked:
        eye = np.eye(columns, dtype=np.float32)
        found = run(node, constants, {node.input[0]: eye}, onnx.TensorProto.FLOAT).T
        assert np.abs(found - values).max() <= 1e-6 * np.abs(values).max(), node.name
    return values, sum(part.nbytes for part in parts)


def table(node, constants, checked):
    """`[V, K]` of a `GatherBlockQuantized`, and its bytes."""
    own, parts = attributes(node), [constants[name] for name in node.input if name in constants]
    block = own["block_size"]
    if parts[0].dtype == np.uint8:
        numbers, half = nibbles(parts[0]).astype(np.float32), 8.0
    else:
        numbers, half = parts[0].astype(np.float32), 0.0
    rows, columns = numbers.shape
    scales = np.repeat(parts[1].reshape(rows, -1).astype(np.float32), block, 1)[:, :columns]
    if len(parts) > 2:
        zeros = nibbles(parts[2])[:, : -(-columns // block)] if parts[2].dtype == np.uint8 else parts[2].astype(np.float32)
        half = np.repeat(zeros.astype(np.float32), block, 1)[:, :columns]
    values = (numbers - half) * scales
    if checked:
        ids = np.arange(rows, dtype=np.int64)[None]
        found = run(node, constants, {node.input[1]: ids}, onnx.TensorProto.FLOAT)[0]
        assert np.abs(found - values).max() <= 1e-6 * np.abs(values).max(), node.name
    packed = 2 if parts[0].dtype != np.uint8 else 1
    return values, parts[0].nbytes // packed + sum(part.nbytes for part in parts[1:])


def channels(numbers, scale, zero, axis):
    shape = [1] * numbers.ndim
    if np.size(scale) > 1:
        shape[axis] = -1
    zero = zero if zero is not None else np.zeros_like(scale, numbers.dtype)
    values = (numbers.astype(np.float32) - zero.reshape(shape).astype(np.float32)) * scale.reshape(shape)
    return values, numbers.nbytes + scale.nbytes + zero.nbytes


def weights_of(path, checked=False):
    """Every quantised weight as floats: values and bytes, in the order of the nodes."""
    model = onnx.load(path)
    own = constants(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    readers = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            values, size = blocks(node, own, checked)
            yield values.T, size
        elif node.op_type == "GatherBlockQuantized":
            yield table(node, own, checked)
        elif node.op_type == "MatMulInteger":
            cast = readers[node.output[0]][0]
            last = readers[cast.output[0]][0]
            factors = makers[[name for name in last.input if name != cast.output[0]][0]]
            scale = own[[name for name in factors.input if name in own][0]]
            zero = own.get(node.input[3]) if len(node.input) > 3 else None
            yield channels(own[node.input[1]], scale, zero, 1)
        elif node.op_type == "DequantizeLinear":
            source = node.input[0]
            if source in makers and makers[source].op_type == "Gather":
                source = makers[source].input[0]
            if source in own:
                zero = own.get(node.input[2]) if len(node.input) > 2 else None
                yield channels(own[source], own[node.input[1]], zero, attributes(node).get("axis", 1))


def floats_of(path):
    """The float weights of products and tables, in the order of the nodes."""
    model = onnx.load(path)
    own = constants(model)
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in own and own[node.input[1]].ndim == 2:
            yield own[node.input[1]]
        elif node.op_type == "Gather" and node.input[0] in own and own[node.input[0]].ndim == 2 and own[node.input[0]].dtype == np.float32:
            yield own[node.input[0]]


def measured(source, target, checked=False):
    """Relative error and bytes over the weights that both have; `None` where the form has none."""
    floats, found = list(floats_of(source)), list(weights_of(target, checked))
    if not found:
        return None
    wanted = [value.shape for value, _ in found]
    floats = [value for value in floats if value.shape in wanted] if len(floats) != len(found) else floats
    assert len(floats) == len(found), (target, len(floats), len(found))
    total = sum(float((value.astype(np.float64) ** 2).sum()) for value in floats)
    error = sum(float(((value.astype(np.float64) - other) ** 2).sum()) for value, (other, _) in zip(floats, found))
    return (error / total) ** 0.5, sum(size for _, size in found), len(found)


def theirs(source, target, config):
    model = onnx.load(source)
    quantizer = nbits.MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


def main():
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    for name in "searched", "nearest", "zeros", "qdq":
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--block", type=int, default=32)
    arguments = parser.parse_args()
    both = ("MatMul", "Gather")
    default = lambda symmetric: nbits.DefaultWeightOnlyQuantConfig(
        block_size=arguments.block, is_symmetric=symmetric, op_types_to_quantize=both)
    print(f"{'component':<22}{'form':<46}{'weights':>8}{'error':>10}{'bytes':>12}")
    with tempfile.TemporaryDirectory() as folder:
        other = pathlib.Path(folder) / "theirs.onnx"
        for component in COMPONENTS:
            source = arguments.model / f"onnx/{component}.onnx"

            def show(form, path, checked=False):
                found = measured(source, path, checked)
                if found:
                    print(f"{component:<22}{form:<46}{found[2]:>8}{100 * found[0]:>9.3f}%{found[1]:>12,}")

            ours = lambda which, suffix: getattr(arguments, which) / f"onnx/{component}_{suffix}.onnx"
            show("int4, nearest", ours("nearest", "q4"), True)
            theirs(source, other, default(True))
            show("MatMulNBitsQuantizer, symmetric", other)
            show("int4, search", ours("searched", "q4"), True)
            show("int4, search, zero points", ours("zeros", "q4"), True)
            theirs(source, other, default(False))
            show("MatMulNBitsQuantizer, zero points", other)
            for name, config in (("hqq", nbits.HQQWeightOnlyQuantConfig), ("k_quant", nbits.KQuantWeightOnlyQuantConfig)):
                try:
                    theirs(source, other, config(op_types_to_quantize=("MatMul",)))
                    show(f"MatMulNBitsQuantizer, {name}", other)
                except Exception as problem:  # what such a quantiser needs is not everywhere
                    print(f"{component:<22}MatMulNBitsQuantizer, {name}: {type(problem).__name__}: {str(problem)[:60]}")
            show("int8", ours("searched", "quantized"))
            for kind in QuantType.QInt8, QuantType.QUInt8:
                for reduced in False, True:
                    quantize_dynamic(str(source), str(other), per_channel=True, reduce_range=reduced, weight_type=kind,
                                     op_types_to_quantize=["MatMul", "Gather"])
                    show(f"quantize_dynamic, {kind.name}{', reduced range' if reduced else ''}", other)
            if ours("qdq", "int8").exists():
                show("int8-qdq", ours("qdq", "int8"))


if __name__ == "__main__":
    main()
