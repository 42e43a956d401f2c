"""The table of perplexities that `run` prints.

usage: table.py RUNS      RUNS: the folder with `run`'s plans, reports and metrics
"""
import json
import re
import sys
from pathlib import Path


def main():
    runs = Path(sys.argv[1])
    read = lambda path: json.loads(path.read_text())
    perplexity = lambda name: read(runs / f"eval-{name}.json")["model"]["perplexity"]
    dense = perplexity("dense")
    print("| strategy | layers dropped | perplexity, dropped | recipe | learning rate | batch | passes | perplexity, healed | kept % |")
    print("|---|---|---:|---|---:|---:|---:|---:|---:|")
    print(f"| dense | none | {dense:.1f} | - | - | - | - | - | 100.0 |")
    strategies = [path.stem.removeprefix("plan-") for path in runs.glob("plan-*.json")]
    for strategy in sorted(strategies, key=perplexity):
        layers = " ".join(map(str, read(runs / f"plan-{strategy}.json")["drop"]))
        dropped = perplexity(strategy)
        # `healed-STRATEGY-RECIPE-RATE-bBATCH-pPASSES[+SETTING]`; the name of a strategy may begin with another's.
        pattern = re.compile(rf"eval-(healed-{strategy}-([a-z]+)-(\d.*|none)-b(\d+)-p(\d+)(?:\+(.+))?)\.json")
        healed = [found.groups() for path in runs.iterdir() if (found := pattern.fullmatch(path.name))]
        rows = [(perplexity(name), f"`{recipe}`" + (f" + `{more}`" if more else ""), *how) for name, recipe, *how, more in healed]
        for value, *cells in sorted(rows, reverse=True) or [(None, "-", "-", "-", "-")]:
            if "none" in cells:
                cells[1:] = "-", "-", "-"
            after = "-" if value is None else f"{value:.2f}"
            kept = 100 * dense / (value or dropped)
            print(f"| `{strategy}` | {layers} | {dropped:.1f} | {' | '.join(cells)} | {after} | {kept:.1f} |")


if __name__ == "__main__":
    main()
