"""Writes a model between two of the same layers: weights A + SHARE x (B - A).

usage: blend.py A B SHARE OUT
"""
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

GRAPH = Path("onnx/model.onnx")


def main():
    first, second, share, out = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
    model, other = onnx.load(first / GRAPH), onnx.load(second / GRAPH)
    others = {tensor.name: tensor for tensor in other.graph.initializer}
    assert {tensor.name for tensor in model.graph.initializer} == set(others), "the graphs have other weights"
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            a, b = numpy_helper.to_array(tensor), numpy_helper.to_array(others[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(a + np.float32(share) * (b - a), tensor.name))
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(first, part, ignore=shutil.ignore_patterns("*.onnx*", "interlace.json", "manifest.json"))
    (part / GRAPH).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, part / GRAPH, save_as_external_data=True, location="model.onnx_data")
    part.rename(out)


main()
