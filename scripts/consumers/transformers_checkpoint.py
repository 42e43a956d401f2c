"""Compares a checkpoint of `export --to safetensors` in transformers with the graphs in ONNX Runtime, for a tiny family.

Prompts and pictures are those of `scripts/families`. Prints the largest difference of the logits over all prompts that
Hugging Face's classes take, and fails above 1e-4.

usage: transformers_checkpoint.py CHECKPOINT MODEL FAMILY
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
import compose  # noqa: E402
import expected  # noqa: E402
import export  # noqa: E402
import pictures  # noqa: E402


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("family")
    args = parser.parse_args()
    family = export.rows()[args.family]()
    before = sum(value.numel() for value in family.model.state_dict().values())
    family.model, report = AutoModelForImageTextToText.from_pretrained(args.checkpoint, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    after = sum(value.numel() for value in family.model.state_dict().values())
    family.model.eval()
    export.eager(family.model)
    reference, parts = expected.Reference(family), compose.Parts(args.model, family)
    worst, prompts = 0.0, 0
    for turns in pictures.CASES.values():
        messages, names = pictures.messages(turns)
        try:
            inputs = reference.inputs(reference.render(messages, True), names)
            logits = reference.logits(inputs)
        except (ValueError, IndexError, RuntimeError):
            continue  # Prompts that the family's own classes refuse.
        found = parts.logits(inputs, reference.positions(inputs))
        worst, prompts = max(worst, float(np.abs(found - logits).max())), prompts + 1
    dtypes = {str(value.dtype) for value in family.model.state_dict().values()}
    print(f"{args.family}: {before} -> {after} parameters ({', '.join(dtypes)}), {prompts} prompts, largest difference {worst:.1e}")
    assert prompts > 3 and worst < 1e-4


if __name__ == "__main__":
    main()
