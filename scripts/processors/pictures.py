"""Pictures that processors often handle wrongly, as small files.

Run by hand with pillow 13.0.0; `families.py` reads its output.

usage: pictures.py --out fixtures/processor/awkward
"""

import argparse
import pathlib

import numpy as np
from PIL import Image


def waves(width, height, channels=3, step=1):
    """Smooth colours with a few edges; `step` is the size of its blocks."""
    y, x = np.mgrid[0:height, 0:width] // step
    planes = [127 + 80 * np.sin(x * (0.05 + 0.02 * i) + i) + 40 * np.cos(y * (0.07 + 0.01 * i)) for i in range(channels)]
    block = ((x // 17 + y // 11) % 2 * 35)[..., None]
    return np.clip(np.stack(planes, -1) + block, 0, 255).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    photo = Image.fromarray(waves(320, 240))
    turn = Image.Exif()
    turn[0x0112] = 6
    noise = np.random.default_rng(5).integers(0, 256, (50, 33, 3), dtype=np.uint8)
    wide = (waves(60, 41, 1)[..., 0].astype(np.uint16) * 5)
    palette = Image.fromarray(waves(90, 61)).quantize(9)
    pictures = {
        "one.png": (Image.fromarray(waves(1, 1)), {}),
        "wide.png": (Image.fromarray(waves(3000, 20, step=10)), {}),
        "tall.png": (Image.fromarray(waves(20, 3000, step=10)), {}),
        "rgba.png": (Image.fromarray(waves(70, 42, 4), "RGBA"), {}),
        "palette.png": (palette, {"transparency": 2}),
        "grey-16.png": (Image.fromarray(wide), {}),
        "grey.png": (Image.fromarray(waves(120, 90, 1)[..., 0]), {}),
        "square.png": (Image.fromarray(waves(448, 448, step=4)), {}),
        "page.png": (Image.fromarray(waves(850, 1100, step=10)), {}),
        "noise.png": (Image.fromarray(noise), {}),
        "turned.jpeg": (photo.resize((160, 90)), {"exif": turn, "quality": 80}),
        "cmyk.jpeg": (Image.fromarray(waves(97, 64, 4), "CMYK"), {"quality": 80}),
        "photo.jpeg": (photo, {"quality": 85}),
    }
    for name, (picture, options) in pictures.items():
        picture.save(out / name, **options)
        print(name, (out / name).stat().st_size, "bytes")


if __name__ == "__main__":
    main()
