"""The same network in PyTorch: perplexity of held-out text with layers deleted, and healed by plain training.

usage: reference.py GGUF TEXT [--drop LAYERS [--train LAYERS --learning-rate LR]]      layer numbers of the dense model

This script uses no code of the crate. Texts are split as in `interlace`: every line of the file is tokenised separately, all
tokens are joined and split into sequences of 512. Perplexity is exp of the mean loss over every token except the first of each
sequence.
"""
import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "language"))
from model import network

LENGTH = 512


def sequences(path, tokenizer):
    tokens = []
    for line in path.read_text(encoding="utf-8").splitlines():
        tokens += tokenizer(json.loads(line)["text"]).input_ids
    cut = [torch.tensor(tokens[at : at + LENGTH]) for at in range(0, len(tokens), LENGTH)]
    return [sequence for sequence in cut if len(sequence) > 1]


def losses(model, batch):
    """Sum of the losses of a batch of equally long sequences, and how many there are."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"), batch[:, 1:].numel()


def perplexity(model, texts):
    total, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            loss, tokens = losses(model, text[None])
            total, count = total + loss.item(), count + tokens
    return math.exp(total / count), count


def delete(model, dropped):
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in dropped]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(kept)]


def heal(model, layers, texts, rate, batch_size, bf16):
    model.requires_grad_(False)
    for layer in layers:
        layer.requires_grad_(True)
    trained = [parameter for layer in layers for parameter in layer.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    texts = [text for text in texts if len(text) == LENGTH]
    random.Random(42).shuffle(texts)
    batches = [torch.stack(texts[at : at + batch_size]) for at in range(0, len(texts), batch_size)]
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * len(batches)), len(batches))
    model.train()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, count = losses(model, batch)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"{(loss / count).item():.4f}", flush=True, file=sys.stderr)
    model.eval()


def main():
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("text", type=Path, help="folder with train.jsonl and held-out.jsonl")
    parser.add_argument("--drop", type=numbers, default=[])
    parser.add_argument("--train", type=numbers, default=[])
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    model, tokenizer = network(args.gguf)
    layers = [model.model.layers[number] for number in args.train]
    delete(model, args.drop)
    began = time.time()
    if layers:
        heal(model, layers, sequences(args.text / "train.jsonl", tokenizer), args.learning_rate, args.batch_size, args.bf16)
    trained = time.time() - began
    value, count = perplexity(model, sequences(args.text / "held-out.jsonl", tokenizer))
    print(json.dumps({"dropped": args.drop, "trained": args.train, "perplexity": value, "tokens": count, "train_s": trained}))


if __name__ == "__main__":
    main()
