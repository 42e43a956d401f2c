"""Mobius's exports, in an environment with mobius-onnx.

A variant is an execution provider (`default`, `cpu`, `webgpu`, `openvino`, `cuda`), a type appended to it (`cuda-f16`) or
`static` for a cache of fixed size.

usage: mobius_export.py OUT_DIR WEIGHTS_DIR VARIANT...      WEIGHTS_DIR comes from save_weights.py
"""
import argparse
import json
import re
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from mobius import __main__ as mobius

WRAPPED = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?")
VISION = re.compile(r"^(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector|connector)\.")


def load(folder, read=mobius._load_weights_from_dir):
    """The weights under their own names and under those of older layouts, which some of the builders look for."""
    weights = read(folder)
    for name, value in list(weights.items()):
        if WRAPPED.match(name) or name.startswith("lm_head."):
            plain = re.sub(r"^model\.(?=lm_head)", "", WRAPPED.sub("model.", name))
            for prefix in ("", "language_model.", "decoder."):
                weights.setdefault(prefix + plain, value)
            weights.setdefault(plain.replace("model.embed_tokens", "embedding.embed_tokens"), value)
        elif VISION.match(name):
            plain = name.removeprefix("model.").replace(".fc1.", ".up_proj.").replace(".fc2.", ".down_proj.")
            plain = re.sub(r"^vision_(tower|model)\.(?!vision_model)", "vision_tower.vision_model.", plain)
            weights.setdefault("vision_encoder." + plain, value)
    if "decoder.model.embed_tokens.weight" in weights:
        weights.setdefault("decoder.lm_head.weight", weights["decoder.model.embed_tokens.weight"])
    return weights


def configured(weights, scratch):
    """A folder like `weights` whose text settings say that the head is a weight of its own."""
    shutil.copytree(weights, scratch, dirs_exist_ok=True)
    path = Path(scratch) / "config.json"
    config = json.loads(path.read_text())
    config.get("text_config", config)["tie_word_embeddings"] = False
    path.write_text(json.dumps(config))
    return scratch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("variants", nargs="+")
    args = parser.parse_args()
    mobius._load_weights_from_dir = load
    for variant in args.variants:
        provider, *dtype = variant.split("-")
        target = args.out / f"{args.weights.name}-{variant}"
        options = ["--static-cache", "--max-seq-len", "32"] if provider == "static" else ["--ep", provider]
        options += ["--dtype", dtype[0]] if dtype else []
        with tempfile.TemporaryDirectory() as scratch:
            sys.argv = ["mobius", "build", "--config", configured(args.weights, scratch), *options, str(target)]
            try:
                mobius.main()
                print(f"{target.name}\tok", flush=True)
            except Exception as error:
                traceback.print_exc()
                print(f"{target.name}\tfailed: {type(error).__name__}: {str(error)[:200]}", flush=True)


if __name__ == "__main__":
    main()
