"""SmolVLM2 and Idefics3: pictures split into tiles that are labelled by row and column, with the whole picture last."""
from transformers import Idefics3Processor, SmolVLMProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

import base
import towers

TEMPLATE = """<|im_start|>
{%- for message in messages -%}
{{ message.role | capitalize }}
{%- if message.content[0].type == 'image' -%}
{{ ':' }}
{%- else -%}
{{ ': ' }}
{%- endif -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
{{ part.text }}
{%- elif part.type == 'image' -%}
{{ '<image>' }}
{%- endif -%}
{%- endfor -%}
{{ '<end_of_utterance>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'Assistant:' }}
{%- endif -%}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<global-img>"]
SPECIAL += ["<end_of_utterance>", *[f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]]
NAMED = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
TOKENS = 4


def row(name, family, seed, tile, patch, images, preprocessor, make):
    import transformers

    tok = base.tokenizer(SPECIAL, eos="<end_of_utterance>", bos="<|im_start|>", pad="<|im_end|>", named=NAMED)
    number = tok.convert_tokens_to_ids
    text = transformers.LlamaConfig(
        **base.TEXT, vocab_size=len(tok), eos_token_id=number("<end_of_utterance>"), pad_token_id=number("<|im_end|>")
    )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": tile,
        "patch_size": patch,
    }
    config = getattr(transformers, family + "Config")(
        text_config=text.to_dict() | {"model_type": "llama"},
        vision_config=vision,
        image_token_id=number("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=number("<|im_end|>"),
    )
    model = base.fill(getattr(transformers, family + "ForConditionalGeneration")(config), seed)
    settings = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": tile},
        "resample": 1,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 4 * tile},
    }
    inner = model.model
    tower = towers.masked_tile_tower(inner.vision_model, inner.connector, patch, tile)
    whole = {"image_seq_len": TOKENS, "processor_class": family + "Processor"}
    preprocessor = settings | preprocessor | {"processor_class": family + "Processor"}
    processor = make(image_processor=images(**settings), tokenizer=tok, image_seq_len=TOKENS, chat_template=TEMPLATE)
    return base.Family(
        name, model, processor, preprocessor, tower, processor_config=whole, nested_images=True
    )


def smolvlm(name="smolvlm"):
    """SmolVLM2: its processor file has settings of a video processor too."""
    video = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 64}}
    preprocessor = {"image_processor_type": "SmolVLMImageProcessor", "video_sampling": video}
    make = lambda **given: SmolVLMProcessor(video_processor=SmolVLMVideoProcessor(), **given)
    return row(name, "SmolVLM", 13, 64, 16, SmolVLMImageProcessorPil, preprocessor, make)


def idefics3(name="idefics3"):
    """The class of Idefics3, SmolVLM and Granite-Docling of 2025."""
    preprocessor = {"image_processor_type": "Idefics3ImageProcessor"}
    return row(name, "Idefics3", 14, 56, 14, Idefics3ImageProcessorPil, preprocessor, Idefics3Processor)


ROWS = [smolvlm, idefics3]
