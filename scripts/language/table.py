"""The tables of perplexities that `run` prints: one of the test text, one of what is held back.

usage: table.py RUNS      RUNS: the folder with `run`'s reports

"Own" is the manual's perplexity over that of the dense model finetuned on the same tokens; "other" is the mean, over the three
other kinds, of the perplexity over that of the dense model as it came.
"""
import json
import sys
from pathlib import Path

KINDS = ["manual", "novels", "dictionary", "quotations"]


def main():
    runs = Path(sys.argv[1])
    for part in ("test", "held-back"):
        found = sorted(path.name.split(".")[0] for path in runs.glob(f"*.{part}.quotations.json"))
        read = lambda name, kind: json.loads((runs / f"{name}.{part}.{kind}.json").read_text())["model"]["perplexity"]
        rows = {name: [read(name, kind) for kind in KINDS] for name in found}
        if not {"dense", "dense-all"} <= rows.keys():
            continue
        print(f"\n{part}\n\n| model | {' | '.join(KINDS)} | own | other | trained |\n|---|{'---:|' * 7}")
        for name, values in sorted(rows.items(), key=lambda row: row[1][0]):
            own = values[0] / rows["dense-all"][0]
            other = sum(value / dense for value, dense in zip(values[1:], rows["dense"][1:])) / 3
            report = runs / f"{name}.work" / "finetune.json"
            took = json.loads(report.read_text()) if report.exists() else None
            seconds = f"{took['fit_s'] + took['train_s']:.0f} s" if took else "-"
            print(f"| `{name}` | {' | '.join(f'{value:.1f}' for value in values)} | {own:.2f} | {other:.2f} | {seconds} |")


if __name__ == "__main__":
    main()
