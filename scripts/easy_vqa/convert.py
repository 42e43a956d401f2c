"""Writes easy-VQA in the formats that `interlace` reads.

usage: convert.py PACKAGE_DATA OUT

- OUT/train.parquet: nine tenths of the 4,000 training pictures with all their questions, in FineVision's layout
- OUT/held-back.parquet: 240 questions about the other training pictures, a row each
- OUT/easy-vqa.tsv: one question, drawn with seed 1, about each of the first 600 of the 1,000 test pictures, in VLMEvalKit's layout
"""
import base64
import csv
import hashlib
import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HELD_BACK, HELD_BACK_QUESTIONS, TEST_PICTURES, SEED = 0.1, 240, 600, 1
SHAPES = ("circle", "rectangle", "triangle")


def pictures(folder):
    """Each picture's bytes with its questions and answers."""
    found = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text()):
        found.setdefault(number, []).append((question[0].upper() + question[1:], answer))
    return [((folder / "images" / f"{number}.png").read_bytes(), texts) for number, texts in sorted(found.items())]


def is_held_back(picture):
    return int(hashlib.sha256(picture).hexdigest()[:8], 16) / 2**32 < HELD_BACK


def write_rows(path, rows):
    rows = [
        {
            "images": [{"bytes": picture, "path": None}],
            "texts": [{"user": question, "assistant": answer} for question, answer in texts],
            "source": "easy-vqa",
        }
        for picture, texts in rows
    ]
    texts = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))
    images = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([("images", images), ("texts", texts), ("source", pa.string())])), path)


def group(answer):
    return "yes or no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour"


def main():
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    train, rng = pictures(data / "train"), random.Random(SEED)
    write_rows(out / "train.parquet", [row for row in train if not is_held_back(row[0])])
    apart = [(picture, [text]) for picture, texts in train if is_held_back(picture) for text in texts]
    rng.shuffle(apart)
    write_rows(out / "held-back.parquet", apart[:HELD_BACK_QUESTIONS])
    with open(out / "easy-vqa.tsv", "w", newline="") as file:
        rows = csv.writer(file, delimiter="\t", lineterminator="\n")
        rows.writerow(["index", "image", "question", "answer", "category"])
        for number, (picture, texts) in enumerate(pictures(data / "test")[:TEST_PICTURES]):
            question, answer = rng.choice(texts)
            rows.writerow([number, base64.b64encode(picture).decode(), question, answer, group(answer)])


if __name__ == "__main__":
    main()
