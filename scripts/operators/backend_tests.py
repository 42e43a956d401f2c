"""Runs the node tests of the ONNX package through the interpreter and compares the results with the expected outputs.

The package generates the cases (`onnx.backend.test`, onnx 1.23). Cases with an operator that the table lacks are only
counted. Every other case must pass or be listed in `backend_tests.txt` under its reason; a listed case that passes is also an
error. Run by hand in the environment of the tests (see scripts/setup).

usage: backend_tests.py [--keep FOLDER]
"""
import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_suffix(".txt")


def as_tensor(value, info, name):
    """A value of a case as an initializer; None for sequences and optionals."""
    if isinstance(value, onnx.TensorProto):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(value)
        tensor.name = name
        return tensor
    if not info.type.HasField("tensor_type") or isinstance(value, (list, dict)) or value is None:
        return None
    return numpy_helper.from_array(np.asarray(value), name)


def write(case, folder):
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(case.model.SerializeToString())
    (folder / "tolerance").write_text(f"{case.rtol} {case.atol}\n")
    inputs, outputs = case.data_sets[0]
    graph = case.model.graph
    weights = {tensor.name for tensor in graph.initializer}
    ports = [info for info in graph.input if info.name not in weights]
    tensors = [as_tensor(value, info, f"in/{info.name}") for value, info in zip(inputs, ports, strict=True)]
    tensors += [as_tensor(value, info, f"out/{info.name}") for value, info in zip(outputs, graph.output, strict=True)]
    if any(tensor is None for tensor in tensors):
        return
    data = helper.make_graph([], "data", [], [], tensors)
    (folder / "data.onnx").write_bytes(helper.make_model(data).SerializeToString())


def table():
    """Names of cases with the reasons why they do not pass: a reason follows `##`, its cases stand below it."""
    reasons, reason = {}, ""
    for line in filter(None, TABLE.read_text().splitlines()):
        if line.startswith("##"):
            reason = line[2:].strip()
        elif not line.startswith("#"):
            reasons[line.strip()] = reason
    return reasons


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="write the cases here and leave them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary) / "cases"
        for case in load_model_tests(kind="node"):
            write(case, folder / case.name)
        command = ["cargo", "test", "--profile", "quick", "--test", "suite", "onnx_backend_tests", "--", "--ignored", "--nocapture"]
        environment = {**os.environ, "INTERLACE_BACKEND_TESTS": str(folder.resolve()), "RUST_BACKTRACE": "0"}
        run = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    outcomes = dict(line.split("\t", 1) for line in run.stdout.splitlines() if line.startswith("test_") and "\t" in line)
    reasons, bad, counts = table(), [], Counter()
    for name, outcome in sorted(outcomes.items()):
        kind = outcome if outcome in ("pass", "no row") else "listed" if name in reasons else "fail"
        counts[kind] += 1
        if kind == "fail":
            bad.append(f"{name}: {outcome}")
        if kind == "pass" and name in reasons:
            bad.append(f"{name}: passes, and is listed")
    bad += [f"{name}: is listed, and there is no such case" for name in reasons if name not in outcomes]
    print(", ".join(f"{counts[kind]} {kind}" for kind in ("pass", "listed", "fail", "no row")))
    for reason, count in Counter(reasons.values()).most_common():
        print(f"{count:5} listed: {reason}")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
