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
        # `healed-STRATEGY-RECIPE-RATES-bBATCH-pPASSES[+SETTING]`; the name of a strategy may begin with another's.
        pattern = re.compile(rf"eval-(healed-{strategy}-([a-z]+)-(\d.*)-b(\d+)-p(\d+)(?:\+(.+))?)\.json")
        healed = [found.groups() for path in runs.iterdir() if (found := pattern.fullmatch(path.name))]
        rows = []
        for name, recipe, rates, batch, passes, more in healed:
            if "," in rates:
                chosen = read(runs / f"{name}.work" / "finetune.json")["learning_rate"]
                rates = f"{chosen:.0e}".replace("e-0", "e-") + " of " + rates.replace(",", ", ")
            rows.append((perplexity(name), f"`{recipe}`" + (f" + `{more}`" if more else ""), rates, batch, passes))
        for value, *cells in sorted(rows, reverse=True) or [(None, "-", "-", "-", "-")]:
            after = "-" if value is None else f"{value:.2f}"
            kept = 100 * dense / (value or dropped)
            print(f"| `{strategy}` | {layers} | {dropped:.1f} | {' | '.join(cells)} | {after} | {kept:.1f} |")


if __name__ == "__main__":
    main()
