"""Running text as files of ready tensors, each sequence behind the tokenizer's begin token.

usage: tensors.py MODEL OUT LENGTH TEXT...      writes OUT/NAME.npz for each TEXT NAME.jsonl, LENGTH tokens to a sequence

Gemma predicts badly where a sequence lacks the begin token that it was trained with.
"""
import json
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def main():
    model, out, length, *texts = sys.argv[1:]
    length = int(length)
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    begin = tokenizer.encode("").ids
    assert len(begin) == 1, f"the tokenizer puts {begin} before a text, expected one token"
    Path(out).mkdir(parents=True, exist_ok=True)
    for text in map(Path, texts):
        lines = text.read_text(encoding="utf-8").splitlines()
        ids = [token for line in lines for token in tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids]
        body = length - 1
        rows = [begin + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
        ids = np.array(rows, np.int64)
        labels = ids.copy()
        labels[:, 0] = -100
        np.savez(Path(out) / f"{text.stem}.npz", input_ids=ids, attention_mask=np.ones_like(ids), labels=labels)
        print(f"{text.stem}.npz\t{len(rows)} sequences")


if __name__ == "__main__":
    main()
