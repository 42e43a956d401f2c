"""Counts equal predictions in two files of JSON lines with `index` and `prediction`; fails unless all are equal.

usage: same_predictions.py FOUND WANTED
"""
import json
import sys


def read(path):
    lines = [json.loads(line) for line in open(path, encoding="utf-8")]
    return {str(line["index"]): line["prediction"].strip() for line in lines if "index" in line}


found, wanted = read(sys.argv[1]), read(sys.argv[2])
equal = sum(text == wanted[index] for index, text in found.items())
print(f"{equal} of {len(found)} predictions are equal")
sys.exit(0 if found and equal == len(found) else 1)
