"""The same removal with onnx-ir, written by hand for the graphs of make.py: usage: onnx_ir_drop.py IN.onnx OUT.onnx LAYER..."""
import sys

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

source, target, *layers = sys.argv[1:]
model = ir.load(source)
graph = model.graph
values = {value.name: value for node in graph for value in node.outputs}
for layer in sorted(map(int, layers), reverse=True):
    ir.convenience.replace_all_uses_with(values[f"h.{layer + 1}"], values[f"h.{layer}"])
    ports = f"past_key_values.{layer}.", f"present.{layer}."
    for group in graph.inputs, graph.outputs:
        for value in [value for value in group if value.name.startswith(ports)]:
            group.remove(value)
RemoveUnusedNodesPass()(model)
kept = [value.name.split(".")[1] for value in graph.inputs if value.name.endswith(".key")]
for place, layer in enumerate(kept):
    for word in "key", "value":
        for group, prefix in (graph.inputs, "past_key_values"), (graph.outputs, "present"):
            for value in group:
                if value.name == f"{prefix}.{layer}.{word}":
                    value.name = f"{prefix}.{place}.{word}"
ir.save(model, target, external_data=target.rsplit("/", 1)[-1] + "_data")
