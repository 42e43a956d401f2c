"""Unusual pictures, the same for every family, generated from formulas.

usage: pictures.py OUT_DIR
"""
import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ORIENTATION = 0x0112
LANCZOS = Image.Resampling.LANCZOS


def gradient(width, height, channels=3):
    """Slow waves with a little noise, so that files stay small and no two rows are equal."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 90 * np.sin(x / (7.0 + 3 * c) + c) * np.cos(y / (11.0 + 2 * c)) for c in range(channels)]
    noise = (np.arange(width * height * channels, dtype=np.uint64) * 2654435761 % 2**32 >> 29).reshape(height, width, -1)
    return np.clip(np.stack(planes, -1) + noise, 0, 255).astype(np.uint8)


def stripes(width, height):
    """Flat bars that compress to nothing at any length."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(x // 37 * 53 + y // 13 * 29 + 80 * c) % 256 for c in range(3)]
    return np.stack(planes, -1).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def files():
    """Encoded pictures by file name."""
    rgb = Image.fromarray(gradient(61, 47))
    alpha = np.concatenate([gradient(50, 40), np.mgrid[0:40, 0:50][1][..., None].astype(np.uint8) * 5], -1)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    deep = (np.mgrid[0:40, 0:48][1] * 900 + np.mgrid[0:40, 0:48][0] * 500).astype(np.uint16)
    photo = Image.fromarray(gradient(150, 110))
    return {
        "pixel.png": encoded(Image.fromarray(gradient(1, 1)), "PNG"),
        "wide.png": encoded(Image.fromarray(stripes(3000, 20)), "PNG"),
        "tall.png": encoded(Image.fromarray(stripes(20, 3000)), "PNG"),
        "rgba.png": encoded(Image.fromarray(alpha, "RGBA"), "PNG"),
        "palette.png": encoded(rgb.quantize(16), "PNG"),
        "palette-transparent.png": encoded(rgb.quantize(8), "PNG", transparency=3),
        "grey.png": encoded(rgb.convert("L"), "PNG"),
        "grey16.png": encoded(Image.fromarray(deep), "PNG"),
        "turned.jpeg": encoded(photo.resize((90, 40)), "JPEG", quality=90, exif=turned),
        "cmyk.jpeg": encoded(Image.fromarray(gradient(48, 64)).convert("CMYK"), "JPEG", quality=90),
        "photo.jpeg": encoded(photo, "JPEG", quality=88),
        "square.png": encoded(Image.fromarray(gradient(40, 40)), "PNG"),
    }


def opened(content):
    """A picture as Hugging Face's loaders hand it to a processor, its orientation applied."""
    image = Image.open(io.BytesIO(content))
    if image.getexif().get(ORIENTATION) is not None:
        image = ImageOps.exif_transpose(image)
    image.load()
    return image


_resize = Image.Image.resize


def resize(image, size, resample=None, box=None, reducing_gap=None):
    """Horizontal pass, then vertical pass, as every Pillow up to 12 does; 13 sometimes turns the order round."""
    if box is not None or reducing_gap is not None:
        return _resize(image, size, resample, box, reducing_gap)
    return _resize(_resize(image, (size[0], image.size[1]), resample), size, resample)


Image.Image.resize = resize

# One question about each picture, then several pictures, none, and several turns.
QUESTION = "What is in this picture?"
CASES = {name.split(".")[0]: [[[name], QUESTION, None]] for name in files()} | {
    "two": [[["photo.jpeg", "palette.png"], "Are these the same?", None]],
    "none": [[[], "Is the sky blue?", None]],
    "turns": [[["square.png"], "What colour is it?", "It is red."], [["grey.png"], "And this one?", None]],
}
# Conversations whose answers are learned, as one batch.
LEARNED = [
    [[["photo.jpeg"], QUESTION, "A green line over a house."]],
    [[["square.png", "rgba.png"], "Are these the same?", "No."], [[], "How many are there?", "There are two."]],
    [[[], "Is the sky blue?", "Yes, it is."]],
]


def messages(turns):
    """Chat messages and the names of their pictures; the last answer is left out when it is `None`."""
    out, names = [], []
    for pictures, question, answer in turns:
        names += pictures
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
        out.append({"role": "user", "content": content})
        if answer is not None:
            out.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return out, names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (out / name).write_bytes(content)
        print(name, len(content))


if __name__ == "__main__":
    main()
