"""Optimum's exports of a text decoder, in an environment with optimum-onnx and transformers 4.57.

Kinds: `past` (with cache), `nopast` (without), `O1`, `O3` (its optimisation levels), and `merged` (one graph with an
`If` on `use_cache_branch`: the graph without cache in one branch, the one with cache in the other).

usage: optimum_export.py OUT_DIR WEIGHTS_DIR KIND...      WEIGHTS_DIR comes from save_weights.py
"""
import argparse
import tempfile
import warnings
from pathlib import Path


def export(weights, out, **more):
    from optimum.exporters.onnx import main_export

    main_export(str(weights), output=str(out), opset=18, do_validation=False, no_post_process=False, **more)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("kinds", nargs="+", choices=["past", "nopast", "O1", "O3", "merged"])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for kind in args.kinds:
        target = args.out / f"{args.weights.name}-{kind}"
        if kind == "merged":
            merged(args.weights, target)
        else:
            task = "text-generation" if kind == "nopast" else "text-generation-with-past"
            level = {"optimize": kind} if kind.startswith("O") else {}
            export(args.weights, target, task=task, **level)
        print(f"{target.name}\tok", flush=True)


def merged(weights, target):
    from optimum.exporters.onnx import export as export_graph
    from optimum.exporters.tasks import TasksManager
    from optimum.onnx import merge_decoders
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights, attn_implementation="eager").eval()
    constructor = TasksManager.get_exporter_config_constructor("onnx", model=model, task="text-generation-with-past")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / "without.onnx", Path(scratch) / "with.onnx"]
        for path, with_cache in zip(paths, (False, True)):
            config = constructor(model.config, use_past=True, use_past_in_inputs=with_cache)
            export_graph(model, config, path, opset=18)
        merge_decoders(*map(str, paths), save_path=str(target / "decoder_model_merged.onnx"), strict=False)
    model.config.save_pretrained(target)


if __name__ == "__main__":
    main()
