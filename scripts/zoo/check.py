"""Prunes graphs with interlace and compares them with PyTorch; one table row for each graph.

The expected values are those of the network a graph is named after (`gemma3.dyn18__slim.onnx` -> `gemma3`).

usage: check.py --interlace BINARY --expected DIR [--tolerance T] GRAPH.onnx...
"""
import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

DROPS = ["nodrop", "drop_2_5", "drop_0_7", "drop_3", "drop_0_1_2_3"]
TYPES = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}
STATE = re.compile(r"(past_key_values|present|key_cache|value_cache)\.(?:layers\.)?(\d+)(?:\.([a-z_]+?)s?)?$")
PLAIN = ("model.onnx", "decode.onnx", "decoder_model_merged.onnx")


def network_of(path):
    stem = path.stem
    if path.name in PLAIN:
        stem = path.parent.parent.name if path.parent.name in ("decoder", "vision_encoder") else path.parent.name
        stem += "_vision" if path.parent.name == "vision_encoder" else ""
    return re.split(r"[.-]", stem)[0]


def state(name):
    """Layer and part of a cached tensor's name, the same for what comes in and what goes out."""
    found = STATE.search(name)
    return found and (int(found[2]), found[3] or found[1].removeprefix("updated_"))


def empty(port):
    """A cache without entries: every free size but the batch is zero."""
    sizes = [int(size) if str(size).isdigit() else None for size in port.shape]
    return np.zeros([1 if axis == 0 else size or 0 for axis, size in enumerate(sizes)])


def feeds(session, data, prefix, past):
    given = {}
    for port in session.get_inputs():
        name, dtype = port.name, TYPES[port.type]
        if name == "use_cache_branch":
            value = np.array([prefix == "in2"])
        elif f"{prefix}.{name}" in data:
            value = data[f"{prefix}.{name}"]
        elif name == "cache_position":
            value = data[f"{prefix}.position_ids"].reshape(-1)
        elif name.endswith("token_type_ids"):
            # Which tokens are of a picture: none here.
            value = np.zeros_like(data[f"{prefix}.input_ids"])
        elif state(name):
            value = past.get(state(name))
            value = empty(port) if value is None else value
        else:
            raise KeyError(f"no value for input {name}")
        if name == "position_ids" and len(port.shape) == 2 and value.ndim == 3:
            value = value[0]
        given[name] = value.astype(dtype)
    return given


def distance(path, data):
    """The largest difference in prefill and in one cached step."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    first = dict(zip(names, session.run(None, feeds(session, data, "in", {}))))
    compared = [name for name in names if f"exp.{name}" in data and not state(name)]
    worst = [max(np.abs(first[name].astype(np.float32) - data[f"exp.{name}"]).max() for name in compared)]
    states = {state(name): value for name, value in first.items() if state(name)}
    wanted = sum(key.startswith("exp.present.") for key in data.files)
    if any(state(port.name) for port in session.get_inputs()):
        if wanted and len(states) != wanted:
            raise ValueError(f"{len(states)} states, expected {wanted}")
        second = session.run(names[:1], feeds(session, data, "in2", states))[0]
        worst.append(np.abs(second.astype(np.float32) - data["exp2.logits"]).max())
    return worst


def row(args, path, scratch):
    network = network_of(path)
    cells = []
    for drop in DROPS:
        expected = args.expected / f"{network}.{drop}.npz"
        if not expected.exists():
            continue
        data = np.load(expected)
        graph = path
        if drop != "nodrop":
            out = Path(scratch) / f"{path.stem}.{drop}"
            command = [args.interlace, "prune", str(path), "--drop", drop[5:].replace("_", ","), "-o", str(out), "-q"]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                return False, [*cells, f"{drop}: {' '.join(ran.stderr.split())[:400]}"]
            graph = next(out.glob("**/*.onnx"))
        try:
            found = distance(graph, data)
        except Exception as error:
            return False, [*cells, f"{drop}: {type(error).__name__}: {str(error)[:300]}"]
        cells.append("/".join(f"{value:.0e}" for value in found))
        if max(found) > args.tolerance:
            return False, [*cells, f"{drop}: off"]
    return bool(cells), cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interlace", required=True)
    parser.add_argument("--expected", type=Path, required=True)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("graphs", type=Path, nargs="+")
    args = parser.parse_args()
    failed = 0
    for path in args.graphs:
        with tempfile.TemporaryDirectory() as scratch:
            good, cells = row(args, path, scratch)
        failed += not good
        print("ok  " if good else "BAD ", path.name, *cells, sep="\t", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
