"""Tunes the tiny network of each family and prints what a quarter of its parts costs.

Times are those of tower and decoder to the first token, from `costs.json`: the whole model and a thinner one answer with every
picture budget in alternating rounds. The networks have random weights, so their losses mean nothing. Families that `interlace
tune` refuses are listed with the reason.

usage: families.py FAMILIES_DIR INTERLACE WORK_DIR [NAME...] [--rounds 20]
       FAMILIES_DIR is the output folder of scripts/families/export.py
"""
import argparse
import json
import os
import subprocess
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[2] / "fixtures/families/pictures"
QUESTIONS = [("What is in this picture?", "A red square."), ("How many are there?", "There are two.")]
SHOWN = ["photo.jpeg", "square.png", "wide.png", "tall.png", "palette.png", "rgba.png"]


def data(folder):
    """Conversations in LLaVA's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for picture in SHOWN:
        (folder / picture).write_bytes((PICTURES / picture).read_bytes())
        for question, answer in QUESTIONS:
            said = [{"from": "human", "value": "<image>\n" + question}, {"from": "gpt", "value": answer}]
            rows.append({"id": f"{picture} {question}", "image": picture, "conversations": said})
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def tuned(model, interlace, work, rows, rounds):
    """The report of a tuning to just below the model's size; a text where it is refused."""
    size = sum(file.stat().st_size for file in model.rglob("*.onnx*"))
    report = work / f"{model.name}.work/tune.json"
    if not report.exists():
        command = [
            interlace, "tune", model, "--size", f"{0.98 * size / 1e6:.6f}MB", "--data", rows, "--samples", "6",
            "--held-back", "0.4", "--rounds", str(rounds), "--new-tokens", "2", "--threads", "1", "--candidates", "1", "--strategy", "sleb",
            "-o", work / model.name, "-q",
        ]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            return " ".join(found.stderr.split())
    return json.loads(report.read_text())


def networks_ms(costs, plan):
    """Tower and decoder to the first token, without the plan's layers."""
    same = lambda own: own.get("images", {}) == plan["images"] and own.get("keep_image_tokens") == plan.get("keep_image_tokens")
    own = next(own for own in costs["budgets"] if same(own))
    tower = own["tower_rest_ms"] + (costs["tower_layers"] - len(plan["tower"])) * own["tower_layer_ms"]
    decoder = own["decoder_rest_ms"] + (costs["decoder_layers"] - len(plan["decoder"])) * own["decoder_layer_ms"]
    return tower + decoder


def row(name, report):
    costs, whole = report["costs"], report["whole"]
    dense = networks_ms(costs, whole)
    cells = {"decoder": "", "tokens": "", "both": "", "tower": ""}
    for named in report["quarters"]:
        plan = named["plan"]
        part = networks_ms(costs, plan) / dense
        tokens = "" if plan["image_tokens"] == whole["image_tokens"] else f"{whole['image_tokens']} to {plan['image_tokens']}: "
        key = next(key for key in cells if key in named["name"])
        cells[key] = f"{'' if key == 'both' else tokens}{part:.2f}"
    budgets = len([own for own in costs["budgets"] if "keep_image_tokens" not in own]) - 1
    return f"| {name} | {budgets or 'none'} | {dense:.2f} | " + " | ".join(cells.values()) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", type=Path)
    parser.add_argument("interlace")
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = data(args.work / "data")
    names = args.names or sorted(path.name for path in args.families.iterdir() if (path / "config.json").exists())
    print("| family | picture budgets | whole, ms | decoder | image tokens | both | tower |\n|---|---:|---:|---:|---:|---:|---:|", flush=True)
    refused = []
    for name in names:
        found = tuned(args.families / name, args.interlace, args.work, rows, args.rounds)
        if isinstance(found, str):
            refused.append(f"- {name}: {found}")
        else:
            print(row(name, found), flush=True)
    print("\nRefused:\n" + "\n".join(refused or ["none"]))


if __name__ == "__main__":
    main()
