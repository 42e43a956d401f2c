"""Checks the picture budgets that `interlace tune` stores with transformers: for each budget of each family, the model's config
with the budget's keys is read by `interlace generate` and by transformers' own classes, which must make prompts of one length.

usage: budgets.py FAMILIES_DIR INTERLACE WORK_DIR [NAME...]      WORK_DIR is that of families.py
"""
import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts/families"))

import expected
import export

PICTURES = ["photo.jpeg", "rgba.png", "wide.png"]
QUESTION = "What is in this picture?"


def with_keys(folder, keys, work):
    """A copy of a model folder whose image processor has these keys."""
    shutil.copytree(folder, work, copy_function=os.link if os.stat(folder).st_dev == os.stat(work.parent).st_dev else shutil.copy)
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = work / name
        if not path.exists():
            continue
        config = json.loads(path.read_text())
        target = config if name.startswith("pre") else config.get("image_processor")
        if target is not None:
            target.update(keys)
        path.unlink()
        path.write_text(json.dumps(config))
    return work


def length(reference, folder, picture):
    """Tokens of the question by transformers, with the image processor of a folder."""
    own = reference.processor.image_processor
    made = type(own).from_pretrained(folder)
    if hasattr(own, "image_seq_length") and not hasattr(made, "image_seq_length"):
        made.image_seq_length = own.image_seq_length
    reference.processor = copy.copy(reference.processor)
    reference.processor.image_processor = made
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = reference.render([{"role": "user", "content": content}], True)
    return reference.inputs(text, [picture])["input_ids"].shape[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", type=Path)
    parser.add_argument("interlace")
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    rows, checked, wrong = export.rows() | export.rows("MORE"), 0, 0
    for path in sorted(args.work.glob("*.work/quality.json")):
        name = path.parent.name.removesuffix(".work")
        if args.names and name not in args.names or name not in rows:
            continue
        budgets = [choice["keys"] for choice in json.loads(path.read_text())["axes"][2] if "keys" in choice]
        if not budgets:
            print(f"{name}: no picture budget", flush=True)
            continue
        reference = expected.Reference(rows[name]())
        for keys in [{}] + budgets:
            with tempfile.TemporaryDirectory() as work:
                folder = with_keys(args.families / name, keys, Path(work) / "model")
                shown = []
                for picture in PICTURES:
                    file = ROOT / "fixtures/families/pictures" / picture
                    command = [args.interlace, "generate", folder, "--image", file, "--prompt", QUESTION, "--max-tokens", "1", "--json", "-q"]
                    found = subprocess.run(command, capture_output=True, text=True)
                    if found.returncode:
                        shown.append(f"{picture} refused: {' '.join(found.stderr.split())[:150]}")
                        continue
                    ours = json.loads(found.stdout)["answers"][0]["prompt_tokens"]
                    theirs = length(reference, folder, picture)
                    checked, wrong = checked + 1, wrong + (ours != theirs)
                    shown.append(f"{ours}" if ours == theirs else f"{ours} (transformers {theirs})")
                print(f"{name} {json.dumps(keys)}: {', '.join(shown)}", flush=True)
    print(f"{checked} prompts, {wrong} differences")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
