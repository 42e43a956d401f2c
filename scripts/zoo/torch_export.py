"""torch.onnx exports: TorchScript at opset 17 (`ts17`) and dynamo at opset 18 or 23 (`dyn18`, `dyn23`).

usage: torch_export.py OUT_DIR EXPORTER NAME... [--drop 2,5]      EXPORTER is ts17, dyn18 or dyn23; a name may end in -ids
"""
import argparse
import traceback
import warnings
from pathlib import Path

import torch
from torch.export import Dim

import networks
import wrappers


def attention(model, kind):
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config._attn_implementation = kind
            if hasattr(module.config, "_experts_implementation"):
                # The loop over chosen experts cannot be traced; products over all of them in one batch can.
                module.config._experts_implementation = "batched_mm"


def feature_inputs(model):
    """Names, dynamic axes and values of the image features that enter between layers."""
    names = wrappers.feature_names(model)
    axes, values = [], []
    for name in names:
        if name == "visual_pos_masks":
            axes.append({0: "batch", 1: "sequence"})
            values.append(torch.tensor([[True, False, True], [False, True, True]]))
        elif "visual_pos_masks" in names:
            axes.append({0: "places"})
            values.append(torch.randn(4, 64))
        else:
            axes.append({0: "batch", 1: "sequence"})
            values.append(torch.randn(2, 3, 64))
    return names, axes, values


def decoder(name, exporter, path, drop):
    ids = name.endswith("-ids")
    model = networks.without_layers(networks.build(name.removesuffix("-ids")), drop)
    attention(model, "sdpa" if exporter == "dyn23" and not name.startswith("gpt_oss") else "eager")
    module = wrappers.Decoder(model, ids)
    names = [part for layer in wrappers.state_names(model) for part in layer]
    states = wrappers.empty_states(model, batch=2, past=5)
    features, feature_axes, values = feature_inputs(model)
    states = [*values, *states]
    tokens = torch.randint(3, 600, (2, 3)) if ids else torch.randn(2, 3, 64)
    places = wrappers.positions(model, 5, 3)
    places = places.expand(*places.shape[:-2], 2, 3).contiguous()
    arguments = (tokens, torch.ones(2, 8, dtype=torch.long), places)
    first = "input_ids" if ids else "inputs_embeds"
    past = [f"past_key_values.{part}" for part in names]
    present = [f"present.{part}" for part in names]
    symbols = {key: Dim.DYNAMIC for key in ("batch", "sequence", "total", "past", "places")}
    token_axes = {0: "batch", 1: "sequence"}
    row_axes = {places.ndim - 2: "batch", places.ndim - 1: "sequence"}
    state_axes = [{0: "batch"} if part.endswith("conv") else {0: "batch", 2: "past"} for part in names]
    extra = dict(zip(features, feature_axes))
    if exporter == "ts17":
        axes = extra | {first: token_axes, "attention_mask": {0: "batch", 1: "total"}, "position_ids": row_axes}
        axes |= dict(zip(past, state_axes))
        axes |= {part: {k: "total" if k == 2 else v for k, v in a.items()} for part, a in zip(present, state_axes)}
        axes["logits"] = token_axes
        torch.onnx.export(
            module,
            (*arguments, *states),
            path,
            input_names=[first, "attention_mask", "position_ids", *features, *past],
            output_names=["logits", *present],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
        return
    dims = lambda axes: {axis: symbols[name] for axis, name in axes.items()}
    torch.onnx.export(
        module,
        (*arguments, *states),
        path,
        input_names=[first, "attention_mask", "position_ids", *features, *past],
        output_names=["logits", *present],
        dynamic_shapes=(
            dims(token_axes),
            dims({0: "batch", 1: "total"}),
            dims(row_axes),
            tuple(dims(a) for a in [*feature_axes, *state_axes]),
        ),
        opset_version=int(exporter[3:]),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def encoder(name, exporter, path, drop):
    model = networks.without_layers(networks.build(name), drop)
    attention(model, "eager" if exporter == "ts17" else "sdpa")
    shared = {"input_names": ["pixel_values"], "output_names": wrappers.encoder_outputs(model)}
    pixels = wrappers.pixels(model, 2)
    fixed = wrappers.Encoder(model).patches
    if exporter == "ts17":
        axes = {} if fixed else {"pixel_values": {0: "batch"}, "image_features": {0: "batch"}}
        torch.onnx.export(
            wrappers.Encoder(model), (pixels,), path, dynamic_axes=axes, opset_version=17, dynamo=False, **shared
        )
    else:
        torch.onnx.export(
            wrappers.Encoder(model),
            (pixels,),
            path,
            dynamic_shapes=({} if fixed else {0: Dim.DYNAMIC},),
            opset_version=int(exporter[3:]),
            dynamo=True,
            external_data=False,
            verbose=False,
            **shared,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("exporter", choices=["ts17", "dyn18", "dyn23"])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--drop", type=networks.layer_list, default=[], help="layers that the network goes without")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        export = encoder if name in networks.VISION else decoder
        path = args.out / f"{name}.{args.exporter}.onnx"
        try:
            with torch.no_grad():
                export(name, args.exporter, str(path), args.drop)
            print(f"{path.name}\tok", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(f"{path.name}\tfailed: {type(error).__name__}", flush=True)


if __name__ == "__main__":
    main()
