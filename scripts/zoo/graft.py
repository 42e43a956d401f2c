"""A finetuned twin of two networks of the zoo, for `interlace graft`.

Takes the weights of `llama` and `qwen3_vl` out of the GenAI exporter's graphs (f32, one name for each matrix), gives them
their names in Hugging Face's checkpoints, and checks the network against the zoo's own logits. The twin has every weight
changed by a rule that any language computes to the same bits. Writes `NAME.tuned.npz`: inputs and PyTorch's outputs of the
twin, as expected.py does. With `--lora` it writes an adapter of random numbers made by `peft`, and `NAME.lora.npz`.

usage: graft.py ZOO [--checkpoints FOLDER]      e.g. graft.py fixtures/zoo
"""
import argparse
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

import expected
import networks
import wrappers

# Network: its GenAI graph, the prefix of the text model in the checkpoint, the graph with the embedding table.
NETWORKS = {
    "llama": ("genai/llama-fp32-embeds/model.onnx", "model.", "llama/dyn18-ids.onnx"),
    "qwen3_vl": ("genai/qwen3_vl-fp32-embeds/model.onnx", "model.language_model.", None),
}


def weights(path):
    graph = onnx.load(path).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def checkpoint(zoo, name):
    """Tensors of the text model and the head under Hugging Face's names."""
    path, prefix, embeddings = NETWORKS[name]
    tensors = {}
    for key, value in weights(zoo / path).items():
        if key in ("cos_cache", "sin_cache") or not (key.startswith("model.layers.") or key.startswith(("lm_head", "model.norm"))):
            continue
        key = key.replace(".MatMul", "").replace(".attn.", ".self_attn.").replace("_norm.layernorm.", "_norm.")
        key = key.replace(f"model.layers.{networks.LAYERS}.final_norm_layernorm", "model.norm")
        value = value.T if value.ndim == 2 else value
        key = key.replace("model.", prefix, 1) if key.startswith("model.") else key
        if "qkv_proj" in key:
            heads, keys = 64, 32
            for part, rows in zip(("q", "k", "v"), np.split(value, [heads, heads + keys])):
                tensors[key.replace("qkv", part)] = rows.copy()
        else:
            tensors[key] = value.copy()
    if embeddings:
        found = [value for key, value in weights(zoo / embeddings).items() if key.endswith("embed_tokens.weight")]
        tensors[prefix + "embed_tokens.weight"] = found[0]
    return {key: torch.from_numpy(value.copy()) for key, value in tensors.items()}


def twin(tensors):
    """Each number moved by -8 to 8 parts in 512 of 1, by its place."""
    moved = {}
    for key, value in tensors.items():
        place = torch.arange(value.numel(), dtype=torch.int64)
        step = ((place * 7919) % 17 - 8).to(torch.float32) / 512
        moved[key] = value + step.reshape(value.shape)
    return moved


def network(name):
    model = networks.build(name)
    if name != "qwen3_vl":
        return model
    # The zoo's graphs are of these rotations.
    rotations = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
    model.config.text_config.rope_parameters = rotations
    return type(model)(model.config).eval()


@torch.no_grad()
def logits(model, given):
    main = [torch.from_numpy(given[f"in.{key}"]) for key in ("inputs_embeds", "attention_mask", "position_ids")]
    extra = [torch.from_numpy(given[f"in.{key}"]) for key in wrappers.feature_names(model)]
    return wrappers.Decoder(model)(*main, *extra, *wrappers.empty_states(model))[0].numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--lora", type=Path, help="write an adapter for `llama` into this folder")
    parser.add_argument("--checkpoints", type=Path, help="write base, twin and adapter as checkpoints below this folder")
    args = parser.parse_args()
    for name in NETWORKS:
        model = network(name)
        base = checkpoint(args.zoo, name)
        lost = [key for key in base if key not in model.state_dict()]
        assert not lost, lost
        missing = [key for key in model.state_dict() if key not in base and "visual" not in key]
        print(name, "not in the graphs:", missing)
        given = np.load(args.zoo / "expected" / f"{name}.nodrop.npz")
        model.load_state_dict(base, strict=False)
        print(name, "rebuilt network against the zoo:", np.abs(logits(model, given) - given["exp.logits"]).max())
        assert np.abs(logits(model, given) - given["exp.logits"]).max() < 1e-4
        tuned = twin(base)
        model.load_state_dict(tuned, strict=False)
        arrays = {key: value.numpy() for key, value in expected.decoder(model).items()}
        print(name, "twin moves the logits by", np.abs(logits(model, given) - given["exp.logits"]).max())
        np.savez(args.zoo / "expected" / f"{name}.tuned.npz", **arrays)
        if args.checkpoints:
            from safetensors.torch import save_file

            for kind, tensors in (("base", base), ("tuned", tuned)):
                folder = args.checkpoints / name / kind
                folder.mkdir(parents=True, exist_ok=True)
                save_file(tensors, folder / "model.safetensors")
        if args.lora and name == "llama":
            model.load_state_dict(base, strict=False)
            adapter(model, args.lora, args.zoo / "expected" / f"{name}.lora.npz")


def adapter(model, folder, golden):
    """Rank 4 beside every product of the layers, twice as strong in one kind of them, and a norm trained whole."""
    from peft import LoraConfig, get_peft_model

    products = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=products, alpha_pattern={"up_proj": 12}, modules_to_save=["norm"])
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                value.add_(torch.randn(value.shape, generator=generator) * 0.05)
    adapted.save_pretrained(folder)
    arrays = {key: value.numpy() for key, value in expected.decoder(adapted.merge_and_unload()).items()}
    np.savez(golden, **arrays)


if __name__ == "__main__":
    main()
