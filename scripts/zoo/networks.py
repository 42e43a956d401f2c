"""Small random-weight networks: width 64, 8 layers, vocabulary 640, seeds fixed.

Each row of `TEXT` and `VISION` builds one network. Weights are scaled so that deleting one layer changes the
logits by about 1 and a comparison detects a wrong removal.
"""
import copy

import torch
from torch import nn
from transformers import (
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    Idefics3VisionConfig,
    LlamaConfig,
    Lfm2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

LAYERS = 8
SIZES = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def llama():
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def llama_tied():
    """The head is the embedding table."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"tie_word_embeddings": True})))


def qwen2():
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}))


def qwen3():
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def phi3():
    from transformers import Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}))


def gemma3():
    """Three sliding layers, then a global one, twice; the window is shorter than the test sequence."""
    from transformers import Gemma3ForCausalLM

    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=kinds, query_pre_attn_scalar=16)
    return Gemma3ForCausalLM(config)


def qwen3_moe():
    """Experts in every second layer, a plain feed-forward part in the others."""
    from transformers import Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        mlp_only_layers=[0, 4],
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config)


def gpt_oss():
    from transformers import GptOssForCausalLM

    config = GptOssConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 4,
    )
    return GptOssForCausalLM(config)


def lfm2():
    """Short convolutions with a state, attention in three of eight layers."""
    from transformers import Lfm2ForCausalLM

    kinds = ["conv", "full_attention", "conv", "conv", "full_attention", "conv", "full_attention", "conv"]
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
    config = Lfm2Config(**sizes, layer_types=kinds, conv_L_cache=3, block_auto_adjust_ff_dim=False)
    return Lfm2ForCausalLM(config)


def paligemma():
    """PaliGemma's text part, as its decoder is exported: Gemma, whose query heads share one key head."""
    from transformers import GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**(SIZES | {"num_key_value_heads": 1})))


def llava_onevision():
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(text_config=qwen2().config, vision_config=SiglipVisionConfig(**VISION_SIZES))
    return LlavaOnevisionForConditionalGeneration(config)


def internvl():
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

    vision = InternVLVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=[32, 32],
        patch_size=[8, 8],
    )
    config = InternVLConfig(text_config=qwen3().config, vision_config=vision, image_token_id=600)
    return InternVLForConditionalGeneration(config)


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {k: v for k, v in SIZES.items() if k not in ("head_dim", "tie_word_embeddings")}
    config = Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen_text(**more):
    """Text settings of the Qwen vision-language families: rotary positions in three rows."""
    text = {k: v for k, v in SIZES.items() if k != "tie_word_embeddings"}
    rotary = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    return text | {"rope_parameters": rotary} | more


def qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {k: v for k, v in _qwen_text().items() if k != "head_dim"}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


def qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = QWEN3_VISION | {"depth": 4, "deepstack_visual_indexes": [0, 1, 2]}
    config = Qwen3VLConfig(text_config=_qwen_text(), vision_config=vision, tie_word_embeddings=False)
    return Qwen3VLForConditionalGeneration(config)


def qwen3_vl_deepstack():
    """With image features added behind the first three layers, at the places of a mask."""
    model = qwen3_vl()
    model.deepstack = 3
    return model


def qwen3_vl_added():
    """The same with features for every place, zero where there is text: a plain addition."""
    model = qwen3_vl_deepstack()
    model.model.language_model._deepstack_process = _add
    return model


def _add(hidden_states, _, features):
    return hidden_states + features


def qwen3_vl_moe():
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    vision = QWEN3_VISION | {"depth": 4, "deepstack_visual_indexes": [0, 1, 2]}
    config = Qwen3VLMoeConfig(text_config=_qwen_text(**experts), vision_config=vision, tie_word_embeddings=False)
    return Qwen3VLMoeForConditionalGeneration(config)


def smolvlm():
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    text = llama().config.to_dict() | {"model_type": "llama"}
    vision = VISION_SIZES | {"num_hidden_layers": 2}
    config = SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=600, scale_factor=2)
    return SmolVLMForConditionalGeneration(config)


def idefics3_vl():
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    text = llama().config.to_dict() | {"model_type": "llama"}
    vision = VISION_SIZES | {"num_hidden_layers": 2}
    config = Idefics3Config(text_config=text, vision_config=vision, image_token_id=600, scale_factor=2)
    return Idefics3ForConditionalGeneration(config)


def llava():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**(VISION_SIZES | {"num_hidden_layers": 2}))
    config = LlavaConfig(text_config=llama().config, vision_config=vision, image_token_index=600)
    return LlavaForConditionalGeneration(config)


def gemma3_vl():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    config = Gemma3Config(
        text_config=gemma3().config,
        vision_config=SiglipVisionConfig(**(VISION_SIZES | {"num_hidden_layers": 2})),
        mm_tokens_per_image=4,
        image_token_index=600,
        boi_token_index=601,
        eoi_token_index=602,
    )
    return Gemma3ForConditionalGeneration(config)


def phi():
    """Attention and feed-forward part side by side on one norm."""
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}))


def qwen3_5():
    """Three gated delta-rule layers, then an attention layer, twice."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        **SIZES,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_conv_kernel_dim=4,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
    )
    return Qwen3_5ForCausalLM(config)


def causal(family, without=(), **settings):
    """A builder of a causal language model by the first word of its class names in transformers."""

    def build():
        import transformers

        sizes = {key: value for key, value in SIZES.items() if key not in without}
        config = getattr(transformers, family + "Config")(**(sizes | settings))
        return getattr(transformers, family + "ForCausalLM")(config)

    return build


WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Families that differ from those above in where norms, scales, windows or experts stand.
CAUSAL = {
    "mistral": causal("Mistral", sliding_window=4),
    "mixtral": causal("Mixtral", sliding_window=None, num_local_experts=4, num_experts_per_tok=2),
    "ministral": causal("Ministral", **WINDOWS),
    "gemma": causal("Gemma"),
    "gemma2": causal("Gemma2", query_pre_attn_scalar=16, **WINDOWS),
    "olmo": causal("Olmo", without=["head_dim"], clip_qkv=2.0),
    "olmo2": causal("Olmo2", without=["head_dim"]),
    "olmo3": causal("Olmo3", without=["head_dim"], **WINDOWS),
    "olmoe": causal("Olmoe", without=["head_dim"], num_experts=4, num_experts_per_tok=2),
    "cohere": causal("Cohere", without=["head_dim"]),
    "cohere2": causal("Cohere2", without=["head_dim"], **WINDOWS),
    "granite": causal("Granite", residual_multiplier=0.5, attention_multiplier=0.3, embedding_multiplier=2.0),
    "granite_moe": causal("GraniteMoe", residual_multiplier=0.5, num_local_experts=4, num_experts_per_tok=2),
    "starcoder2": causal("Starcoder2", without=["head_dim"], use_bias=True),
    "stablelm": causal("StableLm", without=["head_dim"], partial_rotary_factor=0.5, use_qkv_bias=True),
    "stablelm_parallel": causal("StableLm", without=["head_dim"], use_parallel_residual=True),
    "smollm3": causal("SmolLM3", no_rope_layers=[1, 1, 1, 0] * 2),
    "glm": causal("Glm"),
    "glm4": causal("Glm4"),
    "nemotron": causal("Nemotron"),
    "persimmon": causal("Persimmon", without=["head_dim", "num_key_value_heads"]),
    "gpt_neox": causal("GPTNeoX", without=["head_dim", "num_key_value_heads"]),
    "gpt_neox_serial": causal("GPTNeoX", without=["head_dim", "num_key_value_heads"], use_parallel_residual=False),
    "falcon": causal("Falcon", without=["head_dim", "num_key_value_heads"], multi_query=False),
    "helium": causal("Helium"),
    "arcee": causal("Arcee"),
    "apertus": causal("Apertus"),
    "ernie4_5": causal("Ernie4_5"),
    "exaone4": causal("Exaone4", **WINDOWS),
    "seed_oss": causal("SeedOss"),
    "hunyuan": causal("HunYuanDenseV1"),
    "qwen2_moe": causal("Qwen2Moe", without=["head_dim"], num_experts=4, shared_expert_intermediate_size=64, **EXPERTS),
    "dots1": causal("Dots1", n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=2, **EXPERTS),
    "glm4_moe": causal("Glm4Moe", n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=2, **EXPERTS),
    "diffllama": causal("DiffLlama"),
    "bitnet": causal("BitNet"),
    "phimoe": causal("Phimoe", num_local_experts=4, num_experts_per_tok=2),
}


VISION_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


QWEN3_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 8,
    "num_position_embeddings": 64,
}


def siglip():
    from transformers import SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**VISION_SIZES, vision_use_head=False))


def clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**VISION_SIZES))


def idefics3():
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

    return Idefics3VisionTransformer(Idefics3VisionConfig(**VISION_SIZES))


def smolvlm_vision():
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

    return SmolVLMVisionTransformer(SmolVLMVisionConfig(**VISION_SIZES))


def internvl_vision():
    """Layer scales on both branches."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    sizes = VISION_SIZES | {"image_size": [32, 32], "patch_size": [8, 8]}
    return InternVLVisionModel(InternVLVisionConfig(**sizes, use_absolute_position_embeddings=True))


def qwen2_vl_vision():
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    sizes = {"depth": LAYERS, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4, "patch_size": 8}
    return Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**sizes))


def qwen2_5_vl_vision():
    """Attention in windows, over everything in layers 3 and 7."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    sizes = {"depth": LAYERS, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64}
    config = Qwen2_5_VLVisionConfig(**sizes, patch_size=8, window_size=32, fullatt_block_indexes=[3, 7])
    return Qwen2_5_VisionTransformerPretrainedModel(config)


def qwen3_vl_vision():
    """Features leave behind layers 1, 3 and 5."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(**QWEN3_VISION, depth=LAYERS, deepstack_visual_indexes=[1, 3, 5])
    return Qwen3VLVisionModel(config)


TEXT = {
    builder.__name__: builder
    for builder in (
        llama,
        llama_tied,
        qwen2,
        qwen3,
        phi3,
        gemma3,
        qwen3_moe,
        gpt_oss,
        lfm2,
        paligemma,
        llava_onevision,
        internvl,
        qwen2_5_vl,
        qwen2_vl,
        qwen3_vl,
        qwen3_vl_deepstack,
        qwen3_vl_added,
        qwen3_vl_moe,
        smolvlm,
        idefics3_vl,
        llava,
        gemma3_vl,
        phi,
        qwen3_5,
    )
} | CAUSAL
VISION = {
    builder.__name__: builder
    for builder in (
        siglip,
        clip,
        idefics3,
        smolvlm_vision,
        internvl_vision,
        qwen2_vl_vision,
        qwen2_5_vl_vision,
        qwen3_vl_vision,
    )
}


def build(name, seed=7):
    """The network by name, in f32 and evaluation mode, every parameter filled."""
    torch.manual_seed(seed)
    model = (TEXT | VISION)[name]().float().eval()
    fill(model, seed)
    return model


@torch.no_grad()
def fill(model, seed):
    """Random values for every parameter: some initialisers leave zeros, and zeros compare nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            centre = 0.0 if "emma" in type(model).__name__ else 1.0
            parameter.copy_(centre + 0.1 * noise)
        elif "embed" in name:
            parameter.copy_(noise)
        elif parameter.ndim >= 2:
            fan_in = parameter[0].numel() if parameter.ndim != 3 else max(parameter.shape[1:])
            parameter.copy_(noise * fan_in**-0.5)
        else:
            parameter.copy_(0.1 * noise)


def text_model(model):
    """The stack of decoder layers in a causal or a vision-language model."""
    inner = model.model if hasattr(model, "model") else model.base_model
    return getattr(inner, "language_model", getattr(inner, "text_model", inner))


def layers_of(model):
    """The module list of layers, of a text or a vision network."""
    for module in (text_model(model) if hasattr(model, "base_model") else None, model):
        for path in ("layers", "h", "encoder.layers", "vision_model.encoder.layers", "encoder.layer", "blocks"):
            found = module
            for part in path.split("."):
                found = getattr(found, part, None)
            if isinstance(found, nn.ModuleList):
                return found
    raise ValueError(f"no layers in {type(model).__name__}")


def layer_list(text):
    """`2,5` -> [2, 5]."""
    return [int(part) for part in text.split(",") if part]


class Identity(nn.Module):
    def forward(self, hidden_states, *_, **__):
        return hidden_states


def without_layers(model, drop):
    """A copy in which the given layers are deleted, so that each is the identity.

    Where features enter or leave behind a layer by its number, an identity keeps the number.
    """
    pruned = copy.deepcopy(model)
    layers = layers_of(pruned)
    kept = [index for index in range(len(layers)) if index not in drop]
    if hasattr(model, "deepstack") or hasattr(model, "blocks"):
        for index in drop:
            layers[index] = Identity()
        number_layers([layers[index] for index in kept])
        pruned.kept = kept
        return pruned
    chosen = [layers[index] for index in kept]
    del layers[:]
    layers.extend(chosen)
    number_layers(layers)
    configs = {id(m.config): m.config for m in pruned.modules() if getattr(m, "config", None) is not None}
    for config in configs.values():
        if getattr(config, "num_hidden_layers", None) == LAYERS:
            config.num_hidden_layers = len(kept)
        if len(getattr(config, "layer_types", None) or []) == LAYERS:
            config.layer_types = [config.layer_types[index] for index in kept]
    return pruned


def number_layers(layers):
    """Tells each layer its number, by which it finds its cache."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
