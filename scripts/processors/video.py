"""Outputs of Hugging Face's Qwen3-VL processor for a video given as frames.

Writes `video.json`: frames as PNG and, for some selections of frames, their indices and frame rate, the ids as runs
`[id, times]`, the grid and the SHA-256 of the pixels. The tokenizer, template and settings are those of `qwen3_vl` in
`families.json`. Run by hand, like `families.py`.

usage: video.py --out fixtures/processor
"""

import argparse
import base64
import io
import json
import pathlib

import numpy as np
from PIL import Image
from transformers.video_utils import VideoMetadata

import families
from pictures import waves
from table import FAMILIES

TEMPLATE_PART = "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    family = next(family for family in FAMILIES if family["name"] == "qwen3_vl")
    family = {**family, "template": family["template"].replace("{% else %}{{ part", TEMPLATE_PART)}
    frames = [Image.fromarray(np.roll(waves(130, 90, step=5), 30 * place, axis=1)) for place in range(5)]
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}]
    cases = []
    for chosen, fps, size in [([0, 1, 2, 3], 2.0, None), ([0, 3, 4], 3.0, None), ([0, 1, 2, 3, 4], 29.97, None),
                              ([1, 2], 1.0, {"shortest_edge": 4096, "longest_edge": 16384})]:
        processor = families.build(family, "torchvision", families.tokenizer())
        if size:
            processor.video_processor.size = size
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        metadata = VideoMetadata(total_num_frames=5, fps=fps, frames_indices=list(chosen))
        out = processor(text=[text], videos=[[frames[place] for place in chosen]], video_metadata=[metadata],
                        do_sample_frames=False, return_tensors="pt")
        cases.append({"frames": chosen, "fps": fps, "size": size, "input_ids": families.runs(out["input_ids"][0].tolist()),
                      "grid": out["video_grid_thw"][0].tolist(), "pixels": families.digest(out["pixel_values_videos"].numpy())})
    encoded = []
    for frame in frames:
        buffer = io.BytesIO()
        frame.save(buffer, "PNG")
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    path = args.out / "video.json"
    path.write_text(json.dumps({"frames": encoded, "template": family["template"], "cases": cases}, separators=(",", ":")) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
