"""Answers a request token by token: one response for each token, and a last one without a token.

Triton's Python back end runs this file. It calls the models of this repository, and the caches stay inside the server.
A request that its client cancels, or whose client is gone, ends at the next token.
"""
import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.settings = json.loads(config["parameters"]["interlace"]["string_value"])
        self.presents = [present for _, present in self.settings["caches"]]

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.answer(request, sender)
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            except Exception as problem:
                response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(problem)))
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None

    def answer(self, request, sender):
        ids = tensor(request, "input_ids")
        limit = int(tensor(request, "max_new_tokens").as_numpy().reshape(-1)[0])
        length = ids.as_numpy().shape[1]
        if limit < 1:
            return
        pictures = [tensor(request, name) for name in self.settings["pictures"]]
        position, wanted = length, ["logits", *self.presents]
        if self.settings["positions_in_rows"]:
            wanted.append("next_position")
        outputs = run(self.settings["prefill"], [ids, *pictures], wanted)
        if self.settings["positions_in_rows"]:
            position = int(outputs["next_position"].as_numpy()[0])
        for number in range(limit):
            token = int(outputs["logits"].as_numpy()[0, -1].astype(np.float32).argmax())
            if token in self.settings["end_ids"] or sender.is_cancelled():
                return
            answer = pb_utils.Tensor("generated_ids", np.array([token], np.int64))
            sender.send(pb_utils.InferenceResponse(output_tensors=[answer]))
            if number + 1 < limit:
                outputs = self.step(token, length + number, position + number, outputs)

    def step(self, token, past, position, before):
        """Logits and caches after `token` at `position`, behind `past` tokens."""
        ids = np.array([[token]], np.int64)
        embedded = self.embedded(ids)
        inputs = []
        for port in self.settings["decoder_inputs"]:
            if port["kind"] in embedded:
                inputs.append(renamed(embedded[port["kind"]], port["name"]))
                continue
            values = {
                "ids": ids,
                "mask": np.ones((1, past + 1)),
                "positions": np.full((3, 1, 1) if self.settings["positions_in_rows"] else (1, 1), position),
                "cache_position": np.array([past]),
                "zero": np.zeros(port.get("shape", [1] * port["axes"])),
                "one": np.ones([1] * port["axes"]),
                "true": np.ones([1] * port["axes"]),
            }
            inputs.append(pb_utils.Tensor(port["name"], values[port["kind"]].astype(port["type"])))
        for name, present in self.settings["caches"]:
            inputs.append(renamed(before[present], name))
        return run(self.settings["decoder"], inputs, ["logits", *self.presents])

    def embedded(self, ids):
        """The outputs of the token embedding by their kind."""
        ports = self.settings["embedding_ports"]
        names = {kind: ports[kind] for kind in ("embeddings", "second_embeddings") if ports[kind]}
        outputs = run(self.settings["embedding"], [pb_utils.Tensor(ports["ids"], ids.astype(ports["type"]))], list(names.values()))
        found = {kind: outputs[name] for kind, name in names.items()}
        if ports["padding"]:
            rows = np.pad(found["embeddings"].as_numpy(), ((0, 0), (0, 0), (0, ports["padding"])))
            found["embeddings"] = pb_utils.Tensor(ports["embeddings"], rows)
        return found


def tensor(request, name):
    found = pb_utils.get_input_tensor_by_name(request, name)
    if found is None:
        raise ValueError(f"the request lacks the input `{name}`")
    return found


def renamed(tensor, name):
    """The same numbers under another name, on the device where they are."""
    return pb_utils.Tensor.from_dlpack(name, tensor.to_dlpack())


def run(model, inputs, outputs):
    request = pb_utils.InferenceRequest(model_name=model, inputs=inputs, requested_output_names=outputs)
    response = request.exec()
    if response.has_error():
        raise RuntimeError(f"{model}: {response.error().message()}")
    return {tensor.name(): tensor for tensor in response.output_tensors()}
