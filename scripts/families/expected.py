"""Hugging Face's results for each family: prompts, pixels, positions, logits, losses, answers and layer similarities.

Writes OUT_DIR/_expected/NAME.json, and NAME.npz with the whole arrays. The exported parts also run together in
ONNX Runtime and must compute the same logits.

usage: expected.py OUT_DIR [NAME...]      OUT_DIR is the output folder of export.py
"""
import argparse
import copy
import hashlib
import importlib
import json
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch

import base
import compose
import export
import pictures

TOLERANCE = 1e-4
SAMPLES = 24
GREEDY = 8


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


class Reference:
    """Hugging Face's processor and model of one family."""

    def __init__(self, family):
        self.family, self.model, self.processor = family, family.model, family.processor
        self.pictures = {name: pictures.opened(content) for name, content in pictures.files().items()}

    def render(self, messages, prompt):
        if self.family.written:
            parts = messages[0]["content"]
            return self.family.written(parts[-1]["text"], len(parts) - 1)
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def inputs(self, text, names, **more):
        """The processor's outputs; a template that writes the first token itself is not given it again."""
        bos = self.processor.tokenizer.bos_token
        first = {} if bos is None or not text.startswith(bos) else {"add_special_tokens": False}
        images = [self.pictures[name] for name in names] or None
        given = self.processor(text=[text], images=self.nested(images), return_tensors="pt", **first, **more)
        return {name: value for name, value in given.items() if name != "mm_token_type_ids" or self.typed}

    @property
    def typed(self):
        return self.family.position_rows > 1

    def nested(self, images):
        return [images] if images and self.family.nested_images else images

    def arguments(self, inputs):
        self.forget()
        if self.family.features is not None:
            return {"inputs_embeds": self.merged(inputs), "attention_mask": inputs["attention_mask"]}
        plain = {"use_cache": False} if self.family.keep_places else {}
        return {k: v for k, v in inputs.items() if k in self.family.accepted()} | plain

    def forget(self):
        inner = self.model.model
        if hasattr(inner, "rope_deltas"):
            inner.rope_deltas = None

    def positions(self, inputs):
        """Position ids `[rows, 1, T]`."""
        ids = inputs["input_ids"]
        row = torch.arange(ids.shape[1])[None, None] + self.family.first_position
        if self.family.position_rows == 1 or "image_grid_thw" not in inputs:
            return row.expand(self.family.position_rows, 1, -1).numpy()
        wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return self.model.model.get_rope_index(**{name: inputs[name] for name in wanted})[0].numpy()

    def merged(self, inputs):
        """Embeddings with image features in place, for a family whose graphs make other features than its network."""
        embeds = self.model.get_input_embeddings()(inputs["input_ids"]).detach().clone()
        if "pixel_values" in inputs:
            embeds[inputs["input_ids"] == self.family.image_token_id] = self.family.features(**inputs)
        return embeds

    @torch.no_grad()
    def logits(self, inputs, model=None):
        return (model or self.model)(**self.arguments(inputs)).logits.numpy()

    @torch.no_grad()
    def greedy(self, inputs, model=None):
        model = model or self.model
        if self.family.keep_places:
            return self.greedy_without_cache(inputs, model)
        arguments = self.arguments(inputs)
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None
        eos = self.processor.tokenizer.eos_token_id
        out = model.generate(
            **arguments, do_sample=False, max_new_tokens=GREEDY, eos_token_id=eos, pad_token_id=eos
        )[0].tolist()
        out = out if "inputs_embeds" in arguments else out[inputs["input_ids"].shape[1] :]
        return out[: out.index(eos)] if eos in out else out

    def greedy_without_cache(self, inputs, model):
        """Greedy tokens, the whole sequence read again for each: caches count layers that are not there."""
        eos, out = self.processor.tokenizer.eos_token_id, []
        inputs = dict(inputs)
        while len(out) < GREEDY:
            token = int(model(**self.arguments(inputs)).logits[0, -1].argmax())
            if token == eos:
                break
            out.append(token)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return out

    def learned(self, turns):
        """Ids of a conversation and which of them belong to answers, the token that closes each included."""
        messages, names = pictures.messages(turns)
        if self.family.written:
            inputs = self.inputs(self.render(messages, True), names, suffix=turns[0][2])
            return inputs, inputs.pop("labels")[0] != -100
        whole = self.render(messages, False)
        inputs = self.inputs(whole, names)
        ids = inputs["input_ids"][0]
        mask = torch.zeros(len(ids), dtype=torch.bool)
        closing = set(self.processor.tokenizer.all_special_ids) | self.added()
        used = 0
        for number, (shown, _, answer) in enumerate(turns):
            used += len(shown)
            prompt = self.render(messages[: 2 * number + 1], True)
            if not whole.startswith(prompt):
                prompt = whole[: whole.index(answer, len(prompt) - 8)]
            prefix = self.inputs(prompt, names[:used])["input_ids"][0]
            assert torch.equal(ids[: len(prefix)], prefix), (prompt, answer)
            text = whole[: whole.index(answer, len(prompt) - 8) + len(answer)]
            limit = len(self.inputs(text, names[:used])["input_ids"][0])
            # The token that closes the answer, its own or the one at which generation ends.
            end = limit + int(limit < len(ids) and int(ids[limit]) in closing | self.stops())
            mask[len(prefix) : end] = True
        return inputs, mask

    def stops(self):
        stops = self.family.generation.get("eos_token_id", [])
        return set(stops if isinstance(stops, list) else [stops])

    def added(self):
        return {number for number, token in self.processor.tokenizer.added_tokens_decoder.items() if token.special}

    def loss(self, batch, model=None):
        """Sum of the losses of learned tokens and their number, of each conversation by itself."""
        out = []
        for inputs, mask in batch:
            logits = torch.from_numpy(self.logits(inputs, model)).double()
            losses = torch.nn.functional.cross_entropy(logits[0, :-1], inputs["input_ids"][0, 1:], reduction="none")
            out.append({"sum": float(losses[mask[1:]].sum()), "tokens": int(mask[1:].sum())})
        return out

    @torch.no_grad()
    def similarities(self, inputs):
        """Cosine similarities of the residual stream `k` layers apart, k = 1, 2, 3, over a prompt's tokens.

        `recorded` takes what each layer module gives, as Hugging Face records it; `entering` takes what each layer
        reads. They differ where something is added between layers.
        """
        layers = len(base.text_model(self.model).layers)
        states = self.model(**self.arguments(inputs), output_hidden_states=True).hidden_states[:layers]
        read = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, kwargs: read.append((args or [kwargs["hidden_states"]])[0]), with_kwargs=True)
            for layer in base.text_model(self.model).layers
        ]
        self.model(**self.arguments(inputs))
        for hook in hooks:
            hook.remove()
        near = lambda rows, k: [
            float(torch.nn.functional.cosine_similarity(rows[i].double(), rows[i + k].double(), dim=-1).mean())
            for i in range(layers - k)
        ]
        out = {}
        for name, rows in (("recorded", states), ("entering", read)):
            out[name] = {str(k): near(rows, k) for k in (1, 2, 3)}
        return out


def with_torchvision(family):
    """The family with the image processor of the torchvision back end; `None` where it is the same or has no filter.

    Torchvision before 0.27 has no Lanczos filter, and transformers takes Pillow in its place.
    """
    images = family.processor.image_processor
    name = type(images).__name__
    if not name.endswith("Pil") or images.resample == pictures.LANCZOS:
        return None
    module = importlib.import_module(type(images).__module__.replace("_pil", ""))
    settings = family.preprocessor or family.processor_config["image_processor"]
    settings = {k: v for k, v in settings.items() if k not in ("image_processor_type", "processor_class") and v is not None}
    made = getattr(module, name.removesuffix("Pil"))(**settings)
    other = copy.copy(family)
    other.processor = copy.copy(family.processor)
    other.processor.image_processor = made
    if hasattr(images, "image_seq_length"):
        made.image_seq_length = images.image_seq_length
    return other


def torchvision_values(family, networks, conversations, cases):
    """Pixels, similarities and losses with the torchvision back end."""
    reference = Reference(family)
    out = {"cases": {}}
    for case in cases:
        messages, names = pictures.messages(pictures.CASES[case])
        inputs = reference.inputs(reference.render(messages, True), names)
        if "pixel_values" in inputs:
            out["cases"][case] = described("pixel_values", inputs["pixel_values"])
        if case == "photo":
            out["similarities"] = reference.similarities(inputs)
    batch = [reference.learned(turns) for turns in conversations]
    out["loss"] = {key: reference.loss(batch, model) for key, model in networks.items()}
    return out


def sampled(logits, chosen):
    """A few logits at four places of the prompt."""
    places = [0, logits.shape[1] // 3, 2 * logits.shape[1] // 3, logits.shape[1] - 1]
    return {"places": places, "values": [[float(f"{logits[0, p, c]:.8g}") for c in chosen] for p in places]}


def described(name, value):
    """A processor's output: all of a small one, hash and samples of pixels."""
    array = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if name != "pixel_values":
        kind = array.astype(np.int64)
        if kind.size > 4096:
            return {"shape": list(kind.shape), "sha256": sha(kind), "sum": int(kind.sum())}
        return {"shape": list(kind.shape), "values": kind.ravel().tolist()}
    array = array.astype(np.float32)
    chosen = np.random.default_rng(5).integers(0, array.size, 32)
    return {
        "shape": list(array.shape),
        "sha256": sha(array),
        "places": chosen.tolist(),
        "values": [float(f"{v:.9g}") for v in array.ravel()[chosen]],
    }


def described_case(reference, networks, turns, chosen):
    """One prompt: what is written of it, and its whole arrays."""
    messages, names = pictures.messages(turns)
    text = reference.render(messages, True)
    inputs = reference.inputs(text, names)
    positions = reference.positions(inputs)
    logits = {key: reference.logits(inputs, model) for key, model in networks.items()}
    shown = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    entry = {
        "turns": turns,
        "text": text,
        "input_ids": inputs["input_ids"][0].tolist(),
        "position_ids": positions[:, 0].tolist() if reference.family.position_rows > 1 else None,
        "inputs": {key: described(key, value) for key, value in shown.items()},
        "logits": {key: sampled(value, chosen) for key, value in logits.items()},
        "greedy": {key: reference.greedy(inputs, model) for key, model in networks.items()},
    }
    return entry, {"inputs": inputs, "positions": positions, "logits": logits}


def described_video(reference, chosen):
    """A question about a video given as frames with their times."""
    from transformers.video_utils import VideoMetadata

    names, fps = ["palette.png", "grey.png", "palette.png"], 2.0
    frames = [reference.pictures[name].convert("RGB") for name in names]
    content = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    text = reference.render([{"role": "user", "content": content}], True)
    metadata = VideoMetadata(total_num_frames=len(names), fps=fps, frames_indices=list(range(len(names))))
    inputs = reference.processor(
        text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    wanted = ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask")
    positions = reference.model.model.get_rope_index(**{name: inputs[name] for name in wanted})[0].numpy()
    return {
        "frames": [[number / fps, name] for number, name in enumerate(names)],
        "question": content[-1]["text"],
        "input_ids": inputs["input_ids"][0].tolist(),
        "position_ids": positions[:, 0].tolist(),
        "pixels": sha(inputs["pixel_values_videos"].numpy()),
        "logits": sampled(reference.logits(inputs), chosen),
        "greedy": reference.greedy(inputs),
    }


def write(row, folder):
    family = row()
    export.eager(family.model)
    reference = Reference(family)
    parts = compose.Parts(folder, family)
    chosen = np.random.default_rng(3).choice(family.model.config.get_text_config().vocab_size, SAMPLES, replace=False)
    networks = {"dense": family.model} | {
        name: base.without_layers(family.model, base.DROP, keep) for name, keep in family.prunings()
    }
    backend = "pil" if type(family.processor.image_processor).__name__.endswith("Pil") else "torchvision"
    out = {"backend": backend, "drop": list(base.DROP), "vocabulary": chosen.tolist(), "cases": {}}
    arrays, worst, moved = {}, 0.0, []
    for case, turns in pictures.CASES.items():
        try:
            entry, found = described_case(reference, networks, turns, chosen)
        except Exception as error:
            # Some classes refuse a picture or a prompt, or fail at it.
            out["cases"][case] = {"turns": turns, "refused": f"{type(error).__name__}: {error}"}
            continue
        out["cases"][case] = entry
        inputs, positions, logits = found["inputs"], found["positions"], found["logits"]
        worst = max(worst, float(np.abs(parts.logits(inputs, positions) - logits["dense"]).max()))
        moved.append(float(np.abs(logits["dense"] - logits["pruned"]).max()))
        arrays |= {f"{case}.{key}": np.asarray(value) for key, value in inputs.items()}
        arrays |= {f"{case}.position_ids": positions} | {f"{case}.logits.{key}": value for key, value in logits.items()}
        if case == "photo":
            out["similarities"] = reference.similarities(inputs)
    if family.shows_video:
        out["video"] = described_video(reference, chosen)
    healing = {}
    if family.heal_drop:
        out["heal_drop"] = list(family.heal_drop)
        healing["healing"] = base.without_layers(family.model, family.heal_drop, family.keep_places)
    conversations = [t for t in pictures.LEARNED if not family.written or (len(t) == 1 and t[0][0])]
    batch = [reference.learned(turns) for turns in conversations]
    learned = [{"input_ids": i["input_ids"][0].tolist(), "answers": m.nonzero().ravel().tolist()} for i, m in batch]
    out["learned"] = {"turns": conversations, "conversations": learned}
    networks |= healing
    out["learned"]["loss"] = {key: reference.loss(batch, model) for key, model in networks.items()}
    other = with_torchvision(family)
    if other is not None:
        taken = [case for case, entry in out["cases"].items() if "refused" not in entry]
        out["torchvision"] = torchvision_values(other, networks, conversations, taken)
    values = folder.parent / "_expected"
    values.mkdir(exist_ok=True)
    (values / f"{folder.name}.json").write_text(json.dumps(out) + "\n")
    np.savez_compressed(values / f"{folder.name}.npz", **arrays)
    refused = [case for case, entry in out["cases"].items() if "refused" in entry]
    return worst, min(moved), refused


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table = export.rows()
    failed = False
    for name in args.names or table:
        start = time.time()
        try:
            worst, moved, refused = write(table[name], args.out / name)
            verdict = "ok" if worst <= TOLERANCE else "DIFFERS"
            failed |= verdict != "ok"
            note = f"\trefused: {refused}" if refused else ""
            print(f"{name}\t{verdict}\tgraphs {worst:.1e}\tpruning moves {moved:.2f}{note}\t{time.time() - start:.0f} s", flush=True)
        except Exception:
            traceback.print_exc()
            failed = True
            print(f"{name}\tfailed", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
