"""The tables of perplexities that `run` prints: one of the test text, one of what is held back.

usage: table.py RUNS      RUNS: the folder with `run`'s reports

"Own" is the manual's perplexity over that of the dense model finetuned on the same tokens, at the better rate; "other" is the mean, over the three
other kinds, of the perplexity over that of the dense model as it came.
"""
import json
import math
import sys
from pathlib import Path

KINDS = ["manual", "novels", "dictionary", "quotations"]


def perplexity(path):
    return json.loads(path.read_text())["model"]["perplexity"] if path.exists() else math.nan


def shown(value, digits):
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def main():
    runs = Path(sys.argv[1])
    for part in ("test", "held-back"):
        found = sorted(path.name.split(".")[0] for path in runs.glob(f"*.{part}.manual.json"))
        rows = {name: [perplexity(runs / f"{name}.{part}.{kind}.json") for kind in KINDS] for name in found}
        if not {"dense", "dense-all"} <= rows.keys():
            continue
        finetuned = min(values[0] for name, values in rows.items() if name.startswith("dense-all"))
        print(f"\n{part}\n\n| model | {' | '.join(KINDS)} | own | other | trained |\n|---|{'---:|' * 7}")
        for name, values in sorted(rows.items(), key=lambda row: row[1][0]):
            own = values[0] / finetuned
            other = sum(value / dense for value, dense in zip(values[1:], rows["dense"][1:])) / 3
            cells = [shown(value, 1) for value in values] + [shown(own, 2), shown(other, 2)]
            report = runs / f"{name}.work" / "finetune.json"
            took = json.loads(report.read_text()) if report.exists() else None
            print(f"| `{name}` | {' | '.join(cells)} | {shown(took['fit_s'] + took['train_s'], 0) + ' s' if took else '-'} |")


if __name__ == "__main__":
    main()
