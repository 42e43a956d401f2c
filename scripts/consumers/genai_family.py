"""Compares greedy answers of ONNX Runtime GenAI with Hugging Face's, for the tiny network of a family.

EXPECTED is what `scripts/families` recorded, NAME.json beside NAME.npz: prompts, the processor's arrays and the answers of
the dense network and of the one with dropped layers. Fails unless all are equal.

usage: genai_family.py FOLDER EXPECTED.json dense|pruned
"""
import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime_genai

from genai import generate, named_tensors

NUMBERS = {"tensor(float)": np.float32, "tensor(bool)": bool, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("expected", type=Path)
    parser.add_argument("which", choices=["dense", "pruned"])
    args = parser.parse_args()
    cases = json.loads(args.expected.read_text())["cases"]
    arrays = np.load(args.expected.with_suffix(".npz"))
    config = json.loads((args.folder / "genai_config.json").read_text())
    end = config["model"]["eos_token_id"]
    ends = end if isinstance(end, list) else [end]
    model = onnxruntime_genai.Model(str(args.folder))
    vision = onnxruntime.InferenceSession(str(args.folder / config["model"]["vision"]["filename"]))
    types = {port.name: (NUMBERS[port.type], len(port.shape)) for port in vision.get_inputs()}
    equal, asked = 0, 0
    for name, case in cases.items():
        if "greedy" not in case or args.which not in case["greedy"]:
            continue
        prefix = f"{name}."
        batch = {key[len(prefix):]: arrays[key] for key in arrays.files if key.startswith(prefix)}
        if "pixel_values" not in batch:
            continue
        given = {"input_ids": batch["input_ids"]}
        for port, (dtype, rank) in types.items():
            source = {"grid_thw": "image_grid_thw"}.get(port, port)
            array = batch[source]
            while array.ndim > rank and array.shape[0] == 1:
                array = array[0]
            given[port] = array
        want = case["greedy"][args.which]
        tensors = named_tensors(given, config, {port: dtype for port, (dtype, _) in types.items()})
        if "grid_thw" in given:
            tensors["image_grid_thw"] = given["grid_thw"].astype(np.int64)
        found = generate(model, tensors, max(len(want), 1), {"first": [], "next": []})
        cut = next((place for place, token in enumerate(want) if token in ends), len(want))
        asked += 1
        equal += [token for token in found if token not in ends][:cut] == want[:cut]
    tool = version("onnxruntime-genai")
    print(f"onnxruntime-genai {tool}: {equal} of {asked} answers of {args.folder.name} equal Hugging Face's")
    sys.exit(0 if asked and equal == asked else 1)


if __name__ == "__main__":
    main()
