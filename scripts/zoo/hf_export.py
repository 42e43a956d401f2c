"""Transformers' own ONNX exporter: all components of a network, as OUT/NAME-KIND/COMPONENT.onnx.

KIND is `plain`, or the provider whose fusions are applied: `cpu`, `cuda`, `webgpu`.

usage: hf_export.py OUT_DIR KIND NAME...
"""
import argparse
import traceback
import warnings
from pathlib import Path

import torch
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

import networks

# How many image tokens one 32 x 32 picture takes, where the network counts them in its prompt.
IMAGE_TOKENS = {"smolvlm": 4, "llava": 16, "gemma3_vl": 4, "internvl": 4, "llava_onevision": 0}


def sample(name, model):
    """What `generate` is given: a prompt, with one picture where the network takes pictures."""
    ids = torch.randint(3, 590, (1, 10))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    count = IMAGE_TOKENS.get(name)
    if name.startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl")):
        patch = model.config.vision_config
        width = 3 * patch.temporal_patch_size * patch.patch_size**2
        inputs |= {"pixel_values": torch.randn(64, width), "image_grid_thw": torch.tensor([[1, 8, 8]])}
        ids[0, :1] = model.config.vision_start_token_id = 610
        model.config.image_token_id, model.config.video_token_id = 600, 601
        inputs["mm_token_type_ids"] = torch.zeros(1, 18, dtype=torch.int)
        inputs["mm_token_type_ids"][0, 1:17] = 1
        image = torch.full((1, 16), 600)
    elif count:
        pixels = torch.randn(1, 3, 32, 32)
        inputs["pixel_values"] = pixels[None] if name == "smolvlm" else pixels
        image = torch.full((1, count), 600)
        if name == "gemma3_vl":
            inputs["token_type_ids"] = torch.cat([torch.zeros(1, 1), torch.ones(1, count), torch.zeros(1, 1)], 1).long()
    else:
        return inputs
    inputs["input_ids"] = torch.cat([ids[:, :1], image, ids[:, -1:]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("kind", choices=["plain", "cpu", "cuda", "webgpu"])
    parser.add_argument("names", nargs="+")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    fusions = None if args.kind == "plain" else args.kind
    for name in args.names:
        target = args.out / f"{name}-{args.kind}"
        try:
            model = networks.build(name)
            with torch.no_grad():
                exported = OnnxExporter().export_for_generation(
                    model, sample(name, model), OnnxConfig(dynamic=True, ort_fusions=fusions), multi_token_decode=True
                )
            exported.save_pretrained(target)
            print(f"{target.name}\tok\t{sorted(path.name for path in target.glob('*.onnx'))}", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(f"{target.name}\tfailed: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main()
