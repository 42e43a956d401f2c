"""The tables of perplexities that `run` prints: for each folder of reports one of the test text and one of what is held back.

usage: table.py TEXT RUNS      TEXT: what the models were healed on, `manual` or `three`; RUNS: the folder with the reports

"Own" is the mean, over the kinds healed on, of the perplexity over that of the dense model finetuned on the same tokens, at the best rate;
"other" is the mean, over the kinds that no model was healed on, of the perplexity over that of the dense model as it came.
A name with `-64k` or `-128k` says how many tokens a model saw, with `-43` its seed. The rival of a row is the dense model finetuned on the
same tokens with the same seed; where there is none, that of the fewest tokens and the first seed.
"""
import json
import math
import re
import sys
from pathlib import Path

KINDS = {
    "manual": (["manual"], ["novels", "dictionary", "quotations"]),
    "three": (["manual", "novels", "dictionary"], ["quotations", "news"]),
}


def perplexity(path):
    return json.loads(path.read_text())["model"]["perplexity"] if path.exists() else math.nan


def shown(value, digits):
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def mean_ratio(values, base):
    return sum(value / of for value, of in zip(values, base)) / len(base)


def budget(name):
    """Thousands of tokens and the seed; 0 and 42 where the name does not say."""
    found = re.search(r"-(\d+)k\b(?:.*-(4[3-9]))?", name)
    return (int(found[1]), int(found[2] or 42)) if found else (0, 42)


def rivals(rows, own):
    """For each budget the finetuned dense model's values on the kinds healed on, at the best rate; by budget."""
    found = {}
    for name, values in sorted(rows.items()):
        if name.startswith("dense-all"):
            found.setdefault(budget(name), []).append(values[own])
    dense = rows["dense"][own]
    return {key: min(many, key=lambda values: mean_ratio(values, dense)) for key, many in sorted(found.items())}


def seconds(runs, name):
    """Seconds of the fit and the steps, and of the processor in all; dashes where they were not taken."""
    report, time = runs / f"{name}.work" / "finetune.json", runs / f"{name}.time"
    took = json.loads(report.read_text()) if report.exists() else None
    trained = shown(took["fit_s"] + took["train_s"], 0) + " s" if took else "-"
    return trained, f"{sum(map(float, time.read_text().split()[-2:])):.0f} s" if time.exists() else "-"


def main():
    text, runs = sys.argv[1], Path(sys.argv[2])
    own_kinds, others = KINDS[text]
    kinds = own_kinds + others
    own, other = slice(0, len(own_kinds)), slice(len(own_kinds), None)
    for part in ("test", "held-back"):
        found = sorted(path.name.split(f".{part}.")[0] for path in runs.glob(f"*.{part}.manual.json"))
        rows = {name: [perplexity(runs / f"{name}.{part}.{kind}.json") for kind in kinds] for name in found}
        if "dense" not in rows or not (rival := rivals(rows, own)):
            continue
        first = next(iter(rival.values()))
        ratios = {
            name: (mean_ratio(values[own], rival.get(budget(name), first)), mean_ratio(values[other], rows["dense"][other]))
            for name, values in rows.items()
        }
        print(f"\n{part}\n\n| model | {' | '.join(kinds)} | own | other | trained | processor |\n|---|{'---:|' * (len(kinds) + 4)}")
        for name in sorted(rows, key=lambda name: ratios[name]):
            cells = [shown(value, 1) for value in rows[name]] + [shown(value, 2) for value in ratios[name]] + [*seconds(runs, name)]
            print(f"| `{name}` | {' | '.join(cells)} |")
        for name in rows:
            if f"{name}-43" in rows:
                of_seeds = " and ".join(f"{a:.3f}, {b:.3f}" for a, b in zip(ratios[name], ratios[f"{name}-43"]))
                print(f"\n`{name}` with seeds 42, 43: own and other {of_seeds}")
        # Of the loss that dropping added on the kinds healed on, the part that a recipe wins back, to the part that `paper` does.
        for name, values in rows.items():
            stem = re.match("(.*)-64k-fast", name)
            if stem and f"{stem[1]}-64k-paper" in rows:
                dropped, paper = rows[stem[1]][own], rows[f"{stem[1]}-64k-paper"][own]
                won = sum(math.log(a / b) for a, b in zip(dropped, values)) / sum(math.log(a / b) for a, b in zip(dropped, paper))
                print(f"\n`{name}` wins back {100 * won:.0f}% of what `{stem[1]}-64k-paper` does")


if __name__ == "__main__":
    main()
