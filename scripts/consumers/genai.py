"""Answers with ONNX Runtime GenAI from a folder of `export --to genai`. Prints the version, then one JSON line per answer.

usage: genai.py FOLDER --bench BENCHMARK.tsv [--questions N] [--own-processor]
       genai.py FOLDER --ids 1,2,3 [--tokens N]

The processor of transformers prepares the pictures, or with --own-processor GenAI's.
With --time a last line has the median milliseconds of the first token and of each further one.
"""
import argparse
import io
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

IMAGE = "image_token_id"
clock = time.perf_counter


def generate(model, given, tokens, times, least=0):
    """Greedy answer to ids, or to named tensors of a prompt with pictures."""
    parameters = genai.GeneratorParams(model)
    ids = given if isinstance(given, np.ndarray) else given["input_ids"].as_numpy()
    parameters.set_search_options(do_sample=False, max_length=ids.size + tokens, min_length=ids.size + least)
    generator = genai.Generator(model, parameters)
    start = clock()
    if isinstance(given, np.ndarray):
        generator.append_tokens(given.astype(np.int32))
    else:
        generator.set_inputs(given)
    answer, marks = [], []
    while not generator.is_done() and len(answer) < tokens:
        generator.generate_next_token()
        marks.append(clock())
        answer.append(int(generator.get_next_tokens()[0]))
    times["first"].extend(1e3 * (mark - start) for mark in marks[:1])
    times["next"].extend(1e3 * (b - a) for a, b in zip(marks, marks[1:]))
    return answer


def named_tensors(batch, config, types):
    """The arrays of a prompt as GenAI's named tensors in the vision encoder's types, with the number of image tokens."""
    tensors = genai.NamedTensors()
    ids = batch["input_ids"].astype(np.int32)
    tensors["input_ids"] = ids
    count = int((ids == config["model"][IMAGE]).sum())
    tensors["num_image_tokens"] = np.array([count], np.int64)
    for name, array in batch.items():
        if name in types:
            tensors[name] = array.astype(types[name])
    return tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bench", type=Path)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--own-processor", action="store_true")
    parser.add_argument("--ids")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    print(json.dumps({"onnxruntime-genai": version("onnxruntime-genai")}), file=sys.stderr)
    model = genai.Model(str(args.folder))
    config = json.loads((args.folder / "genai_config.json").read_text())
    end = config["model"]["eos_token_id"]
    ends = end if isinstance(end, list) else [end]
    times = {"first": [], "next": []}
    if args.ids:
        ids = np.array([int(number) for number in args.ids.split(",")])
        print(json.dumps({"ids": [token for token in generate(model, ids, args.tokens, times) if token not in ends]}))
    else:
        import onnxruntime
        from bench import encoded, rows
        from transformers import AutoProcessor

        vision = onnxruntime.InferenceSession(str(args.folder / config["model"]["vision"]["filename"]))
        numbers = {"tensor(float)": np.float32, "tensor(bool)": bool, "tensor(int64)": np.int64}
        types = {port.name: numbers[port.type] for port in vision.get_inputs()}
        processor = AutoProcessor.from_pretrained(args.folder)
        own = model.create_multimodal_processor() if args.own_processor else None
        for index, text, picture in rows(args.bench, args.questions):
            if own:
                talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
                prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
                data = io.BytesIO()
                picture.save(data, "PNG")
                given = own(prompt, images=genai.Images.open_bytes(data.getvalue()))
            else:
                given = named_tensors(encoded(processor, text, picture), config, types)
            answer = [token for token in generate(model, given, args.tokens, times) if token not in ends]
            text = processor.decode(answer, skip_special_tokens=True).strip()
            print(json.dumps({"index": index, "prediction": text}))
    if args.time:
        print(json.dumps({name: round(statistics.median(values), 2) for name, values in times.items() if values}))


if __name__ == "__main__":
    main()
