"""The ONNX Runtime back end for servers that lack Triton's own, such as the one in the wheel nvidia-pytriton.

Put it as `backends/onnxruntime/model.py`: an unmodified repository of `export --to triton` then loads.
"""
import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = str(folder / config["default_model_filename"])
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.ports = {port.name: port for port in self.session.get_inputs()}
        self.empty = [port["name"] for port in config["input"] if port.get("reshape") and not port["reshape"]["shape"]]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            arrays = {name: self.array(request, name) for name in self.ports}
            wanted = list(request.requested_output_names())
            outputs = self.session.run(wanted, arrays)
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in zip(wanted, outputs)]
            return pb_utils.InferenceResponse(output_tensors=tensors)
        except Exception as problem:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(problem)))

    def array(self, request, name):
        return pb_utils.get_input_tensor_by_name(request, name).as_numpy()
