"""Compares the LibTorch interpreter with ONNX Runtime on every graph: decoders, prefills, vision encoders, embeddings.

Inputs are synthetic, according to the graph's declarations: ids, masks of ones, ascending positions, noise for features. Graphs
with a cache run a prefill and one step with the resulting cache. Prints one row per graph: `ok` with the largest difference over
all outputs, `BAD`, `few bits` for quantised graphs, or the reason why ONNX Runtime does not run the graph.

usage: interpret.py --interlace BINARY PATH...      a PATH is a graph or a folder that is searched for graphs
"""
import argparse
import re
import tempfile
from pathlib import Path

import numpy as np
import onnx

import check

TOKENS = 7
HEAD_SIZE = 16
IMAGE_TOKEN = 600
# Values that noise cannot stand for, by the end of an input's name.
GRID = [[1, 8, 8]]
QUANTISED = re.compile("MatMulNBits|Quantize|MatMulInteger|QMoE|ConvInteger|MatMulBnb4|BlockQuantized")


def quantised(path):
    model = onnx.load(path, load_external_data=False)
    return any(QUANTISED.search(node.op_type) for node in model.graph.node)


def shape_of(port, past, fresh):
    """Free sizes: 1 for a batch, else the tokens of this step, those so far where the axis counts both."""
    batch = 1 if "position" in port.name and len(port.shape) == 3 else 0
    # Features in rows have no batch.
    rows = len(port.shape) == 2 and "float" in port.type
    sizes = []
    for axis, size in enumerate(port.shape):
        if isinstance(size, int) and size > 0:
            sizes.append(size)
        elif "batch" in str(size) or axis == batch and len(port.shape) > 1 and not rows:
            sizes.append(1)
        elif axis < batch:
            sizes.append(3)
        else:
            both = "mask" in port.name or "total" in str(size)
            sizes.append(past + fresh if both else fresh)
    return sizes


def empty(port):
    """A cache without entries; a head size that the graph leaves open is that of the networks here."""
    sizes = check.fixed(port)
    free = {0: 1, 2: 0, 3: HEAD_SIZE} if len(sizes) == 4 else {0: 1}
    return np.zeros([free.get(axis, 0) if size is None else size for axis, size in enumerate(sizes)], check.TYPES[port.type])


def made_up(port, past, fresh, random):
    name, dtype = port.name, check.TYPES[port.type]
    shape = shape_of(port, past, fresh)
    if name.endswith("grid_thw"):
        return np.array(GRID, dtype)
    if name == "use_cache_branch":
        return np.array([past > 0])
    if "position" in name or "indices" in name:
        return np.broadcast_to(np.arange(past, past + fresh), shape).astype(dtype)
    if "seqlen" in name:
        return np.full(shape, past + fresh, dtype)
    if "token_type_ids" in name:
        return np.zeros(shape, dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    if np.issubdtype(dtype, np.floating):
        return random.standard_normal(shape).astype(dtype)
    return random.integers(3, 500, shape).astype(dtype)


def steps(session):
    """Inputs and outputs of each run of the graph."""
    ports = session.get_inputs()
    names = [port.name for port in session.get_outputs()]
    random = np.random.default_rng(0)
    runs, cache, past = [], {}, 0
    for fresh in (TOKENS, 1):
        given = {}
        for port in ports:
            if check.state(port.name) is None:
                given[port.name] = made_up(port, past, fresh, random)
            elif check.state(port.name) in cache:
                given[port.name] = cache[check.state(port.name)]
            else:
                given[port.name] = empty(port)
        if "image_features" in given and "input_ids" in given:
            # One image token for each row of features.
            given["input_ids"][:, :] = IMAGE_TOKEN
        found = dict(zip(names, session.run(None, given)))
        runs.append((given, found))
        cache = {check.state(name): value for name, value in found.items() if check.state(name)}
        past += fresh
        if not any(check.state(port.name) for port in ports):
            break
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interlace", required=True)
    parser.add_argument("--few-bits", action="store_true", help="quantised graphs too")
    parser.add_argument("paths", type=Path, nargs="+")
    args = parser.parse_args()
    failed = 0
    for top in args.paths:
        for path in sorted(top.rglob("*.onnx")) if top.is_dir() else [top]:
            name = path.relative_to(top) if top.is_dir() else path.name
            try:
                if quantised(path) and not args.few_bits:
                    print("few bits", name, sep="\t", flush=True)
                    continue
                runs = steps(check.session_of(path))
            except Exception as error:
                print("no run", name, " ".join(str(error).split())[:300], sep="\t", flush=True)
                continue
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    worst = check.interpreted(args, path, runs, scratch)
            except Exception as error:
                worst = [np.inf]
                print("BAD", name, " ".join(str(error).split())[:400], sep="\t", flush=True)
            if np.isfinite(worst).all():
                good = max(worst) <= 1e-4
                print("ok" if good else "BAD", name, "/".join(f"{value:.0e}" for value in worst), sep="\t", flush=True)
                failed += not good
            else:
                failed += 1
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
