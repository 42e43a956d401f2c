"""Writes the Hugging Face checkpoint that each family's graphs were exported from.

usage: checkpoints.py OUT_DIR [NAME...]        default: all families, into OUT_DIR/NAME
       checkpoints.py OUT_DIR NAME... --archives fixtures/checkpoints        needs the `zstd` program
"""
import argparse
import io
import subprocess
import tarfile
from pathlib import Path

import export
import pack


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--archives", type=Path, help="write each checkpoint as an archive into this folder too")
    args = parser.parse_args()
    rows = export.rows()
    for name in args.names or rows:
        family = rows[name]()
        family.model.save_pretrained(args.out / name)
        try:
            family.processor.save_pretrained(args.out / name)
        except Exception:
            # A few classes cannot save themselves without an image processor of the default back end.
            family.processor.tokenizer.save_pretrained(args.out / name)
        if args.archives:
            archive(args.out / name, args.archives / f"{name}.tar.zst")


def archive(folder, target):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as files:
        for path in sorted(folder.iterdir()):
            pack.add(files, f"{folder.name}/{path.name}", path.read_bytes())
    target.parent.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(["zstd", "-19", "-c"], input=buffer.getvalue(), capture_output=True, check=True)
    target.write_bytes(packed.stdout)


if __name__ == "__main__":
    main()
