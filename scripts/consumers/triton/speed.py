"""Times the decoders of two servers, a pruned model's and the dense model's, in alternating requests: a prompt, and one token.

The times are the server's own, of the computation in the back end (`compute_infer` of its statistics), so that the way of the
arrays to the server and back is not in them. Start both servers with `--threads 1`. The ratio is the median of the ratios of
neighbouring requests.

usage: speed.py PORT DENSE_PORT
"""
import statistics
import sys
import time

import numpy as np
import tritonclient.grpc as rpc
from tritonclient.utils import triton_to_np_dtype

from client import ports

DECODER = "decoder_model_merged"
TOKENS, ROUNDS = 256, 101


class Server:
    def __init__(self, port):
        self.client = rpc.InferenceServerClient(f"127.0.0.1:{port + 1}")
        self.inputs = self.client.get_model_metadata(DECODER).inputs

    def arrays(self, past, steps):
        """Made-up inputs, the same for the same sizes."""
        numbers = np.random.default_rng(past + steps)
        made = {}
        for port in self.inputs:
            dtype, sizes = triton_to_np_dtype(port.datatype), list(port.shape)
            if port.name == "attention_mask":
                made[port.name] = np.ones((1, past + steps), dtype)
            elif port.name == "position_ids":
                made[port.name] = np.arange(past, past + steps, dtype=dtype)[None]
            elif port.name.startswith("past"):
                made[port.name] = numbers.standard_normal((1, sizes[1], past, sizes[3])).astype(dtype)
            else:
                made[port.name] = numbers.standard_normal((1, steps, sizes[2])).astype(dtype)
        return ports(rpc, made)

    def spent(self):
        """Finished requests, and nanoseconds in the back end so far."""
        found = self.client.get_inference_statistics(DECODER, as_json=True)
        own = found["model_stats"][0]["inference_stats"]
        return int(own["success"].get("count", 0)), int(own["compute_infer"].get("ns", 0))

    def time(self, inputs):
        count, before = self.spent()
        self.client.infer(DECODER, inputs, outputs=[rpc.InferRequestedOutput("logits")])
        # The server counts a request a little after it answered.
        while (now := self.spent())[0] == count:
            time.sleep(0.001)
        return (now[1] - before) / 1e6


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    servers = [Server(int(port)) for port in sys.argv[1:]]
    for what, past, steps in (("prompt", 0, TOKENS), ("token", TOKENS, 1)):
        given = [server.arrays(past, steps) for server in servers]
        for server, inputs in zip(servers, given):
            server.time(inputs)
        times = [[server.time(inputs) for server, inputs in zip(servers, given)] for _ in range(ROUNDS)]
        own, dense = (statistics.median(column) for column in zip(*times))
        ratio = statistics.median(dense / own for own, dense in times)
        print(f"{what}: {own:.2f} ms, dense {dense:.2f} ms, ratio {ratio:.2f} (medians of {ROUNDS} alternating requests)")


if __name__ == "__main__":
    main()
