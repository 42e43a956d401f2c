"""Perplexity of running text in PyTorch with layers deleted, as JSON: what `interlace eval` is tested against.

usage: perplexity.py TOKENIZER_JSON TEXT_JSONL LENGTH NAME      NAME: a row of networks.py

Lines are tokenised one by one, joined and cut into sequences of LENGTH tokens; every token but the first of a sequence
is predicted.
"""
import json
import math
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

import networks


@torch.no_grad()
def main():
    tokenizer, text, length, name = Tokenizer.from_file(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    ids = [token for line in text.read_text().splitlines() for token in tokenizer.encode(json.loads(line)["text"]).ids]
    sequences = [ids[at : at + length] for at in range(0, len(ids), length)]
    sequences = [torch.tensor([sequence]) for sequence in sequences if len(sequence) > 1]
    network = networks.build(name)
    rows = []
    for drop in [(), (2, 5), (3,)]:
        model = networks.without_layers(network, drop)
        # With labels, transformers gives the mean loss over the predicted tokens.
        losses = [model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in sequences]
        tokens = sum(sequence.shape[1] - 1 for sequence in sequences)
        rows.append({"drop": drop, "perplexity": math.exp(sum(losses) / tokens), "predicted_tokens": tokens})
    print(json.dumps({"sequence_length": length, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
