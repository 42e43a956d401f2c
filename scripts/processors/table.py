"""The families of `families.py`: classes, settings and templates in each family's published form."""

BOTH = ["pil", "torchvision"]
PIXELS = {"pixel_values": "float"}
GRID = {"pixel_values": "float", "image_grid_thw": "int"}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<img>", "</img>", "<IMG_CONTEXT>",
           "<video>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "[INST]", "[/INST]",
           "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>",
           "<|end_of_video|>", "<|user|>", "<|assistant|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|image_start|>",
           "<|image_end|>", "<|img_thumbnail|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE",
           "TILE_GLOBAL", "<audio_soft_token>", "<start_of_audio>", "<end_of_audio>",
           *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
           *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 11) for column in range(1, 11) if row * column <= 10),
           *(f"TILE_{n}" for n in range(1, 13)), "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>", "<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>",
           "<IMG_COL>", "<IMG_ROW>", "<IMG_END>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>", "<image_placeholder>",
           "<begin_of_image>", *(f"<row_{row}_col_{column}>" for row in range(1, 17) for column in range(1, 17) if max(row, column) > 6)]


def chat(user, assistant, image, end, prompt, begin="", trim=False):
    """A template of the usual form: a head for each role, pictures as tokens, texts as they are."""
    text = "{{ part['text'] | trim }}" if trim else "{{ part['text'] }}"
    return (f"{begin}{{% for message in messages %}}{{% if message['role'] == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + image +
            "{% else %}" + text + "{% endif %}{% endfor %}" + end +
            "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}")


CHATML = lambda image: chat("<|im_start|>user\n", "<|im_start|>assistant\n", image, "<|im_end|>\n", "<|im_start|>assistant\n")
VICUNA = chat("USER: ", "ASSISTANT: ", "<image>\n", " ", "ASSISTANT:")
GEMMA = lambda image: chat("<start_of_turn>user\n", "<start_of_turn>model\n", image, "<end_of_turn>\n", "<start_of_turn>model\n",
                           begin="{{ bos_token }}", trim=True)
GLM = chat("<|user|>\n", "<|assistant|>\n", "<|begin_of_image|><|image|><|end_of_image|>", "", "<|assistant|>\n")
MISTRAL = chat("[INST]", "", "[IMG]", "{% if message['role'] == 'user' %}[/INST]{% else %}{{ eos_token }}{% endif %}", "", begin="{{ bos_token }}")
SMOLVLM = ("<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == 'image' %}"
           "{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
           "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
           "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
BASICS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
QWEN_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
               "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
GEMMA_TOKENS = {**BASICS, "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
# PaliGemma's processor writes the prompt itself, around what is asked.
PALIGEMMA = lambda names, messages: "<image>" * len(names) + "".join(part.get("text", "") for part in messages[0]["content"])
QWEN = {"video": ("qwen2_vl", "Qwen2VLVideoProcessor"), "processor": {}, "tokens": QWEN_TOKENS, "feature": "<|image_pad|>", "arrays": GRID,
        "template": CHATML("<|vision_start|><|image_pad|><|vision_end|>"), "back_ends": BOTH}

FAMILIES = [
    {**QWEN, "name": "qwen2_vl", "image_class": ("qwen2_vl", "Qwen2VLImageProcessor"), "processor_class": ("qwen2_vl", "Qwen2VLProcessor"),
     "image": {"min_pixels": 3136, "max_pixels": 200704, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, **CLIP},
     "template_in": "chat_template.json"},
    {**QWEN, "name": "qwen3_vl", "image_class": ("qwen2_vl", "Qwen2VLImageProcessor"), "processor_class": ("qwen3_vl", "Qwen3VLProcessor"),
     "video": ("qwen3_vl", "Qwen3VLVideoProcessor"), "layout": "nested",
     "image": {"size": {"shortest_edge": 65536, "longest_edge": 262144}, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, **HALVES}},
    {"name": "idefics3", "image_class": ("idefics3", "Idefics3ImageProcessor"), "processor_class": ("idefics3", "Idefics3Processor"),
     "image": {"size": {"longest_edge": 364}, "max_image_size": {"longest_edge": 91}, "do_image_splitting": True, "resample": 1, **HALVES},
     "processor": {"image_seq_len": 9}, "back_ends": ["pil"], "feature": "<image>", "arrays": {**PIXELS, "pixel_attention_mask": "bool"},
     "tokens": {"eos_token": "<end_of_utterance>", "pad_token": "<pad>", "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
                "global_image_token": "<global-img>"}, "template": SMOLVLM, "layout": "both", "padded": True},
    {"name": "smolvlm", "image_class": ("smolvlm", "SmolVLMImageProcessor"), "processor_class": ("smolvlm", "SmolVLMProcessor"),
     "video": ("smolvlm", "SmolVLMVideoProcessor"),
     "image": {"size": {"longest_edge": 512}, "max_image_size": {"longest_edge": 128}, "do_image_splitting": True, "resample": 1, **HALVES},
     "processor": {"image_seq_len": 16}, "back_ends": ["pil"], "feature": "<image>", "arrays": {**PIXELS, "pixel_attention_mask": "bool"},
     "tokens": {"eos_token": "<end_of_utterance>", "pad_token": "<pad>", "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
                "global_image_token": "<global-img>"}, "template": SMOLVLM, "template_in": "tokenizer_config.json", "padded": True},
    {"name": "llava", "image_class": ("clip", "CLIPImageProcessor"), "processor_class": ("llava", "LlavaProcessor"),
     "image": {"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112}, "do_center_crop": True, **CLIP},
     "processor": {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "image_token": "<image>"},
     "back_ends": BOTH, "feature": "<image>", "arrays": PIXELS, "tokens": {**BASICS, "image_token": "<image>"}, "template": VICUNA},
    {"name": "llava-padded", "image_class": ("llava", "LlavaImageProcessor"), "processor_class": ("llava", "LlavaProcessor"),
     "image": {"size": {"shortest_edge": 100}, "crop_size": {"height": 113, "width": 98}, "do_center_crop": True, "do_pad": True, **CLIP},
     "processor": {"patch_size": 14, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0, "image_token": "<image>"},
     "back_ends": BOTH, "feature": "<image>", "arrays": PIXELS, "tokens": {**BASICS, "image_token": "<image>"}, "template": VICUNA, "layout": "nested"},
    {"name": "fast_vlm", "image_class": ("clip", "CLIPImageProcessor"), "processor_class": ("llava", "LlavaProcessor"),
     "image": {"size": {"shortest_edge": 256}, "crop_size": {"height": 256, "width": 256}, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]},
     "processor": {"patch_size": 64, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0, "image_token": "<image>"},
     "back_ends": BOTH, "feature": "<image>", "arrays": PIXELS, "tokens": {"eos_token": "<|im_end|>", "image_token": "<image>", "pad_token": "<pad>"},
     "template": CHATML("<image>")},
    {"name": "llava_onevision", "image_class": ("llava_onevision", "LlavaOnevisionImageProcessor"),
     "processor_class": ("llava_onevision", "LlavaOnevisionProcessor"), "video": ("llava_onevision", "LlavaOnevisionVideoProcessor"),
     "image": {"size": {"height": 96, "width": 96}, "do_pad": True, **CLIP,
               "image_grid_pinpoints": [[96 * h, 96 * w] for h in range(1, 7) for w in range(1, 7)]},
     "processor": {"num_image_tokens": 49, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
                   "image_token": "<image>", "video_token": "<video>"},
     "back_ends": BOTH, "feature": "<image>", "arrays": {**PIXELS, "image_sizes": "int"}, "tiles": True,
     "tokens": {"eos_token": "<|im_end|>", "pad_token": "<pad>", "image_token": "<image>", "video_token": "<video>"}, "template": CHATML("<image>")},
    {"name": "internvl", "image_class": ("got_ocr2", "GotOcr2ImageProcessor"), "processor_class": ("internvl", "InternVLProcessor"),
     "video": ("internvl", "InternVLVideoProcessor"),
     "image": {"size": {"height": 112, "width": 112}, "crop_to_patches": False, "min_patches": 1, "max_patches": 12,
               "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
     "processor": {"image_seq_length": 16}, "back_ends": BOTH, "feature": "<IMG_CONTEXT>", "arrays": PIXELS,
     "tokens": {"eos_token": "<|im_end|>", "pad_token": "<pad>", "start_image_token": "<img>", "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}, "template": CHATML("<IMG_CONTEXT>\n")},
    {"name": "aya_vision", "image_class": ("got_ocr2", "GotOcr2ImageProcessor"), "processor_class": ("aya_vision", "AyaVisionProcessor"),
     "image": {"size": {"height": 84, "width": 84}, "min_patches": 1, "max_patches": 12, **HALVES},
     "processor": {"patch_size": 14, "downsample_factor": 2, "img_size": 84, "image_token": "<image>"}, "back_ends": BOTH,
     "feature": "<|IMG_PATCH|>", "arrays": PIXELS, "tokens": BASICS, "template": VICUNA, "layout": "nested"},
    {"name": "gemma3", "image_class": ("gemma3", "Gemma3ImageProcessor"), "processor_class": ("gemma3", "Gemma3Processor"),
     "image": {"size": {"height": 128, "width": 128}, "resample": 2, "do_convert_rgb": None, "do_pan_and_scan": None, **HALVES},
     "processor": {"image_seq_length": 16}, "back_ends": BOTH, "feature": "<image_soft_token>", "arrays": PIXELS, "tokens": GEMMA_TOKENS,
     "template": GEMMA("<start_of_image>")},
    {"name": "gemma3-pan-and-scan", "image_class": ("gemma3", "Gemma3ImageProcessor"), "processor_class": ("gemma3", "Gemma3Processor"),
     "image": {"size": {"height": 64, "width": 64}, "resample": 2, **HALVES}, "tiles": True, "call": {"do_pan_and_scan": True},
     "processor": {"image_seq_length": 16}, "back_ends": BOTH, "feature": "<image_soft_token>", "arrays": PIXELS, "tokens": GEMMA_TOKENS,
     "template": GEMMA("<start_of_image>"), "layout": "nested"},
    {"name": "gemma3n", "image_class": ("siglip", "SiglipImageProcessor"), "processor_class": ("gemma3n", "Gemma3nProcessor"),
     "audio": ("gemma3n", "Gemma3nAudioFeatureExtractor"),
     "image": {"size": {"height": 128, "width": 128}, "resample": 2, "do_normalize": False, **HALVES},
     "processor": {"image_seq_length": 16}, "back_ends": BOTH, "feature": "<image_soft_token>", "arrays": PIXELS,
     "tokens": {**GEMMA_TOKENS, "audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"},
     "template": GEMMA("<image_soft_token>")},
    {"name": "paligemma", "image_class": ("siglip", "SiglipImageProcessor"), "processor_class": ("paligemma", "PaliGemmaProcessor"),
     "image": {"size": {"height": 112, "width": 112}, "image_seq_length": 64, "resample": 3, **HALVES}, "processor": {}, "back_ends": BOTH,
     "feature": "<image>", "arrays": PIXELS, "tokens": {**BASICS, "image_token": "<image>"}, "template": None, "prompt": PALIGEMMA,
     "single": True, "always": True},
    {"name": "pixtral", "image_class": ("pixtral", "PixtralImageProcessor"), "processor_class": ("pixtral", "PixtralProcessor"),
     "image": {"size": {"longest_edge": 256}, "patch_size": {"height": 16, "width": 16}, **CLIP},
     "processor": {"patch_size": 16, "image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
     "back_ends": BOTH, "feature": "[IMG]", "arrays": {**PIXELS, "image_sizes": "int"}, "tokens": BASICS, "template": MISTRAL, "padded": True, "pt": True},
    {"name": "mistral3", "image_class": ("pixtral", "PixtralImageProcessor"), "processor_class": ("pixtral", "PixtralProcessor"),
     "image": {"size": {"longest_edge": 385}, "patch_size": 14, **CLIP},
     "processor": {"patch_size": 14, "spatial_merge_size": 2, "image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
     "back_ends": BOTH, "feature": "[IMG]", "arrays": {**PIXELS, "image_sizes": "int"}, "tokens": BASICS, "template": MISTRAL, "padded": True, "pt": True,
     "layout": "nested", "config": {"model_type": "mistral3"}},
    {"name": "glm4v", "image_class": ("glm4v", "Glm4vImageProcessor"), "processor_class": ("glm4v", "Glm4vProcessor"),
     "video": ("glm4v", "Glm4vVideoProcessor"), "image": {"size": {"shortest_edge": 12544, "longest_edge": 401408}, "patch_size": 14, **CLIP},
     "processor": {}, "back_ends": BOTH, "feature": "<|image|>", "arrays": GRID, "template": GLM,
     "tokens": {"eos_token": "<|user|>", "pad_token": "<pad>", "image_token": "<|image|>", "video_token": "<|video|>"}},
    {"name": "glm46v", "image_class": ("glm46v", "Glm46VImageProcessor"), "processor_class": ("glm46v", "Glm46VProcessor"),
     "video": ("glm46v", "Glm46VVideoProcessor"), "image": {"size": {"shortest_edge": 12544, "longest_edge": 301056}, "patch_size": 14, **CLIP},
     "processor": {}, "back_ends": BOTH, "feature": "<|image|>", "arrays": GRID, "template": GLM, "layout": "nested", "config": {"model_type": "glm_ocr"},
     "tokens": {"eos_token": "<|user|>", "pad_token": "<pad>", "image_token": "<|image|>", "video_token": "<|video|>"}},
    {"name": "paddleocr_vl", "image_class": ("paddleocr_vl", "PaddleOCRVLImageProcessor"), "processor_class": ("paddleocr_vl", "PaddleOCRVLProcessor"),
     "image": {"min_pixels": 28224, "max_pixels": 200704, "patch_size": 14, "temporal_patch_size": 1, "merge_size": 2, **CLIP}, "processor": {},
     "back_ends": BOTH, "feature": "<|IMAGE_PLACEHOLDER|>", "arrays": GRID, "tokens": {**BASICS, "image_token": "<|IMAGE_PLACEHOLDER|>"},
     "template": chat("User: ", "Assistant: ", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "\n", "Assistant: ")},
    {"name": "lfm2_vl", "image_class": ("lfm2_vl", "Lfm2VlImageProcessor"), "processor_class": ("lfm2_vl", "Lfm2VlProcessor"),
     "image": {"tile_size": 128, "encoder_patch_size": 16, "downsample_factor": 2, "min_tiles": 2, "max_tiles": 10, "min_image_tokens": 4,
               "max_image_tokens": 16, "max_pixels_tolerance": 2.0, "use_thumbnail": True, "size": {"height": 128, "width": 128}, "do_convert_rgb": True, **HALVES},
     "processor": {}, "back_ends": ["torchvision"], "feature": "<image>", "pt": True,
     "refused": {"wide.png": "patches, expected at most 64", "tall.png": "patches, expected at most 64"},
     "arrays": {**PIXELS, "pixel_attention_mask": "bool", "spatial_shapes": "int"},
     "tokens": {**BASICS, "image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
                "image_thumbnail_token": "<|img_thumbnail|>"},
     "template": chat("<|im_start|>user\n", "<|im_start|>assistant\n", "<image>", "<|im_end|>\n", "<|im_start|>assistant\n", begin="{{ bos_token }}")},
    {"name": "gemma4", "image_class": ("gemma4", "Gemma4ImageProcessor"), "processor_class": ("gemma4", "Gemma4Processor"),
     "video": ("gemma4", "Gemma4VideoProcessor"), "audio": ("gemma4", "Gemma4AudioFeatureExtractor"),
     "image": {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 3, "resample": 3, "do_normalize": False}, "processor": {"image_seq_length": 70},
     "back_ends": BOTH, "feature": "<|image|>", "arrays": {**PIXELS, "image_position_ids": "int"}, "rename": {"image_position_ids": "pixel_position_ids"},
     "tokens": {**BASICS, "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>", "boa_token": "<|audio>",
                "eoa_token": "<audio|>"}, "template": GEMMA("<|image|>"), "layout": "nested"},
    {"name": "ovis2", "image_class": ("ovis2", "Ovis2ImageProcessor"), "processor_class": ("ovis2", "Ovis2Processor"),
     "image": {"size": {"height": 98, "width": 98}, "crop_to_patches": True, "min_patches": 1, "max_patches": 9, **HALVES}, "processor": {"image_seq_length": 16},
     "back_ends": BOTH, "feature": "<IMG_ATOM>", "arrays": PIXELS, "tokens": {"eos_token": "<|im_end|>", "pad_token": "<pad>"}, "template": CHATML("<image>"),
     "pt": True},
    {"name": "granite_docling", "image_class": ("granite_docling", "GraniteDoclingImageProcessor"), "processor_class": ("granite_docling", "GraniteDoclingProcessor"),
     "image": {"size": {"height": 64, "width": 64}, "max_patches": 24, "dense_max_patches": 40, "dense_max_scale": 0.9, "dense_min_aspect": 1.1, **CLIP},
     "processor": {"image_seq_len": 4}, "back_ends": BOTH, "feature": "<image>", "arrays": {**PIXELS, "pixel_attention_mask": "bool"},
     "tokens": {"eos_token": "<end_of_utterance>", "pad_token": "<pad>", "image_token": "<image>"}, "template": SMOLVLM, "padded": True},
    {"name": "minicpmv4_6", "image_class": ("minicpmv4_6", "MiniCPMV4_6ImageProcessor"), "processor_class": ("minicpmv4_6", "MiniCPMV4_6Processor"),
     "video": ("minicpmv4_6", "MiniCPMV4_6VideoProcessor"), "image": {"max_slice_nums": 9, "scale_resolution": 112, "patch_size": 14, **HALVES}, "processor": {},
     "back_ends": BOTH, "feature": "<|image_pad|>", "arrays": {**PIXELS, "target_sizes": "int"}, "padded": True, "pt": True,
     "tokens": {"eos_token": "<|im_end|>", "pad_token": "<pad>", "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
                "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>", "image_id_start_token": "<image_id>",
                "image_id_end_token": "</image_id>"}, "template": CHATML("<|image_pad|>"), "layout": "nested"},
    {"name": "janus", "image_class": ("janus", "JanusImageProcessor"), "processor_class": ("janus", "JanusProcessor"), "rgb": True,
     "image": {"size": {"height": 98, "width": 98}, "min_size": 14, **HALVES}, "processor": {"num_image_tokens": 49}, "back_ends": BOTH,
     "feature": "<image_placeholder>", "arrays": PIXELS, "pt": True,
     "tokens": {**BASICS, "image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
     "template": chat("<|user|>: ", "<|assistant|>: ", "<image_placeholder>\n", "\n\n", "<|assistant|>:")},
    {"name": "deepseek_vl", "image_class": ("deepseek_vl", "DeepseekVLImageProcessor"), "processor_class": ("deepseek_vl", "DeepseekVLProcessor"), "rgb": True,
     "image": {"size": {"height": 84, "width": 84}, "min_size": 14, **CLIP}, "processor": {"num_image_tokens": 36}, "back_ends": BOTH,
     "feature": "<image_placeholder>", "arrays": PIXELS, "pt": True, "tokens": {**BASICS, "image_token": "<image_placeholder>"},
     "template": chat("User: ", "Assistant: ", "<image_placeholder>", "\n\n", "Assistant:", begin="{{ bos_token }}"), "layout": "both"},
]
