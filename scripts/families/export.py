"""Writes a tiny network of each family with onnx-community's layout and file names.

usage: export.py OUT_DIR [NAME...]        default: all families
"""
import argparse
import importlib
import json
import shutil
import time
import traceback
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.export import Dim
from transformers import GenerationConfig

import base
import decoders

MODULES = ["qwen", "llava", "idefics", "internvl", "gemma", "pixtral", "lfm2", "glm", "paddle", "tiles", "gemma4", "gemma3n", "minicpm", "janus"]
KEPT_METADATA = {"namespace", "pkg.torch.onnx.name_scopes"}


def rows(kind="ROWS"):
    """Families by name; of kind `MORE`, those that are no fixtures."""
    modules = [importlib.import_module(module) for module in MODULES]
    return {row.__name__: row for module in modules for row in getattr(module, kind, [])}


class Embed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.table = base.text_model(model).get_input_embeddings()

    def forward(self, input_ids):
        return self.table(input_ids)


class MergingEmbed(Embed):
    """Token embeddings with image features `[N, D]` in the places of the image tokens, as Mobius and GenAI have it."""

    def __init__(self, model):
        super().__init__(model)
        self.image_token = model.config.image_token_id

    def forward(self, input_ids, image_features):
        embeds = self.table(input_ids)
        image = (input_ids == self.image_token).reshape(-1)
        # A row of zeros before the features, so that a prompt without pictures has a row to point at.
        rows = torch.cat([torch.zeros_like(embeds[0, :1]), image_features])
        number = torch.cumsum(image.to(torch.int64), 0) * image.to(torch.int64)
        merged = torch.where(image[:, None], rows[number], embeds.reshape(-1, embeds.shape[-1]))
        return merged.reshape(embeds.shape)


def eager(model):
    """Attention that both exporters follow."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = "eager"
            if hasattr(config, "_experts_implementation"):
                # The loop over chosen experts cannot be traced; products over all of them in one batch can.
                config._experts_implementation = "batched_mm"


def write(module, arguments, path, inputs, outputs, axes, exporter):
    """One graph: TorchScript (`ts17`) or dynamo (`dyn18`) by the names of its dynamic axes."""
    module = module.eval()
    flat = [part for argument in arguments for part in (argument if isinstance(argument, list) else [argument])]
    if exporter == "ts17":
        torch.onnx.export(
            module,
            tuple(flat),
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
        return
    names = iter(inputs)
    shape = lambda: {axis: Dim.DYNAMIC for axis in axes.get(next(names), {})}
    shapes = [tuple(shape() for _ in part) if isinstance(part, list) else shape() for part in arguments]
    program = torch.onnx.export(
        module,
        tuple(flat),
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=tuple(shapes),
        opset_version=int(exporter[3:]),
        dynamo=True,
        verbose=False,
    )
    proto = program.model_proto
    # The exporter's stack traces name files of the machine it ran on.
    graph = proto.graph
    for holder in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        kept = [entry for entry in holder.metadata_props if entry.key in KEPT_METADATA]
        del holder.metadata_props[:]
        holder.metadata_props.extend(kept)
    for value in (*graph.input, *graph.output):
        for axis, name in axes.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.save_model(proto, str(path))


def decoder(family, path):
    module = (family.decoder or decoders.Decoder)(family)
    states = module.empty_states(2, 5)
    places = torch.arange(5, 8)[None].expand(2, 3)
    if family.position_rows > 1:
        places = torch.stack([places // 4, places // 2, places])
    hidden = base.text_model(family.model).config.hidden_size * getattr(module, "parts", 1)
    extras = [extra.example for extra in family.extras]
    tokens = {0: "batch_size", 1: "sequence_length"}
    rows = {places.ndim - 2: "batch_size", places.ndim - 1: "sequence_length"}
    axes = {"inputs_embeds": tokens, "input_ids": tokens, "attention_mask": {0: "batch_size", 1: "total_sequence_length"}}
    result = getattr(module, "result", "logits")
    axes |= {"position_ids": rows, result: tokens} | {extra.name: extra.axes for extra in family.extras}
    names = module.state_names()
    for name, state in zip(names, states):
        past = {0: "batch_size"} | ({2: "past_sequence_length"} if name.endswith(("key", "value")) else {})
        total = {0: "batch_size"} | ({2: "total_sequence_length"} if name.endswith(("key", "value")) else {})
        axes |= {past_name(name): past, present_name(name): total}
    reads = getattr(module, "reads", "inputs_embeds")
    first = torch.randn(2, 3, hidden)
    if reads == "input_ids":
        first = torch.tensor([[family.image_token_id] * 2 + [1]] * 2)
    write(
        module,
        [first, torch.ones(2, 8, dtype=torch.long), places.contiguous(), [*extras, *states]],
        path,
        [reads, "attention_mask", "position_ids", *(e.name for e in family.extras), *map(past_name, names)],
        [result, *map(present_name, names)],
        axes,
        family.decoder_exporter,
    )


def past_name(name):
    return name.replace("conv.", "past_conv.") if name.startswith("conv.") else f"past_key_values.{name}"


def present_name(name):
    return name.replace("conv.", "present_conv.") if name.startswith("conv.") else f"present.{name}"


def embed(family, path):
    merging = family.layout in ("mobius", "genai")
    module = family.embed or (MergingEmbed if merging else Embed)(family.model)
    outputs = getattr(module, "outputs", ["inputs_embeds"])
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in ("input_ids", *outputs)}
    ids, names = torch.ones(2, 5, dtype=torch.long), ["input_ids"]
    arguments = [ids]
    if merging:
        ids[:, 1:3] = family.image_token_id
        arguments.append(torch.randn(4, base.text_model(family.model).config.hidden_size))
        names.append("image_features")
        axes["image_features"] = {0: "num_image_tokens"}
    write(module, arguments, path, names, outputs, axes, "ts17")


def head(family, path):
    """The graph that brings the last hidden state to logits, where it is a file of its own."""
    tokens = {0: "batch_size", 1: "sequence_length"}
    hidden = torch.randn(2, 3, base.text_model(family.model).config.hidden_size)
    write(family.head, [hidden], path, ["hidden_states"], ["logits"], {"hidden_states": tokens, "logits": tokens}, "ts17")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def configs(family, out):
    tok = family.processor.tokenizer
    tok.save_pretrained(out)
    for name in ("chat_template.jinja", "chat_template.json"):
        (out / name).unlink(missing_ok=True)
    if family.processor.chat_template:
        (out / "chat_template.jinja").write_text(family.processor.chat_template)
    if family.preprocessor is not None:
        write_json(out / "preprocessor_config.json", family.preprocessor)
    if family.processor_config is not None:
        write_json(out / "processor_config.json", family.processor_config)
    config = json.loads(family.model.config.to_json_string(use_diff=False))
    config = {key: value for key, value in config.items() if value is not None}
    config["architectures"] = [type(family.model).__name__]
    if family.flat:
        text = config.pop("text_config")
        config = {key: value for key, value in text.items() if key != "model_type"} | config
    write_json(out / "config.json", config | family.config)
    text = family.model.config.get_text_config()
    generation = {"eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id, "max_new_tokens": 16}
    if tok.bos_token_id is not None:
        generation["bos_token_id"] = tok.bos_token_id
    GenerationConfig(**(generation | family.generation)).save_pretrained(out)
    return text


def genai_config(family, files):
    """What ONNX Runtime GenAI's builder writes beside its graphs."""
    text = family.model.config.get_text_config()
    tok = family.processor.tokenizer
    grid = next(name for name in family.tower.inputs if name != "pixel_values")
    same = lambda *names: {name: name for name in names}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": files["decoder"],
        "head_size": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "hidden_size": text.hidden_size,
        "inputs": same("inputs_embeds", "attention_mask", "position_ids")
        | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
    }
    model = {
        "bos_token_id": tok.convert_tokens_to_ids("<|endoftext|>"),
        "context_length": text.max_position_embeddings,
        "decoder": decoder,
        "embedding": {
            "filename": files["embed_tokens"],
            "inputs": same("input_ids", "image_features"),
            "outputs": same("inputs_embeds"),
        },
        "vision": {
            "filename": files["vision_encoder"],
            "inputs": same("pixel_values", grid),
            "outputs": same("image_features"),
            "spatial_merge_size": family.model.config.vision_config.spatial_merge_size,
        },
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        "image_token_id": family.image_token_id,
        "type": family.model.config.model_type,
        "vocab_size": text.vocab_size,
    }
    return {"model": model, "search": {"do_sample": False, "max_length": text.max_position_embeddings}}


FILES = {
    "transformers.js": {
        "vision_encoder": "onnx/vision_encoder.onnx",
        "embed_tokens": "onnx/embed_tokens.onnx",
        "decoder": "onnx/decoder_model_merged.onnx",
    },
    "mobius": {
        "vision_encoder": "vision_encoder/model.onnx",
        "embed_tokens": "embedding/model.onnx",
        "decoder": "decoder/model.onnx",
    },
    "genai": {"vision_encoder": "vision.onnx", "embed_tokens": "embedding.onnx", "decoder": "model.onnx"},
    "prepare_inputs_embeds": {
        "embed_tokens": "onnx/prepare_inputs_embeds.onnx",
        "decoder": "onnx/language_model.onnx",
        "head": "onnx/lm_head.onnx",
    },
    "transformers-exporter": {
        "vision_encoder": "image_encoder.onnx",
        "projector": "multi_modal_projector.onnx",
        "embed_tokens": "embed_tokens.onnx",
        "decoder": "decoder.onnx",
    },
    "single": {"decoder": "model.onnx"},
}
# Components of `export.json` by what they are here.
NAMED = {
    "vision_encoder": "image_encoder",
    "projector": "multi_modal_projector",
    "embed_tokens": "embed_tokens",
    "decoder": "decoder",
}


def export(row, out):
    family = row()
    shutil.rmtree(out, ignore_errors=True)
    files = FILES[family.layout]
    for file in files.values():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
    configs(family, out)
    if family.layout == "genai":
        write_json(out / "genai_config.json", genai_config(family, files))
    if family.layout == "transformers-exporter":
        write_json(out / "export.json", {"components": {NAMED[key]: {"file": file} for key, file in files.items()}})
    eager(family.model)
    with torch.no_grad():
        if "vision_encoder" in files:
            part(family.tower, out / files["vision_encoder"])
        if "projector" in files:
            part(family.projector, out / files["projector"])
        if family.layout == "prepare_inputs_embeds":
            part(family.tower, out / files["embed_tokens"])
            head(family, out / files["head"])
        elif "embed_tokens" in files:
            embed(family, out / files["embed_tokens"])
        decoder(family, out / files["decoder"])


def part(tower, path):
    """A graph with the inputs and outputs that a tower names."""
    write(
        tower.module, list(tower.inputs.values()), path, list(tower.inputs), tower.outputs, tower.axes, tower.exporter
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    table = rows()
    every = table | rows("MORE")
    for name in args.names or table:
        start = time.time()
        try:
            export(every[name], args.out / name)
            size = sum(path.stat().st_size for path in (args.out / name).rglob("*") if path.is_file())
            print(f"{name}\tok\t{size} bytes\t{time.time() - start:.0f} s", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(f"{name}\tfailed: {type(error).__name__}", flush=True)


if __name__ == "__main__":
    main()
