"""Outputs of Hugging Face's processors for unusual pictures, by family.

Writes `families.json`: a byte tokenizer, the special tokens of all families (their ids follow the bytes), conversations, and for
each family its processor files and cases. A case has the number of its conversation, its pictures (files in `awkward/`, written by
`pictures.py`), the ids as runs `[id, times]`, and for each back end the number of elements and the first 32 digits of the SHA-256 of
each array. The processors receive the pictures upright, as from `load_image`, in their original mode. Run by hand with transformers 5.24, torch 2.11, torchvision 0.26 and pillow 13.0.0 on a CPU with AVX2.

usage: families.py --out fixtures/processor [--only NAME ..]
"""

import argparse
import copy
import hashlib
import importlib
import json
import pathlib
import warnings

import numpy as np
from PIL import Image, ImageOps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from table import FAMILIES, SPECIAL

warnings.filterwarnings("ignore")
_resize = Image.Image.resize


def resize(image, size, resample=None, box=None, reducing_gap=None):
    """Horizontal pass, then vertical pass, which every Pillow up to 12 does; 13 sometimes turns the order round."""
    assert box is None and reducing_gap is None
    return _resize(_resize(image, (size[0], image.size[1]), resample), size, resample)


Image.Image.resize = resize

ALL = ["one.png", "wide.png", "tall.png", "rgba.png", "palette.png", "grey-16.png", "grey.png", "square.png", "page.png",
       "noise.png", "turned.jpeg", "cmyk.jpeg", "photo.jpeg"]
# The conversations of all cases.
TALKS = []


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def picture(folder, name):
    return ImageOps.exif_transpose(Image.open(folder / name))


def build(family, back_end, shared):
    """The family's processor around the class of one back end."""
    named = dict(family["tokens"])
    basics = {name: named.pop(name) for name in list(named) if name in ("bos_token", "eos_token", "pad_token")}
    text = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(shared), extra_special_tokens=named, **basics)
    module, name = family["image_class"]
    suffix, stem = ("Pil", f"image_processing_pil_{module}") if back_end == "pil" else ("", f"image_processing_{module}")
    image_class = getattr(importlib.import_module(f"transformers.models.{module}.{stem}"), name + suffix)
    settings = {key: value for key, value in family["image"].items() if key not in ("image_processor_type", "processor_class")}
    images = image_class(**settings)
    module, name = family["processor_class"]
    processor_class = getattr(importlib.import_module(f"transformers.models.{module}.processing_{module}"), name)
    parts = {"image_processor": images, "tokenizer": text, "chat_template": family["template"], **family["processor"]}
    if family.get("video"):
        module, name = family["video"]
        parts["video_processor"] = getattr(importlib.import_module(f"transformers.models.{module}.video_processing_{module}"), name)()
    if family.get("audio"):
        module, name = family["audio"]
        parts["feature_extractor"] = getattr(importlib.import_module(f"transformers.models.{module}.feature_extraction_{module}"), name)()
    return processor_class(**parts)


def conversations(family):
    image, say = {"type": "image"}, lambda text: {"type": "text", "text": text}
    user = lambda *content: {"role": "user", "content": list(content)}
    answer = lambda text: {"role": "assistant", "content": [say(text)]}
    for name in family.get("pictures", ALL):
        yield [name], [user(image, say("What is it?"))], True
    if not family.get("single"):
        yield (["photo.jpeg", "grey.png"],
               [user(image, say("What is this?")), answer("a cat"), user(image, say("And that, \u00e9?"))], True)
        yield ["grey.png", "photo.jpeg"], [user(image, image, say("Which is grey?")), answer("the first")], False
    if not family.get("always"):
        yield [], [user(say("Hello?")), answer("Hi!"), user(say("How?"))] if not family.get("single") else [user(say("Hello?"))], True


def runs(ids):
    out = []
    for token in ids:
        if out and out[-1][0] == token:
            out[-1][1] += 1
        else:
            out.append([token, 1])
    return out


def digest(array):
    array = np.asarray(array)
    if array.dtype.kind == "f":
        array = array.astype("<f4")
    elif array.dtype.kind == "b":
        array = array.astype(np.uint8)
    else:
        array = array.astype("<i8")
    return {"len": int(array.size), "sha256": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:32]}


def run(family, processor, names, messages, prompt, folder):
    """Ids and arrays, through the template and the processor as `apply_chat_template` joins them."""
    options = {**family.get("call", {})}
    if family["template"] is None:
        text = family["prompt"](names, messages)
    else:
        text = processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        bos = processor.tokenizer.bos_token
        if bos is not None and text.startswith(bos):
            options["add_special_tokens"] = False
    pictures = [picture(folder, name) for name in names]
    if family.get("rgb"):
        # The class converts nothing itself; this is what `load_image` does.
        pictures = [image.convert("RGB") for image in pictures]
    out = processor(text=[text], images=[pictures] if pictures else None, return_tensors="np" if not family.get("pt") else "pt", **options)
    arrays = {}
    for name, kind in family["arrays"].items():
        if name in out:
            value = out[name]
            if isinstance(value, list):
                value = np.concatenate([np.asarray(x).reshape(-1) for x in value])
            array = np.asarray(value)
            arrays[family.get("rename", {}).get(name, name)] = digest(array.astype(bool) if kind == "bool" else array)
    ids = np.array(out["input_ids"]).reshape(-1).tolist()
    return runs(ids), arrays


def golden(family, shared, folder):
    processors = {back_end: build(family, back_end, shared) for back_end in family["back_ends"]}
    cases = []
    for names, messages, prompt in conversations(family):
        if messages not in TALKS:
            TALKS.append(messages)
        case = {"pictures": names, "messages": TALKS.index(messages), "add_generation_prompt": prompt, "arrays": {}}
        for back_end, processor in processors.items():
            try:
                case["input_ids"], arrays = run(family, processor, names, messages, prompt, folder)
            except (ValueError, ZeroDivisionError, RuntimeError) as error:
                if names[:1] and names[0] in family.get("refused", {}):
                    case["refusal"] = family["refused"][names[0]]
                    continue
                raise RuntimeError(f"{family['name']} {back_end} {names}: {error}") from error
            if len(names) < 2 or not family.get("padded"):
                case["arrays"][back_end] = arrays
        cases.append(case)
    return cases


def files(family, shared):
    """The folder's files in the layout that the family names."""
    kind = {"image_processor_type": family["image_class"][1]}
    image = {**family["image"], **{key: value for key, value in kind.items() if "image_processor_type" not in family["image"]}}
    processor = {**family["processor"], "processor_class": family["processor_class"][1]}
    out = {}
    if family.get("layout", "flat") in ("flat", "both"):
        out["preprocessor_config.json"] = {**image, "processor_class": family["processor_class"][1]}
    if family.get("layout", "flat") in ("nested", "both"):
        processor["image_processor"] = image
    out["processor_config.json"] = processor
    out["tokenizer_config.json"] = dict(family["tokens"])
    if family["template"] is not None:
        place = family.get("template_in", "chat_template.jinja")
        if place == "chat_template.jinja":
            out[place] = family["template"]
        else:
            out.setdefault(place, {})["chat_template"] = family["template"]
    config = {"num_hidden_layers": 1, **family.get("config", {})}
    config["image_token_id"] = shared.token_to_id(family["feature"])
    out["config.json"] = config
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    shared, done = tokenizer(), []
    path = args.out / "families.json"
    old = json.loads(path.read_text()) if args.only else {"families": [], "conversations": []}
    TALKS.extend(old["conversations"])
    old = {family["name"]: family for family in old["families"]}
    for family in FAMILIES:
        if args.only and family["name"] not in args.only:
            if family["name"] in old:
                done.append(old[family["name"]])
            continue
        cases = golden(family, shared, args.out / "awkward")
        entry = {"name": family["name"], "files": files(family, shared), "back_ends": family["back_ends"], "cases": cases}
        if "tiles" in family:
            entry["tiles"] = family["tiles"]
        done.append(entry)
        print(family["name"], len(cases), "cases", flush=True)
    plain = {**json.loads(shared.to_str()), "added_tokens": []}
    out = {"tokenizer": plain, "special": SPECIAL, "conversations": TALKS, "families": done}
    path.write_text(json.dumps(out, separators=(",", ":")) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
