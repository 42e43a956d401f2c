"""Times two folders of `export --to genai` in ONNX Runtime GenAI in alternating runs: first token of a prompt, next tokens.

The times are of the processor, on one thread, so that other programs on the machine do not count.

usage: genai_speed.py FOLDER DENSE_FOLDER
"""
import statistics
import sys
import time
from importlib.metadata import version

import numpy as np
import onnxruntime_genai

import genai

PROMPT, TOKENS, ROUNDS = 256, 64, 9


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    genai.clock = time.process_time
    models = []
    for folder in sys.argv[1:]:
        config = onnxruntime_genai.Config(folder)
        config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
        models.append(onnxruntime_genai.Model(config))
    print(f"onnxruntime-genai {version('onnxruntime-genai')}, one thread, prompt of {PROMPT} tokens, {TOKENS} generated")
    times = {"first": [], "next": []}
    for _ in range(ROUNDS):
        row = []
        for model in models:
            tensors = onnxruntime_genai.NamedTensors()
            tensors["input_ids"] = (np.arange(PROMPT, dtype=np.int32) * 37 % 400 + 8)[None]
            own = {"first": [], "next": []}
            genai.generate(model, tensors, TOKENS, own, TOKENS)
            row.append((own["first"][0], statistics.median(own["next"])))
        for name, place in (("first", 0), ("next", 1)):
            times[name].append([side[place] for side in row])
    for name, rounds in times.items():
        own, dense = (statistics.median(column) for column in zip(*rounds))
        print(f"{name} token: {own:.2f} ms, dense {dense:.2f} ms, ratio {dense / own:.2f} (medians of {ROUNDS} alternating runs)")


if __name__ == "__main__":
    main()
