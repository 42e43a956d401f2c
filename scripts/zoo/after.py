"""Transforms graphs: slimmed, optimised, quantised, in half precision, with weights moved to other files.

usage: after.py OUT_DIR GRAPH.onnx TREATMENT...      writes OUT_DIR/GRAPH__TREATMENT.onnx (or a folder of that name)
"""
import argparse
import traceback
from pathlib import Path

import onnx
import onnxruntime as ort


def saved_by_ort(level):
    """The graph as ONNX Runtime saves it after its optimisations."""

    def run(source, target):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(target)
        options.intra_op_num_threads = 1
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return run


def transformer_optimizer(source, target):
    from onnxruntime.transformers import optimizer

    # The general fusions of skip norms and rotary embedding; head counts are left to the graph.
    fused = optimizer.optimize_model(str(source), model_type="gpt2", num_heads=0, hidden_size=0, opt_level=0)
    fused.save_model_to_file(str(target))


def slim(source, target):
    import onnxslim

    onnx.save(onnxslim.slim(str(source)), target)


def int8(source, target):
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(source), str(target))


def int4(source, target):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


def fp16(source, target):
    from onnxconverter_common import float16

    model = onnx.load(source)
    to_f32 = lambda node: [a for a in node.attribute if a.name == "to" and a.i == onnx.TensorProto.FLOAT]
    casts = {node.output[0] for node in model.graph.node if node.op_type == "Cast" and to_f32(node)}
    model = float16.convert_float_to_float16(model, keep_io_types=False)
    # The pass leaves a graph's own casts to f32 as they are and takes their results for f16.
    for node in model.graph.node:
        if node.op_type == "Cast" and node.output[0] in casts:
            to_f32(node)[0].i = onnx.TensorProto.FLOAT16
    onnx.save(model, target)


def one_file(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        onnx.load(source), target, save_as_external_data=True, all_tensors_to_one_file=True,
        location="model.onnx_data", size_threshold=1024,
    )


def many_files(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        onnx.load(source), target, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=1024
    )


def mixed(source, target):
    """Large weights in one file, middling ones inline."""
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        onnx.load(source), target, save_as_external_data=True, all_tensors_to_one_file=True,
        location="weights.bin", size_threshold=20000,
    )


def noname(source, target):
    """Every node nameless and every value but inputs and outputs renamed to a number."""
    model = onnx.load(source)
    graph = model.graph
    kept = {v.name for v in (*graph.input, *graph.output)}
    numbers = {}
    rename = lambda name: name if not name or name in kept else numbers.setdefault(name, str(len(numbers)))
    for node in graph.node:
        node.name = ""
        del node.metadata_props[:]
        node.doc_string = ""
        node.input[:] = [rename(name) for name in node.input]
        node.output[:] = [rename(name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = rename(tensor.name)
    del graph.value_info[:]
    onnx.save(model, target)


TREATMENTS = {
    "basic": saved_by_ort("BASIC"),
    "extended": saved_by_ort("EXTENDED"),
    "all": saved_by_ort("ALL"),
    "transformers": transformer_optimizer,
    "slim": slim,
    "int8": int8,
    "int4": int4,
    "fp16": fp16,
    "one_file": one_file,
    "many_files": many_files,
    "mixed": mixed,
    "noname": noname,
}
FOLDERS = {"one_file", "many_files", "mixed"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("graph", type=Path)
    parser.add_argument("treatments", nargs="+", choices=sorted(TREATMENTS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.treatments:
        stem = f"{args.graph.stem}__{name}"
        target = args.out / stem / "model.onnx" if name in FOLDERS else args.out / f"{stem}.onnx"
        try:
            TREATMENTS[name](args.graph, target)
            print(f"{stem}\tok", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(f"{stem}\tfailed: {type(error).__name__}: {str(error)[:200]}", flush=True)


if __name__ == "__main__":
    main()
