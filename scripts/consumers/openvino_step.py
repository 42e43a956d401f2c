"""Compares the components of a model folder in OpenVINO with ONNX Runtime, and the time of a prompt and of a step.

Runs the vision encoder, the embedding, the decoder on a prompt and the decoder on one more token with the cache; prints the
largest difference of each and fails above 1e-3. The decoder also runs with its caches as the state of a request, compared in the
same way. With a second folder the decoders' times of the processor on one thread alternate, and their ratios are printed.

usage: openvino_step.py FOLDER [DENSE_FOLDER]
"""
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
from openvino._offline_transformations import apply_make_stateful_transformation

TOKENS, STEPS, ROUNDS = 256, 16, 15
CORE = openvino.Core()
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
PAST, PRESENT = "past_key_values", "present"
NUMBERS = {"tensor(float)": np.float32, "tensor(bool)": bool, "tensor(int64)": np.int64}


def arrays(session, past, steps, cache):
    """Made-up inputs of a graph, the same for the same sizes."""
    numbers = np.random.default_rng(past + steps)
    made = {}
    for port in session.get_inputs():
        dtype = NUMBERS[port.type]
        sizes = [size if isinstance(size, int) else 1 for size in port.shape]
        if port.name == "attention_mask":
            made[port.name] = np.ones((1, past + steps), dtype)
        elif port.name == "position_ids":
            made[port.name] = np.arange(past, past + steps, dtype=dtype)[None]
        elif port.name == "input_ids":
            made[port.name] = numbers.integers(8, 400, (1, steps))
        elif port.name.startswith("past"):
            made[port.name] = cache[port.name] if cache else np.zeros((1, sizes[1], 0, sizes[3]), dtype)
        elif port.name == "inputs_embeds":
            made[port.name] = numbers.standard_normal((1, steps, sizes[2])).astype(dtype)
        elif dtype is bool:
            made[port.name] = np.ones(sizes, bool)
        else:
            made[port.name] = numbers.standard_normal(sizes).astype(dtype)
    return made


class Graph:
    def __init__(self, path):
        self.name = Path(path).name
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.compiled = CORE.compile_model(str(path), "CPU", SETTINGS)
        self.outputs = [port.name for port in self.session.get_outputs()]

    def run(self, given):
        results = self.compiled(given)
        return {name: results[name] for name in self.outputs}

    def compare(self, given, what):
        wanted = dict(zip(self.outputs, self.session.run(None, given)))
        found = self.run(given)
        apart = max(float(np.abs(wanted[name] - found[name]).max()) for name in self.outputs)
        print(f"{self.name}, {what}: largest difference {apart:.1e}")
        assert apart <= 1e-3, apart
        return wanted

    def time(self, given):
        start = time.process_time()
        self.compiled(given)
        return time.process_time() - start


class Request:
    """A decoder that keeps its caches, and a prompt and a step for it."""

    def __init__(self, path, prompt, step):
        model = CORE.read_model(path)
        model.reshape({port.any_name: [1, *port.partial_shape[1:]] for port in model.inputs})
        caches = [port.any_name for port in model.inputs if port.any_name.startswith(PAST)]
        apply_make_stateful_transformation(model, {name: name.replace(PAST, PRESENT) for name in caches})
        self.request = CORE.compile_model(model, "CPU", SETTINGS).create_infer_request()
        self.prompt, self.step = ({name: array for name, array in given.items() if name not in caches} for given in (prompt, step))

    def compare(self, wanted):
        """`wanted` are the logits of prompt and step."""
        self.request.reset_state()
        apart = max(
            float(np.abs(self.request.infer(given)["logits"] - logits).max())
            for given, logits in zip((self.prompt, self.step), wanted)
        )
        print(f"caches as state, prompt and one token: largest difference {apart:.1e}")
        assert apart <= 1e-3, apart

    def time(self):
        """Seconds of the prompt, and the median of the steps behind it."""
        self.request.reset_state()
        tokens, marks = self.prompt["attention_mask"].shape[1], [time.process_time()]
        for past in range(tokens - 1, tokens + STEPS):
            given = dict(self.prompt)
            if past >= tokens:
                mask = np.ones((1, past + 1), given["attention_mask"].dtype)
                given = self.step | {"attention_mask": mask, "position_ids": np.full_like(self.step["position_ids"], past)}
            self.request.infer(given)
            marks.append(time.process_time())
        prompt, *steps = np.diff(marks)
        return prompt, statistics.median(steps)


def decoder_of(folder):
    paths = [*Path(folder).rglob("decoder_model_merged.onnx"), *Path(folder).glob("model.onnx")]
    graph = Graph(paths[0])
    prompt = arrays(graph.session, 0, TOKENS, None)
    after = graph.compare(prompt, f"prompt of {TOKENS} tokens")
    cache = {name.replace(PRESENT, PAST): after[name] for name in graph.outputs if name.startswith(PRESENT)}
    step = arrays(graph.session, TOKENS, 1, cache)
    logits = graph.compare(step, "one token with the cache")["logits"]
    request = Request(str(paths[0]), prompt, step)
    request.compare((after["logits"], logits))
    return graph, prompt, step, request


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    print(f"openvino {version('openvino')}, onnxruntime {version('onnxruntime')}")
    for name in ("vision_encoder.onnx", "embed_tokens.onnx"):
        for path in Path(sys.argv[1]).rglob(name):
            graph = Graph(path)
            graph.compare(arrays(graph.session, 0, 9, None), "one run")
    sides = [decoder_of(folder) for folder in sys.argv[1:]]
    if len(sides) == 2:
        for place, what in ((1, "prompt"), (2, "step")):
            times = [[side[0].time(side[place]) for side in sides] for _ in range(ROUNDS)]
            own, dense = (1e3 * statistics.median(column) for column in zip(*times))
            print(f"{what}: {own:.2f} ms, dense {dense:.2f} ms, ratio {dense / own:.2f} (medians of {ROUNDS} alternating runs)")
        times = [[side[3].time() for side in sides] for _ in range(ROUNDS)]
        for place, what in ((0, "prompt"), (1, "step")):
            own, dense = (1e3 * statistics.median(pair[place] for pair in column) for column in zip(*times))
            print(f"{what}, caches as state: {own:.2f} ms, dense {dense:.2f} ms, ratio {dense / own:.2f}")


if __name__ == "__main__":
    main()
