"""Prunes the vision encoder of an exported package, one layer at a time, and compares it with PyTorch.

For packages without values from `expected.py`: the network is read from the exporter's input folder. With two or more outputs
(DeepStack) the first one, the image features, is compared.

usage: vision.py --interlace BINARY WEIGHTS_DIR PACKAGE/vision_encoder/model.onnx
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from transformers import AutoModelForImageTextToText


class Identity(torch.nn.Module):
    def forward(self, hidden_states, *_, **__):
        return hidden_states


def blocks_of(model):
    """The tower's list of layers."""
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and "vis" in name and name.endswith(("blocks", "layers"))
    ]
    return lists[0]


def inputs_of(session):
    """Random patches, or a random picture of the size that the graph fixes."""
    ports = {port.name: port.shape for port in session.get_inputs()}
    shape = ports["pixel_values"]
    if "image_grid_thw" not in ports:
        return {"pixel_values": torch.randn(1, *shape[1:])}
    grid = torch.tensor([[1, 8, 12]])
    return {"pixel_values": torch.randn(int(grid.prod()), shape[1]), "image_grid_thw": grid}


def features(model, inputs):
    tower = model.model
    if "image_grid_thw" not in inputs:
        return tower.multi_modal_projector(tower.vision_tower(**inputs).last_hidden_state)
    return tower.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interlace", required=True)
    parser.add_argument("weights")
    parser.add_argument("graph", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    inputs = inputs_of(ort.InferenceSession(str(args.graph), providers=["CPUExecutionProvider"]))
    load = lambda: AutoModelForImageTextToText.from_pretrained(args.weights, dtype=torch.float32).eval()
    worst = 0.0
    for dropped in [None, *range(len(blocks_of(load())))]:
        model = load()
        if dropped is not None:
            blocks_of(model)[dropped] = Identity()
        with torch.no_grad():
            wanted = features(model, inputs)
        with tempfile.TemporaryDirectory() as scratch:
            graph = args.graph
            if dropped is not None:
                out = Path(scratch) / "pruned"
                prune = [args.interlace, "prune", str(graph), "--drop", str(dropped), "-o", out, "-q"]
                subprocess.run(prune, check=True, stdout=subprocess.DEVNULL)
                graph = next(out.glob("**/*.onnx"))
            given = {name: value.numpy() for name, value in inputs.items()}
            found = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"]).run(None, given)[0]
            np.savez(Path(scratch) / "inputs.npz", **given)
            verify = [args.interlace, "verify", str(graph), "--inputs", Path(scratch) / "inputs.npz", "-q"]
            agrees = subprocess.run(verify, capture_output=True).returncode == 0
        difference = np.abs(found.reshape(wanted.shape) - wanted.numpy()).max()
        print(f"dropped {dropped}\t{difference:.0e}\tinterpreter {'agrees' if agrees else 'DIFFERS'}", flush=True)
        worst = max(worst, difference if agrees else np.inf)
    sys.exit(0 if worst <= 1e-4 else 1)


if __name__ == "__main__":
    main()
