"""Compares `interlace prune --keep-image-tokens` with the same rule in PyTorch, on the tiny network of each family.

Hugging Face's model embeds a prompt; the rule (DART, arXiv 2502.11494, on input embeddings) chooses the image tokens that stay;
the text model reads them with the positions of the whole prompt and answers greedily. Compared are the chosen tokens with those
of `token_pruner.onnx`, and the answer with that of `interlace generate`.

usage: token_pruning.py OUT_DIR INTERLACE [NAME...] [--keep 0.5]      OUT_DIR is the output folder of export.py
"""
import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

import base
import expected
import export
import pictures

FAMILIES = ["smolvlm", "idefics3", "internvl", "mistral3", "llava", "qwen2_vl", "qwen2_5_vl", "glm4v"]
PIVOTS = 4
GREEDY = 8


def largest(values, count):
    """Places of the largest values, of equal ones the first."""
    return torch.sort(values, descending=True, stable=True).indices[:count]


def rule(embeds, image, keep):
    """Positions that stay, for one picture. `embeds` [T, D], `image` [T]."""
    norms = embeds.abs().sum(-1)
    places = image.nonzero()[:, 0]
    words = (~image).nonzero()[:, 0]
    quota = math.ceil(round(keep * len(places), 9))
    own = largest(norms[places], min(PIVOTS, quota))
    pivots = torch.cat([places[own], words[largest(norms[words], PIVOTS)]])
    stay = torch.zeros(len(places), dtype=torch.bool)
    stay[own] = True
    turns = min(len(pivots), quota - len(own))
    for number in range(turns):
        left = quota - int(stay.sum())
        share = -(-left // (turns - number))
        near = torch.nn.functional.cosine_similarity(embeds[places], embeds[pivots[number]][None], dim=-1)
        near[stay] = torch.inf
        stay[largest(-near, share)] = True
    kept = torch.ones(len(image), dtype=torch.bool)
    kept[places] = stay
    return kept.nonzero()[:, 0]


def same(embeds, found, want):
    """Areas of one colour have tokens that are equal but for rounding, which decides between them."""
    missing = [place for place in want if place not in found]
    for place in found:
        if place not in want:
            near = [other for other in missing if torch.allclose(embeds[place], embeds[other], rtol=1e-4, atol=1e-4)]
            if not near:
                return False
            missing.remove(near[0])
    return not missing


class Text:
    """What the text model of a network reads for a prompt, and the text model alone."""

    def __init__(self, reference):
        self.reference, self.model = reference, reference.model
        self.stack = base.text_model(self.model)

    @torch.no_grad()
    def read(self, inputs):
        seen = {}
        hook = self.stack.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
        self.model(**self.reference.arguments(inputs))
        hook.remove()
        return seen["inputs_embeds"]

    @torch.no_grad()
    def greedy(self, embeds, positions, following, stops):
        """Greedy tokens behind embeddings `[1, K, D]` at `positions` `[rows, 1, K]`, without a cache."""
        out, table = [], self.model.get_input_embeddings()
        while len(out) < GREEDY:
            given = positions if positions.shape[0] > 1 else positions[0]
            hidden = self.stack(
                inputs_embeds=embeds,
                position_ids=given,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
                use_cache=False,
            ).last_hidden_state
            token = int(self.model.get_output_embeddings()(hidden[:, -1]).argmax())
            if token in stops:
                break
            out.append(token)
            embeds = torch.cat([embeds, table(torch.tensor([[token]]))], 1)
            last = torch.full((positions.shape[0], 1, 1), following + len(out) - 1)
            positions = torch.cat([positions, last], -1)
        return out


def check(name, row, out, interlace, keep, work):
    family = row()
    export.eager(family.model)
    reference = expected.Reference(family)
    text = Text(reference)
    less = work / name
    subprocess.run([interlace, "prune", out / name, "--keep-image-tokens", str(keep), "-o", less, "-q"], check=True)
    pruner = ort.InferenceSession(str(less / "onnx/token_pruner.onnx"), providers=["CPUExecutionProvider"])
    files = pictures.files()
    tokenizer = family.processor.tokenizer
    stops = reference.stops() | {tokenizer.eos_token_id}
    checked = equal = tokens = stayed = 0
    for case, turns in pictures.CASES.items():
        if len(turns) > 1 or len(turns[0][0]) != 1:
            continue
        messages, names = pictures.messages(turns)
        try:
            inputs = reference.inputs(reference.render(messages, True), names)
            embeds = text.read(inputs)
        except Exception as error:
            print(f"  {name} {case}: refused by transformers: {type(error).__name__}")
            continue
        image = inputs["input_ids"][0] == family.image_token_id
        kept = rule(embeds[0], image, keep)
        positions = torch.from_numpy(np.ascontiguousarray(reference.positions(inputs))).long()
        following = int(positions.max()) + 1
        feeds = {
            "inputs_embeds": embeds.numpy(),
            "image_mask": image[None].numpy(),
            "pivot_mask": ~image[None].numpy(),
            "picture_tokens": np.array([int(image.sum())]),
        }
        found = pruner.run(None, feeds)[0]
        assert same(embeds[0], found.tolist(), kept.tolist()), (name, case, found.tolist(), kept.tolist())
        equal += found.tolist() == kept.tolist()
        kept = torch.from_numpy(found)
        answer = text.greedy(embeds[:, kept], positions[..., kept], following, stops)
        picture = work / names[0]
        picture.write_bytes(files[names[0]])
        question = ["--image", picture, "--prompt", turns[0][1], "--max-tokens", str(GREEDY), "--json", "-q"]
        shown = subprocess.run([interlace, "generate", less, *question], check=True, capture_output=True, text=True)
        theirs = json.loads(shown.stdout)["answers"][0]
        ours = tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert theirs["answer"] == ours and theirs["tokens"] == len(answer), (name, case, theirs, ours)
        checked, tokens, stayed = checked + 1, tokens + int(image.sum()), stayed + len(kept) - int((~image).sum())
    print(f"{name}: {checked} prompts, {stayed} of {tokens} image tokens stay, the same ones in {equal} and equal ones in all; answers are equal", flush=True)
    assert checked >= 4, name


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("interlace")
    parser.add_argument("names", nargs="*", default=FAMILIES)
    parser.add_argument("--keep", type=float, default=0.5)
    args = parser.parse_args()
    rows = export.rows()
    with tempfile.TemporaryDirectory() as work:
        for name in args.names or FAMILIES:
            check(name, rows[name], args.out, args.interlace, args.keep, Path(work))


if __name__ == "__main__":
    main()
