"""Reads the reports that `run` and `../easy_vqa/run` write.

usage: table.py lowest WORK PREFIX            the rate of the model PREFIX-RATE-42 with the lowest held-back loss
       table.py tests WORK BENCH.tsv          the table of all models that were measured on the test data
       table.py held-back WORK                the table of all models that were measured on the held-back questions
"""
import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

DRAWS, SEED = 2000, 42
NAME = re.compile(
    r"(?:(?P<dropped>pruned)|healed)-(?P<strategy>[a-z-]+)-(?P<ratio>0\.\d+)(?P<made>\+[a-z0-9]+)?"
    r"(?:-(?P<recipe>[a-z]+\d*)-(?P<rate>[0-9.]+(?:e-?\d+)?)-(?P<seed>\d+))?"
)
DENSE = re.compile(r"dense-(?P<recipe>[a-z]+)-(?P<rate>[0-9.]+(?:e-?\d+)?)-(?P<seed>\d+)")


def read(path):
    return json.loads(path.read_text())


def reports(work, kind):
    return {path.stem.removeprefix(f"{kind}-"): read(path)["model"] for path in sorted(work.glob(f"{kind}-*.json"))}


def lowest(work, prefix):
    pattern = re.compile(rf"{re.escape(prefix)}-([0-9.]+(?:e-?[0-9]+)?)-42")
    losses = reports(work, "held").items()
    return min((model["mean_loss"], match[1]) for name, model in losses if (match := pattern.fullmatch(name)))[1]


def row_of(name):
    """What a model is: its place in the table, drop %, strategy and recipe; the same for all seeds."""
    if match := DENSE.fullmatch(name):
        return (1, 0.0, "dense, finetuned", "", match["recipe"], match["rate"])
    if match := NAME.fullmatch(name):
        recipe = match["recipe"] or "-"
        return (2, float(match["ratio"]), match["strategy"], match["made"] or "", recipe, match["rate"] or "-")
    return (0, 0.0, name, "", "-", "-")


def by_row(found):
    rows = defaultdict(list)
    for name, model in found.items():
        rows[row_of(name)].append((name, model))
    return dict(sorted(rows.items()))


def spread(values, form="{:.4f}"):
    text = form.format(np.mean(values))
    return text + (" ± " + form.format(np.std(values, ddof=1)) if len(values) > 1 else "")


def loss(model, chosen=None):
    """Mean loss in nats of a token of the right answers to the chosen questions."""
    own = [answer for answer in model["likelihood"]["answers"] if chosen is None or answer["index"] in chosen]
    return -sum(answer["log_likelihood"] for answer in own) / sum(answer["tokens"] for answer in own)


def accuracy(model, chosen):
    return np.mean([answer["score"] for answer in model["answers"] if answer["index"] in chosen])


def scores(models):
    """Score of each question, the mean over seeds."""
    return np.mean([[answer["score"] for answer in model["answers"]] for model in models], axis=0)


def kept(models, base):
    """Average over the base's with its 95% interval: paired percentile bootstrap over questions within groups."""
    groups = np.array([answer["group"] for answer in models[0]["answers"]])
    own, other, rng = scores(models), scores(base), np.random.default_rng(SEED)
    places = [np.flatnonzero(groups == group) for group in np.unique(groups)]

    def ratio(draw):
        return np.mean([own[place].mean() for place in draw]) / np.mean([other[place].mean() for place in draw])

    draws = [ratio([rng.choice(place, len(place)) for place in places]) for _ in range(DRAWS)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{100 * ratio(places):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def tests(work, bench):
    csv.field_size_limit(1 << 30)
    with open(bench, newline="") as file:
        rare = {row["index"] for row in csv.DictReader(file, delimiter="\t") if row.get("split") == "rare-hand"}
    held_back = reports(work, "held")
    rows = by_row(reports(work, "test"))
    finetuned = next((row for row in rows if row[0] == 1 and row[4] == "paper"), None)
    base = [model for _, model in rows[finetuned]] if finetuned else [rows[(0, 0.0, "dense", "", "-", "-")][0][1]]
    head = ["model", "drop %", "layers dropped", "recipe", "rate", "seeds", "held-back loss", "accuracy %"]
    head += ["kept % of dense, finetuned" if finetuned else "kept % of dense", "loss"]
    head += ["rare style: accuracy %", "rare style: loss"] if rare else []
    print("| " + " | ".join(head) + " |\n|---|---:|---|---|---|" + "---:|" * (len(head) - 5))
    for (kind, ratio, strategy, made, recipe, rate), models in rows.items():
        names, models = [name for name, _ in models], [model for _, model in models]
        layers = " ".join(map(str, read(work / f"plan-{strategy}-{ratio}.json")["drop"])) if kind == 2 else "-"
        losses = [held_back[name]["mean_loss"] for name in names if name in held_back]
        line = [strategy + made.replace("+", ", ") + (", dropped" if kind == 2 and recipe == "-" else "")]
        line += [f"{100 * ratio:g}" if kind == 2 else "-", layers, recipe, rate, str(len(models))]
        line += [spread(losses) if losses else "-", spread([100 * model["score"] for model in models], "{:.1f}")]
        line += [kept(models, base), spread([loss(model) for model in models])]
        if rare:
            line += [spread([100 * accuracy(model, rare) for model in models], "{:.1f}")]
            line += [spread([loss(model, rare) for model in models])]
        print("| " + " | ".join(line) + " |")
    for (kind, ratio, strategy, made, recipe, _), models in rows.items():
        paper = next((rows[row] for row in rows if row[1:5] == (ratio, "interlace", "", "paper")), None)
        if kind == 2 and recipe != "-" and paper and models is not paper:
            mean = lambda models: np.mean([loss(model) for model in models])
            own, theirs, floor = mean([m for _, m in models]), mean([m for _, m in paper]), mean(base)
            print(
                f"\n{strategy}, {recipe} at {100 * ratio:g}%: {own / theirs:.2f} of the loss of interlace, paper; "
                f"of its loss above that of the dense model in the head {(own - floor) / (theirs - floor):.2f}"
            )


def seconds(work, names):
    """Processor time of finetuning; a dash where a model was not trained or trained without taking the time."""
    files = [work / f"time-{name}.txt" for name in names]
    taken = [sum(map(float, file.read_text().split())) for file in files if file.exists()]
    return spread(taken, "{:.0f}") if taken else "-"


def held_back_table(work):
    print("| model | drop % | recipe | rate | seeds | held-back loss | processor time, s |\n|---|---:|---|---|---:|---:|---:|")
    for (kind, ratio, strategy, made, recipe, rate), models in by_row(reports(work, "held")).items():
        name = strategy + made.replace("+", ", ") + (", dropped" if kind == 2 and recipe == "-" else "")
        drop = f"{100 * ratio:g}" if kind == 2 else "-"
        losses = spread([model["mean_loss"] for _, model in models])
        taken = seconds(work, [name for name, _ in models])
        print(f"| {name} | {drop} | {recipe} | {rate} | {len(models)} | {losses} | {taken} |")


def main():
    what, work, *rest = sys.argv[1:]
    match what:
        case "lowest":
            print(lowest(Path(work), rest[0]))
        case "tests":
            tests(Path(work), rest[0])
        case "held-back":
            held_back_table(Path(work))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
