"""PyTorch's outputs with layers deleted, as `EXPECTED/NAME.drop_A_B.npz` and `EXPECTED/NAME.nodrop.npz`.

An npz holds `in.NAME` (prefill inputs), `exp.NAME` (prefill outputs), `in2.NAME` (inputs of one cached step, whose past
comes from the graph's own prefill) and `exp2.logits`. Vision networks: `in.pixel_values` and `exp.image_features`.

usage: expected.py OUT_DIR NAME...
"""
import argparse
from pathlib import Path

import numpy as np
import torch

import networks
import wrappers

DROPS = [(), (2, 5), (0, 7), (3,), (0, 1, 2, 3)]


@torch.no_grad()
def decoder(model):
    prefill, step = wrappers.inputs(model)
    module = wrappers.Decoder(model)
    arrays = {f"in.{key}": value for key, value in prefill.items()} | {f"in2.{key}": v for key, v in step.items()}
    extra = lambda inputs: [inputs[name] for name in wrappers.feature_names(model)]
    main = lambda inputs: [inputs[name] for name in ("inputs_embeds", "attention_mask", "position_ids")]
    logits, *states = module(*main(prefill), *extra(prefill), *wrappers.empty_states(model))
    arrays["exp.logits"] = logits
    names = [name for layer in wrappers.state_names(model) for name in layer]
    arrays |= {f"exp.present.{name}": state for name, state in zip(names, states)}
    arrays["exp2.logits"] = module(*main(step), *extra(step), *states)[0]
    return arrays


@torch.no_grad()
def recurrent(model):
    """Networks whose states only their own cache holds: logits without the states."""
    from transformers.cache_utils import DynamicCache

    prefill, step = wrappers.inputs(model)
    arrays = {f"in.{key}": value for key, value in prefill.items()} | {f"in2.{key}": v for key, v in step.items()}
    cache = DynamicCache(config=model.config)
    for prefix, inputs in (("exp", prefill), ("exp2", step)):
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
        arrays[f"{prefix}.logits"] = model(**given, past_key_values=cache, use_cache=True).logits
    return arrays


@torch.no_grad()
def encoder(model):
    pixels = wrappers.pixels(model, 1)
    found = wrappers.Encoder(model)(pixels)
    found = found if isinstance(found, tuple) else (found,)
    names = wrappers.encoder_outputs(model)
    return {"in.pixel_values": pixels} | {f"exp.{name}": value for name, value in zip(names, found)}


def write(name, folder):
    """Writes the expected values of one network for every drop set."""
    model = networks.build(name)
    make = encoder if name in networks.VISION else recurrent if name == "qwen3_5" else decoder
    # The inputs are those of the whole network: deleting layers does not touch the embeddings.
    for drop in DROPS:
        arrays = make(networks.without_layers(model, drop))
        suffix = "drop_" + "_".join(map(str, drop)) if drop else "nodrop"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{name}.{suffix}.npz", **{key: value.numpy() for key, value in arrays.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    args = parser.parse_args()
    for name in args.names:
        write(name, args.out)
        print(name, flush=True)


if __name__ == "__main__":
    main()
