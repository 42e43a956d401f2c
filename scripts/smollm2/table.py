"""The table of perplexities that `run` prints.

usage: table.py RUNS      RUNS: the folder with `run`'s plans, reports and metrics
"""
import json
import sys
from pathlib import Path


def main():
    runs = Path(sys.argv[1])
    read = lambda path: json.loads(path.read_text())
    perplexity = lambda name: read(runs / f"eval-{name}.json")["model"]["perplexity"]
    dense = perplexity("dense")
    print("| strategy | layers dropped | dropped | healed with | healed | kept % | training |")
    print("|---|---|---:|---|---:|---:|---:|")
    print(f"| dense | none | {dense:.1f} | - | - | 100.0 | - |")
    for plan in sorted(runs.glob("plan-*.json"), key=lambda path: perplexity(path.stem.removeprefix("plan-"))):
        strategy = plan.stem.removeprefix("plan-")
        layers = " ".join(map(str, read(plan)["drop"]))
        dropped = perplexity(strategy)
        healed = [path.stem.removeprefix("eval-") for path in sorted(runs.glob(f"eval-healed-{strategy}-*.json"))]
        # `interlace` is a prefix of `interlace-loss`.
        recipes = [(name, name.removeprefix(f"healed-{strategy}-")) for name in healed]
        recipes = [(name, recipe) for name, recipe in recipes if "-" not in recipe]
        if not recipes:
            print(f"| `{strategy}` | {layers} | {dropped:.1f} | - | - | {100 * dense / dropped:.1f} | - |")
        for name, recipe in recipes:
            value = perplexity(name)
            seconds = read(runs / f"{name}.work" / "finetune.json")["train_s"]
            print(
                f"| `{strategy}` | {layers} | {dropped:.1f} | `{recipe}` | {value:.1f} | {100 * dense / value:.1f} "
                f"| {seconds / 60:.0f} min |"
            )


if __name__ == "__main__":
    main()
