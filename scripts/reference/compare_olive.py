#!/usr/bin/env python3
"""Compares the weights of `interlace export --precision` with those of Olive's quantisers, on the same graph.

Errors and bytes are measured as in precision.py.

    interlace export fixtures/model --precision int4,int8 -o /tmp/searched
    interlace export fixtures/model --precision int4 --rounding nearest -o /tmp/nearest
    interlace export fixtures/model --precision int4 --zero-points -o /tmp/zeros
    python3 scripts/reference/compare_olive.py fixtures/model --searched /tmp/searched --nearest /tmp/nearest --zeros /tmp/zeros

Needs olive-ai (0.13), numpy, onnx and onnxruntime.
"""

import argparse
import logging
import pathlib
import tempfile

from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.kquant_quantization import OnnxKQuantQuantization
from olive.passes.onnx.quantization import OnnxDynamicQuantization
from olive.passes.onnx.rtn_quantization import OnnxBlockWiseRtnQuantization

from precision import COMPONENTS, measured

OURS = [("int4, nearest", "nearest", "q4"), ("int4, search", "searched", "q4"), ("int4, search, zero points", "zeros", "q4"),
        ("int8", "searched", "quantized")]


def passes(block):
    both = {"block_size": block, "bits": 4}
    integers = {"op_types_to_quantize": ["MatMul", "Gather"], "per_channel": True}
    return [
        ("OnnxBlockWiseRtnQuantization, symmetric", OnnxBlockWiseRtnQuantization, both | {"is_symmetric": True}),
        ("OnnxBlockWiseRtnQuantization, zero points", OnnxBlockWiseRtnQuantization, both | {"is_symmetric": False}),
        ("OnnxKQuantQuantization", OnnxKQuantQuantization, both),
        ("OnnxDynamicQuantization, signed", OnnxDynamicQuantization, integers | {"precision": "int8"}),
        ("OnnxDynamicQuantization, unsigned", OnnxDynamicQuantization, integers | {"precision": "uint8"}),
    ]


def main():
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    for name in "searched", "nearest", "zeros":
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--block", type=int, default=32)
    arguments = parser.parse_args()
    print(f"{'component':<22}{'form':<46}{'weights':>8}{'error':>10}{'bytes':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for component in COMPONENTS:
            source = arguments.model / f"onnx/{component}.onnx"

            def show(form, path):
                found = measured(source, path)
                if found:
                    print(f"{component:<22}{form:<46}{found[2]:>8}{100 * found[0]:>9.3f}%{found[1]:>12,}", flush=True)

            for form, which, suffix in OURS:
                show(form, getattr(arguments, which) / f"onnx/{component}_{suffix}.onnx")
            for number, (form, kind, config) in enumerate(passes(arguments.block)):
                try:
                    own = create_pass_from_dict(kind, config, disable_search=True, accelerator_spec=DEFAULT_CPU_ACCELERATOR)
                    out = pathlib.Path(folder) / f"{component}.{number}.onnx"
                    handler = own.run(ONNXModelHandler(str(source)), str(out))
                    show(form, handler.model_path)
                except Exception as problem:  # what a pass cannot do on such a graph is a line of the table
                    print(f"{component:<22}{form:<46}{type(problem).__name__}: {str(problem)[:80]}", flush=True)


if __name__ == "__main__":
    main()
