"""Small pictures in many encodings, with Pillow's decoded pixels.

Writes `files.json`: for each file its bytes, the size of the upright picture, and the SHA-256 of its RGB bytes with
transparency composited on white (`convert_to_rgb` of transformers) and ignored (`convert("RGB")`). `refusal` is the beginning
of the error message for files that Pillow rejects too, and for CMYK outside JPEG.
Run by hand with pillow 13.0.0 and transformers 5.24.

usage: files.py --out fixtures/processor
"""

import argparse
import base64
import hashlib
import io
import json
import pathlib
import struct

import numpy as np
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb


def photo(width, height, channels=3):
    """Waves with noise: smooth enough to look like a photograph, with sharp edges."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / (4 + 2 * i) + i) + 50 * np.cos(y / (3 + i)) for i in range(channels)]
    noise = np.random.default_rng(width * height).normal(0, 15, (height, width, channels))
    block = ((x // 9 + y // 7) % 2 * 60)[..., None]
    return np.clip(np.stack(waves, -1) + noise + block, 0, 255).astype(np.uint8)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sampled(data, factors, width, height):
    """The same coefficients under other sampling factors of the first component, and another size with as many blocks."""
    data = bytearray(data)
    start = data.find(b"\xff\xc0")
    data[start + 5:start + 9] = struct.pack(">HH", height, width)
    data[start + 11] = factors
    return bytes(data)


def jpegs():
    rgb, grey = Image.fromarray(photo(33, 21)), Image.fromarray(photo(33, 21, 1)[..., 0])
    cmyk = Image.fromarray(photo(21, 17, 4), "CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, factors in [("444", 0), ("422", 1), ("420", 2)]:
        yield f"rgb-{name}.jpeg", encoded(rgb, quality=75, subsampling=factors)
        yield f"rgb-{name}-progressive.jpeg", encoded(rgb, quality=75, subsampling=factors, progressive=True)
    yield "grey.jpeg", encoded(grey, quality=60)
    yield "cmyk.jpeg", encoded(cmyk, quality=80)
    yield "kept-rgb.jpeg", encoded(rgb, quality=80, keep_rgb=True)
    yield "low-quality.jpeg", encoded(rgb, quality=8)
    yield "one-pixel.jpeg", encoded(rgb.crop((3, 3, 4, 4)))
    yield "restarts.jpeg", encoded(rgb, quality=75, restart_marker_blocks=2)
    yield "turned.jpeg", encoded(rgb, quality=75, exif=exif)
    yield "rgb-440.jpeg", sampled(encoded(Image.fromarray(photo(32, 16)), quality=75, subsampling=1), 0x12, 15, 31)
    yield "rgb-411.jpeg", sampled(encoded(Image.fromarray(photo(32, 32)), quality=75, subsampling=2), 0x41, 62, 15)
    whole = encoded(rgb, quality=75, subsampling=2)
    yield "third.jpeg", whole[:len(whole) // 3]
    yield "half.jpeg", whole[:len(whole) // 2]
    yield "without-end.jpeg", whole[:-2]
    progressive = encoded(rgb, quality=75, subsampling=2, progressive=True)
    yield "half-progressive.jpeg", progressive[:len(progressive) // 2]


def others():
    alpha = Image.fromarray(photo(9, 7, 4), "RGBA")
    palette = Image.fromarray(photo(9, 7)).quantize(7)
    wide = (np.arange(63, dtype=np.uint16) * 1040).reshape(7, 9)
    yield "rgba.png", encoded(alpha, "PNG")
    yield "grey-alpha.png", encoded(alpha.convert("LA"), "PNG")
    yield "palette.png", encoded(palette, "PNG")
    yield "palette-transparent.png", encoded(palette, "PNG", transparency=2)
    yield "palette-alphas.png", encoded(palette, "PNG", transparency=bytes([0, 255, 128, 30, 200, 99, 255]))
    yield "rgb-key.png", encoded(Image.new("RGB", (16, 8), (200, 30, 90)), "PNG", transparency=(200, 30, 90))
    yield "grey-key.png", encoded(Image.new("L", (16, 8), 77), "PNG", transparency=77)
    yield "grey-16.png", encoded(Image.fromarray(wide), "PNG")
    yield "grey-16.tiff", encoded(Image.fromarray(wide), "TIFF")
    yield "bits.png", encoded(Image.fromarray(photo(9, 7)).convert("1"), "PNG")
    yield "palette.gif", encoded(palette, "GIF")
    yield "palette-transparent.gif", encoded(palette, "GIF", transparency=2)
    yield "rgba.webp", encoded(alpha, "WEBP", lossless=True, exact=True)
    yield "lossy.webp", encoded(Image.fromarray(photo(33, 21)), "WEBP", quality=70)
    yield "cmyk.tiff", encoded(Image.fromarray(photo(9, 7, 4), "CMYK"), "TIFF")


def decoded(data):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    sha = lambda array: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    on_white, dropped = convert_to_rgb(image, return_numpy=True), np.array(image.convert("RGB"))
    return {"size": list(image.size), "on_white": sha(on_white), "dropped": sha(dropped)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    cases = []
    for name, data in [*jpegs(), *others()]:
        case = {"name": name, "base64": base64.b64encode(data).decode()}
        try:
            case.update(decoded(data))
        except OSError:
            case["refusal"] = "does not decode: it is a JPEG whose data end early"
        if name == "cmyk.tiff":
            case["refusal"] = "holds CMYK samples"
        cases.append(case)
    path = args.out / "files.json"
    path.write_text(json.dumps(cases, indent=1) + "\n")
    print(path, path.stat().st_size, "bytes", [case["name"] for case in cases if "refusal" in case])
