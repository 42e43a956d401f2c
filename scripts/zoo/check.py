"""Prunes graphs with interlace and compares them with PyTorch; one table row for each graph.

The expected values are those of the network in the graph's name (`gemma3.dyn18__slim.onnx` -> `gemma3`). With `--twins DIR`,
for quantised graphs, they are those of the same exporter's graph of the smaller network: `DIR/DROP/GRAPH` for each set of
dropped layers in DIR, with equal outputs and equal bytes of the weights. In any case the kept weights must equal the dense
graph's byte for byte.
With `--interpret`, `interlace verify --inputs` also runs the dense graph and the first pruned one in the LibTorch interpreter
on the same inputs and compares every output with ONNX Runtime's.

usage: check.py --interlace BINARY --expected DIR [--twins DIR] [--tolerance T] [--interpret] GRAPH.onnx...
"""
import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
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


def fixed(port):
    """The sizes that a graph fixes, None for the free ones."""
    return [int(size) if str(size).isdigit() else None for size in port.shape]


def empty(port, like):
    """A cache without entries: every free size but the batch is zero, or as in a cache that is known."""
    sizes = fixed(port)
    if like is not None and like.ndim == len(sizes) == 4:
        sizes = [size if axis == 2 else size or like.shape[axis] for axis, size in enumerate(sizes)]
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
        elif name == "write_indices":
            value = data[f"{prefix}.position_ids"].reshape(-1)[:1]
        elif name == "nonpad_kv_seqlen":
            value = data[f"{prefix}.position_ids"].reshape(-1)[-1:] + 1
        elif name.endswith("token_type_ids"):
            # Which tokens are of a picture: none here.
            value = np.zeros([size or own for size, own in zip(fixed(port), data[f"{prefix}.input_ids"].shape)])
        elif state(name):
            value = past.get(state(name))
            like = data["exp.present.0.key"] if "exp.present.0.key" in data else None
            value = empty(port, like) if value is None else value
        else:
            raise KeyError(f"no value for input {name}")
        if name == "position_ids" and len(port.shape) == 2 and value.ndim == 3:
            value = value[0]
        given[name] = value.astype(dtype)
    return given


def session_of(path):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def steps(session, data):
    """Inputs and outputs of prefill, and of one step with the cache that it left where the graph has a cache."""
    names = [port.name for port in session.get_outputs()]
    given = feeds(session, data, "in", {})
    first = dict(zip(names, session.run(None, given)))
    found = [(given, first)]
    if any(state(port.name) for port in session.get_inputs()):
        states = {state(name): value for name, value in first.items() if state(name)}
        given = feeds(session, data, "in2", states)
        found.append((given, dict(zip(names, session.run(None, given)))))
    return found


def distance(found, data):
    """The largest difference from PyTorch, in prefill and in the cached step."""
    wanted = sum(key.startswith("exp.present.") for key in data.files)
    states = [name for name in found[0][1] if state(name)]
    if len(found) > 1 and wanted and len(states) != wanted:
        raise ValueError(f"{len(states)} states, expected {wanted}")
    worst = []
    for prefix, (_, outputs) in zip(("exp", "exp2"), found):
        compared = [name for name in outputs if f"{prefix}.{name}" in data and not state(name)]
        worst.append(max(far(outputs[name], data[f"{prefix}.{name}"]) for name in compared))
    return worst


def far(found, want):
    return np.abs(found.astype(np.float64) - want.astype(np.float64)).max() if found.shape == want.shape else np.inf


def weights_of(path):
    """How often each weight of some size is there, by its content."""
    tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    return Counter(hashlib.sha256(t.tobytes()).hexdigest() for t in tensors if t.nbytes >= 64)


def twin_distance(graph, twin, found, data):
    """As `distance`, from what the exporter made of the smaller network."""
    own = weights_of(graph)
    missing = own - weights_of(twin)
    if missing:
        raise ValueError(f"{sum(missing.values())} of {sum(own.values())} weights are not the twin's")
    wanted = steps(session_of(twin), data)
    logits = lambda outputs: [value for name, value in sorted(outputs.items()) if not state(name)]
    return [
        max(far(a, b) for a, b in zip(logits(mine), logits(theirs), strict=True))
        for (_, mine), (_, theirs) in zip(found, wanted, strict=True)
    ]


def interpreted(args, path, found, scratch):
    """The largest differences of the interpreter from ONNX Runtime, over all outputs."""
    worst = []
    for given, _ in found:
        inputs = Path(scratch) / "inputs.npz"
        np.savez(inputs, **{name: np.array(value, order="C") for name, value in given.items()})
        command = [args.interlace, "verify", str(path), "--inputs", str(inputs), "--json", "-q"]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode not in (0, 1):
            raise ValueError(" ".join(ran.stderr.split())[:400])
        check = json.loads(ran.stdout)["checks"][-1]
        if "difference" not in check:
            raise ValueError(check["detail"][:400])
        worst.append(check["difference"])
    return worst


def pruned(args, path, drop, scratch):
    out = Path(scratch) / f"{path.stem}.{drop}"
    command = [args.interlace, "prune", str(path), "--drop", drop[5:].replace("_", ","), "-o", str(out), "-q"]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(" ".join(ran.stderr.split())[:400])
    return next(out.glob("**/*.onnx"))


def row(args, path, scratch):
    network = network_of(path)
    cells, good = [], True
    # Half precision: 11 bits of mantissa over values of order 1, eight layers deep.
    tolerance = args.tolerance or (5e-3 if re.search("fp16|f16", f"{path.parent.name} {path.name}") else 1e-4)
    show = lambda values: "/".join(f"{value:.0e}" for value in values)
    for drop in DROPS:
        expected = args.expected / f"{network}.{drop if args.twins is None else 'nodrop'}.npz"
        twin = args.twins and args.twins / drop / (path.name if path.name not in PLAIN else path.parent.name)
        twin = twin / path.name if twin and twin.is_dir() else twin
        if not expected.exists() or twin and drop != "nodrop" and not twin.exists():
            continue
        try:
            data = np.load(expected)
            graph = path if drop == "nodrop" else pruned(args, path, drop, scratch)
            changed = weights_of(graph) - weights_of(path)
            if changed:
                raise ValueError(f"{sum(changed.values())} weights are not the dense graph's")
            found = steps(session_of(graph), data)
            if not twin:
                values = distance(found, data)
            elif drop != "nodrop":
                values = twin_distance(graph, twin, found, data)
            else:
                values = []
            cell = show(values)
            if values and not max(values) <= (0 if twin else tolerance):
                cell, good = f"{cell} OFF", False
            if args.interpret and drop in DROPS[:2]:
                values = interpreted(args, graph, found, scratch)
                cell += f" interpreter {show(values)}"
                if not max(values) <= 1e-4:
                    cell, good = f"{cell} OFF", False
        except Exception as error:
            cell, good = f"{drop}: {type(error).__name__}: {str(error)[:400]}", False
        cells.append(cell)
    return good and bool(cells), cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interlace", required=True)
    parser.add_argument("--expected", type=Path, required=True)
    parser.add_argument("--twins", type=Path)
    parser.add_argument("--tolerance", type=float, help="1e-4, and 5e-3 in half precision")
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("graphs", type=Path, nargs="+")
    args = parser.parse_args()
    failed = 0
    for path in args.graphs:
        with tempfile.TemporaryDirectory() as scratch:
            good, cells = row(args, path, scratch)
        failed += not good
        name = path.parent.name if path.name in PLAIN else path.name
        print("ok  " if good else "BAD ", name, *cells, sep="\t", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
