"""Write fixtures/expected/matmul_nbits.json: small weights as ONNX Runtime's own quantiser packs them in 4 bits.

usage: matmul_nbits.py OUT.json (packages of requirements.txt beside this file)
"""
import json
import sys

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

rng = np.random.default_rng(0)
found = []
for rows, columns, block in (72, 6, 32), (20, 3, 16), (64, 5, 16), (48, 4, 64):
    for half in False, True:
        kind, dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
        weight = rng.standard_normal((rows, columns)).astype(dtype)
        weight[: min(rows, block), 0] = 0  # a block without a range
        weight[:, 1] = np.abs(weight[:, 1])
        for symmetric in True, False:
            node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
            ends = [helper.make_tensor_value_info(name, kind, [None, size]) for name, size in (("x", rows), ("y", columns))]
            graph = helper.make_graph([node], "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
            quantizer = MatMulNBitsQuantizer(model, block_size=block, is_symmetric=symmetric)
            quantizer.process()
            parts = {part.name: numpy_helper.to_array(part) for part in quantizer.model.model.graph.initializer}
            zeros = parts.get("w_zero_points")
            found.append({
                "rows": rows, "columns": columns, "block": block, "half": half,
                "weight": weight.astype(np.float64).ravel().tolist(),
                "packed": parts["w_Q4"].ravel().tolist(),
                "scales": parts["w_scales"].astype(np.float64).ravel().tolist(),
                "zero_points": None if zeros is None else zeros.ravel().tolist(),
            })
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
    file.write("\n")
