"""Asks a server with a repository of `export --to triton` the questions of a benchmark, and checks that it serves.

Prints the versions, then one JSON line per answer. The checks: HTTP and gRPC give the same ids, the streamed tokens are
those ids, the ensemble's logits give the first of them, ten clients at once get them too, and after a client is killed in
the middle of its answer the server gives them again and counts no request as open.

usage: client.py REPOSITORY BENCHMARK.tsv [--questions N] [--port N]
"""
import argparse
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import tritonclient.grpc as rpc
import tritonclient.http as http
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import encoded, rows  # noqa: E402

TOKENS = 16
# Names of exporters that leave out the processor's prefix.
SHORT = {"grid_thw": "image_grid_thw"}


def ports(module, arrays):
    inputs = []
    for name, array in arrays.items():
        port = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        port.set_data_from_numpy(array)
        inputs.append(port)
    return inputs


def whole(client, module, arrays):
    return client.infer("generate", ports(module, arrays)).as_numpy("generated_ids").tolist()


def first(client, arrays):
    """The likeliest token behind the prompt, by the ensemble."""
    given = {name: array for name, array in arrays.items() if name != "max_new_tokens"}
    logits = client.infer("prefill", ports(http, given), outputs=[http.InferRequestedOutput("logits")]).as_numpy("logits")
    return int(logits[0, -1].argmax())


def streamed(address, arrays, killed_after=None):
    """The ids of the responses, one each; with `killed_after` the process ends itself after so many."""
    answers = queue.Queue()
    found = []
    with rpc.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("generate_stream", ports(rpc, arrays), enable_empty_final_response=True)
        while True:
            result, error = answers.get(timeout=60)
            if error:
                raise error
            if result.get_response().parameters["triton_final_response"].bool_param:
                return found
            found.extend(result.as_numpy("generated_ids").tolist())
            if len(found) == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)


def killed(address, arrays):
    process = multiprocessing.get_context("spawn").Process(target=streamed, args=(address, arrays, 1))
    process.start()
    process.join()
    assert process.exitcode == -9, process.exitcode


def pending(port):
    """Requests that wait or run, over all models."""
    lines = urlopen(f"http://127.0.0.1:{port + 2}/metrics").read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("nv_inference_pending_request_count"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--port", type=int, default=18000)
    args = parser.parse_args()
    from transformers import AutoProcessor

    web, grpc = f"127.0.0.1:{args.port}", f"127.0.0.1:{args.port + 1}"
    client, remote = http.InferenceServerClient(web), rpc.InferenceServerClient(grpc)
    server = client.get_server_metadata()
    print(json.dumps({"server": server["version"], "tritonclient": version("tritonclient")}), file=sys.stderr)
    types = {port["name"]: triton_to_np_dtype(port["datatype"]) for port in client.get_model_metadata("generate")["inputs"]}
    processor = AutoProcessor.from_pretrained(next(args.repository.glob("*/processor")))
    asked = []
    for index, text, picture in rows(args.bench, args.questions):
        batch = encoded(processor, text, picture)
        arrays = {"input_ids": batch["input_ids"].astype(np.int64), "max_new_tokens": np.array([TOKENS])}
        for name, dtype in types.items():
            if name not in arrays:
                arrays[name] = batch[SHORT.get(name, name)].astype(dtype)
        ids = whole(client, http, arrays)
        assert whole(remote, rpc, arrays) == ids, f"question {index}: gRPC"
        assert streamed(grpc, arrays) == ids, f"question {index}: streamed"
        assert not ids or first(client, arrays) == ids[0], f"question {index}: prefill"
        asked.append((arrays, ids))
        print(json.dumps({"index": index, "prediction": processor.decode(ids, skip_special_tokens=True).strip()}))
    print(f"HTTP, gRPC, the stream and the ensemble agree on {len(asked)} questions", file=sys.stderr)

    def one(number):
        own = http.InferenceServerClient(web)
        return all(whole(own, http, arrays) == ids for arrays, ids in asked) and all(
            streamed(grpc, arrays) == ids for arrays, ids in asked[number::10]
        )

    with ThreadPoolExecutor(10) as pool:
        same = list(pool.map(one, range(10)))
    assert all(same), same
    print("ten clients at once get the same answers", file=sys.stderr)

    longest = max(asked, key=lambda pair: len(pair[1]))
    for _ in range(3):
        killed(grpc, longest[0])
    deadline = time.monotonic() + 30
    while pending(args.port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pending(args.port) == 0, "a request is still open"
    assert streamed(grpc, longest[0]) == longest[1] and whole(client, http, longest[0]) == longest[1]
    print("after three killed clients no request is open, and the answers are the same", file=sys.stderr)


if __name__ == "__main__":
    main()
