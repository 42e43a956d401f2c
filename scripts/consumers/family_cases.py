"""Prints the prompts with pictures that `scripts/families` recorded, one JSON line each: the processor's arrays and the answer.

usage: family_cases.py EXPECTED.json dense|pruned
"""
import json
import sys
from pathlib import Path

import numpy as np

expected, which = Path(sys.argv[1]), sys.argv[2]
arrays = np.load(expected.with_suffix(".npz"))
TYPES = {"f": "float32", "i": "int64", "b": "bool"}
for name, case in json.loads(expected.read_text())["cases"].items():
    batch = {key.removeprefix(f"{name}."): arrays[key] for key in arrays.files if key.startswith(f"{name}.")}
    if "pixel_values" not in batch or which not in case.get("greedy", {}):
        continue
    names = [key for key in batch if not key.startswith(("logits", "position_ids", "hidden"))]
    given = {}
    for key in names:
        # As the processors of transformers.js give it for Idefics3 and SmolVLM.
        array = batch[key].astype(bool) if key == "pixel_attention_mask" and batch[key].ndim == 4 else batch[key]
        given[key] = {"type": TYPES[array.dtype.kind], "dims": array.shape, "data": array.ravel().tolist()}
    print(json.dumps({"name": name, "arrays": given, "answer": case["greedy"][which]}))
