"""Write a synthetic decoder of the Llama shape in fp16 with its weights in one external file, for timing `prune`.

The graph is a real one (it loads and runs); the weights are pseudo-random. Weights are written as they are made, so
memory stays small. With --sparse the file of weights is a hole of the right size: zeros that take no disk.
usage: make.py OUT.onnx [--layers 18] [--hidden 2048] [--width 11264] [--vocabulary 32000] [--heads 16] [--kv-heads 16]
  [--head-size 128] [--sparse]
"""
import argparse
import os
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper


class Weights:
    """Initializers whose content goes to the external file at once."""

    def __init__(self, path, sparse):
        self.path, self.file, self.tensors, self.sparse = path, open(path, "wb"), [], sparse
        self.noise = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float16).tobytes()

    def add(self, name, *shape):
        offset = -self.file.tell() % 4096
        self.file.write(bytes(offset))
        offset, length = self.file.tell(), int(np.prod(shape)) * 2
        if self.sparse:
            self.file.truncate(offset + length)
            self.file.seek(offset + length)
        else:
            left = length
            while left:
                left -= self.file.write(self.noise[:left])
        tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT16, data_location=TensorProto.EXTERNAL)
        for key, value in ("location", self.path.name), ("offset", str(offset)), ("length", str(length)):
            tensor.external_data.add(key=key, value=value)
        self.tensors.append(tensor)
        return name


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=11264)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="heads of keys and values [default: as --heads]")
    parser.add_argument("--head-size", type=int, help="width of a head [default: hidden / heads]")
    parser.add_argument("--sparse", action="store_true")
    args = parser.parse_args()
    hidden, heads, width = args.hidden, args.heads, args.width
    kv_heads, size = args.kv_heads or heads, args.head_size or hidden // heads
    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights = Weights(args.out.with_name(args.out.name + "_data"), args.sparse)
    nodes, inputs, outputs = [], [], []
    small = {"two": np.float16(2), "eps": np.float16(1e-4), "scale": np.float16(size ** -0.5),
             "split.q": np.array([0, 0, heads, size]), "split.kv": np.array([0, 0, kv_heads, size]),
             "join": np.array([0, 0, heads * size])}
    if kv_heads < heads:
        small |= {"group": np.array([2]), "groups": np.array([1, 1, heads // kv_heads, 1, 1]),
                  "all_heads": np.array([0, heads, -1, size])}
    constants = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in small.items()]
    kind = TensorProto.FLOAT16

    def op(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def norm(x, name):
        square = op("Pow", [x, "two"], f"{name}.square")
        mean = op("ReduceMean", [square], f"{name}.mean", axes=[-1])
        root = op("Sqrt", [op("Add", [mean, "eps"], f"{name}.shifted")], f"{name}.root")
        unit = op("Div", [x, root], f"{name}.unit")
        return op("Mul", [unit, weights.add(f"{name}.weight", hidden)], f"{name}.out")

    def linear(x, name, rows, columns):
        return op("MatMul", [x, weights.add(f"{name}.weight", rows, columns)], f"{name}.out")

    stream = op("Gather", [weights.add("embed", args.vocabulary, hidden), "input_ids"], "h.0")
    inputs.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]))
    for layer in range(args.layers):
        at = f"layers.{layer}"
        x = norm(stream, f"{at}.input_norm")
        parts = {}
        for part in "qkv":
            own, split = (heads, "split.q") if part == "q" else (kv_heads, "split.kv")
            flat = op("Reshape", [linear(x, f"{at}.{part}", hidden, own * size), split], f"{at}.{part}.heads")
            parts[part] = op("Transpose", [flat], f"{at}.{part}.moved", perm=[0, 2, 1, 3])
        for part, word in ("k", "key"), ("v", "value"):
            past, present = f"past_key_values.{layer}.{word}", f"present.{layer}.{word}"
            inputs.append(helper.make_tensor_value_info(past, kind, ["batch", kv_heads, "past", size]))
            outputs.append(helper.make_tensor_value_info(present, kind, ["batch", kv_heads, "total", size]))
            parts[part] = op("Concat", [past, parts[part]], present, axis=2)
            if kv_heads < heads:
                apart = op("Unsqueeze", [parts[part], "group"], f"{at}.{part}.apart")
                spread = op("Expand", [apart, "groups"], f"{at}.{part}.spread")
                parts[part] = op("Reshape", [spread, "all_heads"], f"{at}.{part}.repeated")
        keys = op("Transpose", [parts["k"]], f"{at}.keys", perm=[0, 1, 3, 2])
        scores = op("Mul", [op("MatMul", [parts["q"], keys], f"{at}.raw"), "scale"], f"{at}.scores")
        mixed = op("MatMul", [op("Softmax", [scores], f"{at}.weights", axis=-1), parts["v"]], f"{at}.mixed")
        joined = op("Reshape", [op("Transpose", [mixed], f"{at}.back", perm=[0, 2, 1, 3]), "join"], f"{at}.joined")
        stream = op("Add", [stream, linear(joined, f"{at}.o", heads * size, hidden)], f"{at}.attended")
        x = norm(stream, f"{at}.post_norm")
        gate = linear(x, f"{at}.gate", hidden, width)
        active = op("Mul", [gate, op("Sigmoid", [gate], f"{at}.sigmoid")], f"{at}.active")
        product = op("Mul", [active, linear(x, f"{at}.up", hidden, width)], f"{at}.product")
        stream = op("Add", [stream, linear(product, f"{at}.down", width, hidden)], f"h.{layer + 1}")
    x = norm(stream, "final_norm")
    op("MatMul", [x, weights.add("head.weight", hidden, args.vocabulary)], "logits")
    outputs.insert(0, helper.make_tensor_value_info("logits", kind, ["batch", "sequence", args.vocabulary]))
    weights.file.close()
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, constants + weights.tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    args.out.write_bytes(model.SerializeToString())
    print(f"{args.out}: {args.layers} layers, {os.path.getsize(weights.path) / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
