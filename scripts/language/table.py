"""The tables of perplexities that `run` prints: for each folder of reports one of the test text and one of what is held back.

usage: table.py TEXT RUNS      TEXT: what the models were healed on, `manual` or `three`; RUNS: the folder with the reports

"Own" is the mean, over the kinds healed on, of the perplexity over that of the dense model finetuned on the same tokens, at the best rate;
"other" is the mean, over the kinds that no model was healed on, of the perplexity over that of the dense model as it came.
"""
import json
import math
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


def main():
    text, runs = sys.argv[1], Path(sys.argv[2])
    own_kinds, others = KINDS[text]
    kinds = own_kinds + others
    own = slice(0, len(own_kinds))
    for part in ("test", "held-back"):
        found = sorted(path.name.split(f".{part}.")[0] for path in runs.glob(f"*.{part}.manual.json"))
        rows = {name: [perplexity(runs / f"{name}.{part}.{kind}.json") for kind in kinds] for name in found}
        finetuned = [values[own] for name, values in rows.items() if name.startswith("dense-all")]
        if "dense" not in rows or not finetuned:
            continue
        base = min(finetuned, key=lambda values: mean_ratio(values, rows["dense"][own]))
        rows = {name: (values, mean_ratio(values[own], base)) for name, values in rows.items()}
        dense = rows["dense"][0][len(own_kinds) :]
        print(f"\n{part}\n\n| model | {' | '.join(kinds)} | own | other | trained |\n|---|{'---:|' * (len(kinds) + 3)}")
        for name, (values, to_finetuned) in sorted(rows.items(), key=lambda row: row[1][1]):
            other = mean_ratio(values[len(own_kinds) :], dense)
            cells = [shown(value, 1) for value in values] + [shown(to_finetuned, 2), shown(other, 2)]
            report = runs / f"{name}.work" / "finetune.json"
            took = json.loads(report.read_text()) if report.exists() else None
            print(f"| `{name}` | {' | '.join(cells)} | {shown(took['fit_s'] + took['train_s'], 0) + ' s' if took else '-'} |")


if __name__ == "__main__":
    main()
