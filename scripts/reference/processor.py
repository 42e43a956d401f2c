"""Writes fixtures/data/processor.json: what Pillow and Hugging Face transformers make of small pictures and templates.

Needs pillow, numpy, torch, jinja2 and transformers 5.23. Run from the repository root:

    python scripts/reference/processor.py
"""

import base64
import hashlib
import io
import json
import pathlib

import numpy as np
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.chat_template_utils import render_jinja_template


_resize = Image.Image.resize


def resize(image, size, resample=None, box=None, reducing_gap=None):
    """Horizontal pass, then vertical pass, which every Pillow up to 12 does; 13 sometimes turns the order round."""
    assert box is None and reducing_gap is None
    return _resize(_resize(image, (size[0], image.size[1]), resample), size, resample)


Image.Image.resize = resize


def picture(width, height, channels=3):
    """Noise over a gradient; the test makes the same bytes."""
    index = np.arange(width * height * channels, dtype=np.uint64)
    noise = (index * 2654435761 % 2**32) >> 24
    row = index // (width * channels)
    return ((noise // 4 + row * 3 + index % channels * 40) % 256).astype(np.uint8).reshape(height, width, channels)


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def resizes():
    sizes = [(40, 30, 17, 13), (17, 13, 40, 30), (64, 48, 64, 20), (64, 48, 20, 48), (31, 7, 90, 91), (5, 5, 1, 1), (1, 1, 7, 3), (200, 3, 9, 9), (3, 100, 2, 64), (10, 100, 7, 64)]
    for number in [1, 2, 3, 4, 5]:
        for width, height, to_width, to_height in sizes:
            out = Image.fromarray(picture(width, height)).resize((to_width, to_height), resample=number)
            yield {"from": [width, height], "to": [to_width, to_height], "resample": number, "sha256": sha(np.array(out))}


def processors():
    idefics = [
        {},
        {"do_image_splitting": False, "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 64}},
        {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}},
        {"size": {"longest_edge": 200}, "max_image_size": {"longest_edge": 64}, "resample": 3, "do_normalize": False},
        {"size": {"height": 70, "width": 50}, "max_image_size": {"longest_edge": 32}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"do_resize": False, "max_image_size": {"longest_edge": 48}, "rescale_factor": 0.01},
    ]
    for settings in idefics:
        for width, height in [(64, 64), (150, 90), (33, 50), (100, 3), (3, 100), (97, 96)]:
            if settings == {} and width != 150:
                continue
            result = Idefics3ImageProcessorPil(**settings)(Image.fromarray(picture(width, height)), return_row_col_info=True)
            values = np.array(result["pixel_values"])[0]
            assert np.array(result["pixel_attention_mask"]).all()
            yield {
                "config": {"image_processor_type": "Idefics3ImageProcessor", **settings},
                "size": [width, height],
                "shape": list(values.shape),
                "sha256": sha(values),
                "rows": result["rows"][0][0],
                "columns": result["cols"][0][0],
            }
    qwen = [
        {"min_pixels": 3136, "max_pixels": 50176},
        {"size": {"shortest_edge": 784, "longest_edge": 50176}, "patch_size": 14},
        {"patch_size": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"shortest_edge": 1024, "longest_edge": 4096}},
    ]
    for settings in qwen:
        for width, height in [(64, 64), (150, 90), (20, 50), (400, 300)]:
            result = Qwen2VLImageProcessorPil(**settings)(Image.fromarray(picture(width, height)))
            values = np.array(result["pixel_values"])
            yield {
                "config": {"image_processor_type": "Qwen2VLImageProcessor", **settings},
                "size": [width, height],
                "shape": list(values.shape),
                "sha256": sha(values),
                "grid": [int(x) for x in result["image_grid_thw"][0]],
            }


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def files():
    rgb, rgba = Image.fromarray(picture(9, 7)), Image.fromarray(picture(9, 7, 4), "RGBA")
    palette = rgb.quantize(7)
    exif = Image.Exif()
    exif[0x0112] = 6
    flat = Image.new("RGB", (16, 8), (200, 30, 90))
    wide = Image.fromarray((np.arange(63, dtype=np.uint16) * 1040).reshape(7, 9))
    cases = {
        "rgb.png": encoded(rgb, "PNG"),
        "rgba.png": encoded(rgba, "PNG"),
        "grey.png": encoded(rgb.convert("L"), "PNG"),
        "grey-alpha.png": encoded(rgba.convert("LA"), "PNG"),
        "bits.png": encoded(rgb.convert("1"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "palette-transparent.png": encoded(palette, "PNG", transparency=2),
        "rgb-key.png": encoded(flat, "PNG", transparency=(200, 30, 90)),
        "rgba.webp": encoded(rgba, "WEBP", lossless=True, exact=True),
        "rgb.bmp": encoded(rgb, "BMP"),
        "rgb.tiff": encoded(rgb, "TIFF"),
        "palette.gif": encoded(palette, "GIF"),
        "flat.jpeg": encoded(flat, "JPEG", quality=95),
        "turned.png": encoded(rgb, "PNG", exif=exif),
    }
    for name, data in cases.items():
        image = Image.open(io.BytesIO(data))
        if image.getexif().get(0x0112) is not None:
            from PIL import ImageOps

            image = ImageOps.exif_transpose(image)
        array = convert_to_rgb(image, return_numpy=True)
        yield {"name": name, "base64": base64.b64encode(data).decode(), "size": [array.shape[1], array.shape[0]], "sha256": sha(array)}


SMOLVLM = "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
QWEN = "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
LLAVA = """{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PLAIN = """{%- for message in messages %}
    {%- if message.content is not string %}
        {%- set text = message.content | map(attribute='text') | select('defined') | join(' ') %}
    {%- else %}
        {%- set text = message.content.strip() %}
    {%- endif %}
    {{- '[' ~ message.role.upper() ~ ' ' ~ loop.index ~ '/' ~ loop.length ~ '] ' ~ text ~ (eos_token if message.role == 'assistant' else '') }}
    {%- if not loop.last %}{{ '\\n' }}{% endif %}
{%- endfor %}
  {% if add_generation_prompt %}
    {{ '[ASSISTANT] ' }}
  {% endif %}
{{ messages[0] | tojson }}{{ messages | length }}{{ [1, 2.5, true, none, 'a"<'] | tojson }}
"""


def templates():
    image, ask = {"type": "image"}, {"type": "text", "text": " What <b>is</b> 'it'? "}
    conversations = [
        [{"role": "user", "content": [image, ask]}],
        [{"role": "user", "content": [ask]}, {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}],
        [
            {"role": "user", "content": [image, image, ask]},
            {"role": "assistant", "content": [{"type": "text", "text": "a\ncat"}]},
            {"role": "user", "content": [ask, image]},
        ],
    ]
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    for name, template in [("smolvlm", SMOLVLM), ("qwen2-vl", QWEN), ("gemma3", GEMMA), ("llava-onevision", LLAVA), ("plain", PLAIN)]:
        for messages in conversations:
            for prompt in [True, False]:
                rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt, **tokens)
                yield {"name": name, "template": template, "messages": messages, "add_generation_prompt": prompt, "tokens": tokens, "rendered": rendered[0]}


if __name__ == "__main__":
    content = {
        "resizes": list(resizes()),
        "processors": list(processors()),
        "files": list(files()),
        "templates": list(templates()),
    }
    path = pathlib.Path("fixtures/data/processor.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(path, path.stat().st_size, "bytes")
