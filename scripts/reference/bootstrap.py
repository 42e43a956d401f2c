#!/usr/bin/env python3
"""Paired bootstrap intervals in numpy, as the reference that `eval` and `run` are tested against.

Draws scores of two models for the questions of three groups, and log-likelihoods of right answers, stores them, and
resamples questions within each group (both models' answers together) 200,000 times. The intervals are percentiles.

    python3 scripts/reference/bootstrap.py fixtures/expected/bootstrap.json
"""

import json
import sys

import numpy as np

DRAWS = 200_000


def interval(whole, values):
    return [whole, *(float(end) for end in np.quantile(values, [0.025, 0.975]))]


def main():
    rng = np.random.default_rng(7)
    strata = []
    for size, model, baseline in [(120, 0.80, 0.95), (60, 0.55, 0.70), (30, 0.9, 0.9)]:
        easy = rng.random(size)
        pair = [(easy < model).astype(float), (easy + rng.normal(0, 0.1, size) < baseline).astype(float)]
        strata.append([scores.tolist() for scores in pair])
    sums = np.zeros((DRAWS, 2))
    whole = np.zeros(2)
    for pair in strata:
        scores = np.array(pair)
        whole += scores.mean(axis=1)
        for start in range(0, DRAWS, 10_000):
            drawn = rng.integers(0, scores.shape[1], (10_000, scores.shape[1]))
            sums[start : start + 10_000] += scores[:, drawn].mean(axis=2).T
    tokens = rng.integers(1, 12, 150).astype(float)
    likelihood = np.stack([rng.normal(-0.05, 0.3, 150) * tokens, tokens], axis=1)
    drawn = likelihood[rng.integers(0, 150, (DRAWS, 150))].sum(axis=1)
    total = likelihood.sum(axis=0)
    result = {
        "strata": strata,
        "ratio": interval(float(whole[0] / whole[1]), sums[:, 0] / sums[:, 1]),
        "difference": interval(float((whole[0] - whole[1]) / len(strata)), (sums[:, 0] - sums[:, 1]) / len(strata)),
        "likelihood": likelihood.tolist(),
        "kept_likelihood": interval(float(np.exp(total[0] / total[1])), np.exp(drawn[:, 0] / drawn[:, 1])),
    }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(result, file)
        file.write("\n")


if __name__ == "__main__":
    main()
