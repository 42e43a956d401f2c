"""Splits the shipped finetuning data by a hash of the pictures' bytes.

usage: split.py FINETUNE.parquet OUT     writes OUT/train.parquet and OUT/held-back.parquet

A fifth of the pictures are held back. `train.parquet` has the other rows unchanged; `held-back.parquet` has 240 questions about
the held-back pictures, drawn with seed 1, each as a row of its own.
"""
import hashlib
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HELD_BACK, QUESTIONS, SEED = 0.2, 240, 1


def place(row):
    """A fraction from 0 to 1 that depends on the pictures alone."""
    digest = hashlib.sha256(b"".join(image["bytes"] for image in row["images"])).hexdigest()
    return int(digest[:8], 16) / 2**32


def main():
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    table = pq.read_table(source)
    rows = table.to_pylist()
    train = [row for row in rows if place(row) >= HELD_BACK]
    held_back = [{**row, "texts": [text]} for row in rows if place(row) < HELD_BACK for text in row["texts"]]
    random.Random(SEED).shuffle(held_back)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("held-back", held_back[:QUESTIONS])):
        pq.write_table(pa.Table.from_pylist(part, schema=table.schema), out / f"{name}.parquet")
    print(f"{len(train)} of {len(rows)} pictures to train on, {QUESTIONS} questions of the others held back", file=sys.stderr)


if __name__ == "__main__":
    main()
