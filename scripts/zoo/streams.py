"""Tiny networks with unusual residual streams, and PyTorch's outputs with layers deleted.

Writes NAME.onnx and NAME.npz into `fixtures/streams`; run by hand, in the base environment of the README here.
An npz holds `in.NAME`, and for each set of deleted layers `drop_A_B.OUTPUT` (`nodrop.OUTPUT`: none deleted). For a
graph with two towers, `vision_drop_A_B.OUTPUT` is without layers of its vision tower.

usage: streams.py OUT_DIR [NAME...]
"""
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import transformers
from torch import nn

import after

WIDTH, VOCABULARY = 16, 40
COMMON = dict(
    hidden_size=WIDTH, num_attention_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64,
    attn_implementation="eager",
)
LLAMA = COMMON | dict(num_key_value_heads=1, intermediate_size=24, pad_token_id=0)
VISION = dict(
    hidden_size=WIDTH, intermediate_size=24, num_attention_heads=2, image_size=16, patch_size=8,
    num_hidden_layers=4, attn_implementation="eager",
)


def randomised(model, seed=0):
    """Weights large enough that each layer matters; norms and gates are near one, not at it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if not weight.is_floating_point() or "inv_freq" in name or name.endswith(("_scale", "embed_scale")):
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if "layer_scalar" in name:
                weight.copy_(0.8 + 0.2 * noise.abs())
            elif weight.ndim < 2:
                weight.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise)
            else:
                weight.copy_(noise * 0.8 / weight.shape[-1] ** 0.5)
    return model.eval()


class Calls(nn.Module):
    """A network behind plain tensor inputs and outputs."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs):
        return self.call(self.model, *inputs)


def ids(count=6):
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(1))


def floats(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


class Case:
    """One network: `layers` gives the list that layers are deleted from, `run` its outputs."""

    vision_layers = None
    vision_drops = []

    def __init__(self, model, layers, run, inputs, outputs, drops):
        self.model, self.layers, self.run = model, layers, run
        self.inputs, self.outputs, self.drops = inputs, outputs, drops


class Nothing(nn.Module):
    """A deleted layer: what comes in goes out, and the layers behind it keep their numbers."""

    def __init__(self, layer):
        super().__init__()
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states, *_, **__):
        return hidden_states


def without(layers, drop):
    """Deletes layers in place; gives what puts them back."""
    before = list(layers)
    for number in drop:
        layers[number] = Nothing(layers[number])

    def restore():
        for number in drop:
            layers[number] = before[number]

    return restore


def mask(count=6):
    return torch.ones(1, count, dtype=torch.long)


def opt():
    """A decoder with its norms behind the sums, as OPT 350M."""
    config = transformers.OPTConfig(
        **COMMON, num_hidden_layers=4, ffn_dim=24, do_layer_norm_before=False, word_embed_proj_dim=8, dropout=0.0
    )
    model = randomised(transformers.OPTForCausalLM(config))
    run = lambda m, tokens, places: m(input_ids=tokens, attention_mask=places, use_cache=False).logits
    inputs = {"input_ids": ids(), "attention_mask": mask()}
    return Case(
        model, model.model.decoder.layers, run, inputs, ["logits"],
        [(1,), (0, 2), (3,)],
    )


def bert():
    """An encoder with its norms behind the sums and one behind the embeddings, and two outputs."""
    config = transformers.BertConfig(**COMMON, num_hidden_layers=4, intermediate_size=24)
    model = randomised(transformers.BertModel(config))

    def run(m, tokens):
        out = m(input_ids=tokens)
        return out.last_hidden_state, out.pooler_output

    return Case(
        model, model.encoder.layer, run, {"input_ids": ids()}, ["last_hidden_state", "pooler_output"],
        [(1,), (0, 2), (3,)],
    )


def mllama():
    """Text layers with cross-attention layers between them, gated."""
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    config = MllamaTextConfig(
        **LLAMA, num_hidden_layers=6, cross_attention_layers=[2, 4], rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = randomised(transformers.MllamaForCausalLM(config))

    def run(m, embeds, places, states):
        given = {"inputs_embeds": embeds, "attention_mask": places, "cross_attention_states": states}
        return m(**given, use_cache=False).logits

    inputs = {
        "inputs_embeds": floats(1, 6, WIDTH), "attention_mask": mask(), "cross_attention_states": floats(1, 5, WIDTH)
    }
    return Case(model, model.model.layers, run, inputs, ["logits"], [(1, 5), (2,), (2, 4)])


def gemma4():
    """A scalar that each layer multiplies the stream by, inputs per layer, and layers that read another layer's keys."""
    config = transformers.Gemma4TextConfig(
        **LLAMA | dict(head_dim=8), num_hidden_layers=6, global_head_dim=16, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=2, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    model = randomised(transformers.Gemma4ForCausalLM(config))

    def run(m, embeds, places, per_layer):
        given = {"inputs_embeds": embeds, "attention_mask": places, "per_layer_inputs": per_layer}
        return m(**given, use_cache=False).logits

    inputs = {
        "inputs_embeds": floats(1, 6, WIDTH), "attention_mask": mask(), "per_layer_inputs": floats(1, 6, 6, 4)
    }
    return Case(model, model.model.layers, run, inputs, ["logits"], [(0,), (1,), (4,), (0, 1)])


def gemma3n():
    """Several streams that each layer predicts and corrects, inputs per layer, and layers that read others' keys."""
    config = transformers.Gemma3nTextConfig(
        **LLAMA | dict(head_dim=8), num_hidden_layers=6, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=2, sliding_window=16, laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 3, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 6,
    )
    model = randomised(transformers.Gemma3nForCausalLM(config))

    def run(m, embeds, places, per_layer):
        given = {"inputs_embeds": embeds, "attention_mask": places, "per_layer_inputs": per_layer}
        return m(**given, use_cache=False).logits

    inputs = {
        "inputs_embeds": floats(1, 6, WIDTH), "attention_mask": mask(), "per_layer_inputs": floats(1, 6, 6, 4)
    }
    return Case(model, model.model.layers, run, inputs, ["logits"], [(0,), (1,), (4,), (0, 1)])


def llama(outputs, taps, layers=4):
    config = transformers.LlamaConfig(**LLAMA, num_hidden_layers=layers)
    model = randomised(transformers.LlamaForCausalLM(config))

    def run(m, embeds, places):
        out = m(inputs_embeds=embeds, attention_mask=places, use_cache=False, output_hidden_states=True)
        return (out.logits, *taps(out.hidden_states))

    inputs = {"inputs_embeds": floats(1, 6, WIDTH), "attention_mask": mask()}
    return Case(model, model.model.layers, run, inputs, ["logits", *outputs], [(1,), (0, 3)])


def llama_states():
    """Every hidden state as an output, as `output_hidden_states` gives them."""
    return llama([f"hidden_states.{number}" for number in range(5)], lambda states: states)


def streams_of(layers, call):
    """What `call` gives, and the stream before each layer and behind the last one."""
    found = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: found.append(given[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, __, out: found.append(out)))
    result = call()
    for hook in hooks:
        hook.remove()
    return result, found


def llama_taps():
    """Features of several layers side by side, two hidden states, the last one, and one layer's attention."""
    config = transformers.LlamaConfig(**LLAMA, num_hidden_layers=4)
    model = randomised(transformers.LlamaForCausalLM(config))
    layers = model.model.layers

    def run(m, embeds, places):
        weights = []
        attention = getattr(layers[2], "self_attn", None)
        hook = attention and attention.register_forward_hook(lambda _, __, out: weights.append(out[1]))
        call = lambda: m.model(inputs_embeds=embeds, attention_mask=places, use_cache=False)
        out, streams = streams_of(layers, call)
        if hook:
            hook.remove()
        features = torch.cat([streams[1], streams[2], streams[4]], dim=-1)
        last = out.last_hidden_state
        return m.lm_head(last), last, features, streams[1], streams[3], *weights

    inputs = {"inputs_embeds": floats(1, 6, WIDTH), "attention_mask": mask()}
    outputs = ["logits", "last_hidden_state", "aux_hidden_states", "hidden_states_1", "hidden_states_3", "attentions.2"]
    return Case(model, layers, run, inputs, outputs, [(1,), (3,), (0, 1, 3)])


def clip_taps():
    """A vision tower with features of two layers beside its last."""
    model = randomised(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    layers = model.encoder.layers

    def run(m, pixels):
        out, streams = streams_of(layers, lambda: m(pixels))
        return out.last_hidden_state, streams[1], streams[3]

    outputs = ["image_features", "hidden_states_1", "hidden_states_3"]
    return Case(model, layers, run, {"pixel_values": floats(1, 3, 16, 16)}, outputs, [(0,), (1, 2), (3,)])


def llava():
    """A vision tower and a language model of the same width in one graph."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION).to_dict(),
        text_config=transformers.LlamaConfig(**LLAMA, num_hidden_layers=3).to_dict(),
        image_token_index=1, vision_feature_layer=-1, vision_feature_select_strategy="default",
        attn_implementation="eager",
    )
    model = randomised(transformers.LlavaForConditionalGeneration(config))

    def run(m, tokens, pixels):
        features = m.model.multi_modal_projector(m.model.vision_tower(pixels).last_hidden_state[:, 1:])
        embeds = m.get_input_embeddings()(tokens)
        places = (tokens == 1)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(places, features)
        return m(inputs_embeds=embeds, attention_mask=torch.ones_like(tokens), use_cache=False).logits

    tokens = torch.tensor([[5, 1, 1, 1, 1, 9, 12]])
    inputs = {"input_ids": tokens, "pixel_values": floats(1, 3, 16, 16)}
    case = Case(model, model.model.language_model.layers, run, inputs, ["logits"], [(1,), (0,)])
    case.vision_layers = model.model.vision_tower.encoder.layers
    case.vision_drops = [(1,), (0, 3)]
    return case


CASES = {case.__name__: case for case in (opt, bert, mllama, gemma4, gemma3n, llama_states, llama_taps, clip_taps, llava)}


def make_small(path):
    """Constants folded, and no names but those of inputs and outputs."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    after.noname(path, path)


@torch.no_grad()
def write(name, folder):
    case = CASES[name]()
    module = Calls(case.model, case.run).eval()
    path = folder / f"{name}.onnx"
    torch.onnx.export(
        module, tuple(case.inputs.values()), path, input_names=list(case.inputs), output_names=case.outputs,
        opset_version=17, dynamo=False,
    )
    make_small(path)
    arrays = {f"in.{key}": value for key, value in case.inputs.items()}

    def record(prefix):
        found = module(*case.inputs.values())
        found = found if isinstance(found, tuple) else (found,)
        for number, value in enumerate(found):
            output = case.outputs[number]
            arrays[f"{prefix}.{output}"] = value

    record("nodrop")
    whole = {key: value for key, value in arrays.items() if key.startswith("nodrop")}
    kinds = [("drop", case.layers, case.drops), ("vision_drop", case.vision_layers, case.vision_drops)]
    for word, layers, drops in kinds:
        for drop in drops:
            restore = without(layers, drop)
            prefix = "_".join([word, *map(str, drop)])
            record(prefix)
            restore()
            moved = [float((whole[k] - arrays[k.replace("nodrop", prefix)]).abs().max()) for k in whole if k.replace("nodrop", prefix) in arrays]
            print(name, prefix, "moves the outputs by", [round(m, 3) for m in moved])
    np.savez_compressed(folder / f"{name}.npz", **{key: value.numpy() for key, value in arrays.items()})


def main():
    warnings.filterwarnings("ignore")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or CASES:
        write(name, folder)


if __name__ == "__main__":
    main()
