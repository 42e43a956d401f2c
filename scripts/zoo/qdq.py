"""Quantises a graph of the zoo with ONNX Runtime's static quantiser: QuantizeLinear and DequantizeLinear around products.

usage: qdq.py MODEL.onnx OUT.onnx [--per-channel]      e.g. fixtures/zoo/optimum/llama-with-past/model.onnx
"""
import argparse
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static


class Prompts(CalibrationDataReader):
    """A few prompts of random tokens, without a cache."""

    def __init__(self, path):
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        random = np.random.default_rng(11)
        self.feeds = iter([self.prompt(session, random) for _ in range(4)])

    @staticmethod
    def prompt(session, random):
        length, feeds = 12, {}
        for port in session.get_inputs():
            if port.name == "input_ids":
                feeds[port.name] = random.integers(0, 640, (1, length))
            elif port.name == "inputs_embeds":
                feeds[port.name] = random.standard_normal((1, length, port.shape[-1]), np.float32)
            elif port.name == "position_ids":
                feeds[port.name] = np.broadcast_to(np.arange(length), [*([3] if len(port.shape) == 3 else []), 1, length]).copy()
            elif port.name == "attention_mask":
                feeds[port.name] = np.ones((1, length), np.int64)
            else:
                feeds[port.name] = np.zeros([size if isinstance(size, int) else int(axis == 0) for axis, size in enumerate(port.shape)], np.float32)
        return feeds

    def get_next(self):
        return next(self.feeds, None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-channel", action="store_true")
    args = parser.parse_args()
    quantize_static(
        args.model,
        args.out,
        Prompts(args.model),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gather", "Gemm"],
        per_channel=args.per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"WeightSymmetric": True},
    )


if __name__ == "__main__":
    main()
