#!/usr/bin/env python3
"""Checks a model whose parts have 4 bits, 8 bits and floats (`interlace export --target-size` or `--max-kl`) with numpy.

Every weight is expanded by the operators' definitions. Its error against the float model must be the one in
`interlace-precision.json`. Each product must give in ONNX Runtime what numpy computes in float64 from the expanded weight: for
8 bits, with activations rounded to 8 bits in blocks, which is what `accuracy_level = 4` asks for.

    interlace export fixtures/model --precision int4 --data fixtures/data/ready.npz --max-kl 2e-5 -o /tmp/mixed
    python3 scripts/reference/mixed.py fixtures/model /tmp/mixed

Needs numpy, onnx and onnxruntime.
"""

import collections
import json
import pathlib
import sys

import numpy as np
import onnx

from precision import attributes, constants, nibbles, run


def unpacked(numbers, bits, count):
    """Numbers of the last axis, without the padding behind them."""
    return (nibbles(numbers) if bits == 4 else numbers)[..., :count].astype(np.float64)


def expanded(own, parts, rows, columns):
    """`[rows, columns]` in float64, and the length of a block."""
    bits, block = own.get("bits", 4), own["block_size"]
    count = -(-columns // block)
    numbers = unpacked(parts[0].reshape(rows, -1), bits, count * block).reshape(rows, count, block)
    zeros = unpacked(parts[2].reshape(rows, -1), bits, count)[..., None] if len(parts) > 2 else float(1 << (bits - 1))
    values = (numbers - zeros) * parts[1].reshape(rows, count, 1).astype(np.float64)
    return values.reshape(rows, -1)[:, :columns], block


def rounded(rows, block):
    """Activations with 8 bits in blocks: the largest absolute value of a block becomes 127."""
    columns = rows.shape[1]
    padded = np.pad(rows, ((0, 0), (0, -columns % block))).reshape(len(rows), -1, block)
    scale = np.abs(padded).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, where=scale > 0, out=np.zeros_like(scale))
    return (np.rint(padded * inverse).astype(np.float64) * scale).reshape(len(rows), -1)[:, :columns]


def main():
    root, mixed = map(pathlib.Path, sys.argv[1:])
    report = json.loads((mixed / "interlace-precision.json").read_text())
    random, forms, worst_error, worst_product = np.random.default_rng(0), collections.Counter(), 0.0, 0.0
    for component in report["components"]:
        floats = constants(onnx.load(root / component["source"]))
        said = {tensor["name"]: tensor for tensor in component["quantised"]}
        model = onnx.load(mixed / component["file"])
        held, seen = constants(model), set()
        for node in model.graph.node:
            if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
                continue
            own, is_table = attributes(node), node.op_type == "GatherBlockQuantized"
            parts = [held[name] for name in node.input if name in held]
            bits = own.get("bits", 4)
            name = node.input[0 if is_table else 1].removesuffix(f"_Q{bits}")
            exact = floats[name].astype(np.float64)
            rows, columns = exact.shape if is_table else (own["N"], own["K"])
            values, block = expanded(own, parts, rows, columns)
            if is_table:
                ids = np.arange(rows, dtype=np.int64)[None]
                found = run(node, held, {node.input[1]: ids}, onnx.TensorProto.FLOAT)[0]
                wanted = values
            else:
                operand = random.standard_normal((3, columns)).astype(np.float32)
                found = run(node, held, {node.input[0]: operand}, onnx.TensorProto.FLOAT)
                wanted = (rounded(operand, block) if own.get("accuracy_level") == 4 else operand.astype(np.float64)) @ values.T
            worst_product = max(worst_product, np.abs(found - wanted).max() / np.abs(wanted).max())
            turned = exact if is_table else exact.T
            error = np.sqrt(((turned - values) ** 2).sum() / (exact**2).sum())
            worst_error = max(worst_error, abs(error - said[name]["relative_error"]) / error)
            assert said[name]["form"].startswith(f"{bits} bits"), (name, said[name]["form"])
            if name not in seen:
                forms[f"{bits} bits"] += 1
            seen.add(name)
        assert seen == set(said), component["file"]
        names = {tensor["name"] for tensor in component["kept"]}
        assert names <= set(held) and not names & seen, component["file"]
        forms["floats, of 1 KiB and more"] += len(names)
    print(", ".join(f"{count} weights in {form}" for form, count in sorted(forms.items())))
    print(f"errors of the report: within {worst_error:.1e}; products: within {worst_product:.1e} of the largest number")
    assert worst_error < 1e-5 and worst_product < 1e-5 and len(forms) > 1, forms


if __name__ == "__main__":
    main()
