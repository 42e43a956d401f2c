"""Packs exported families with their expected values for the tests: one archive per group of families that share parts.

usage: pack.py EXPORTS FIXTURES [NAME...]        needs the `zstd` program
"""
import argparse
import io
import subprocess
import tarfile
from pathlib import Path

import export
import pictures

# Families that differ in one graph lie in one archive, where equal files take no room.
GROUPS = {
    "llava": ["llava", "llava_projector", "llava_single"],
    "qwen3_vl": ["qwen3_vl", "qwen3_vl_masked", "qwen3_vl_packed", "qwen3_vl_plain"],
    "gemma3": ["gemma3", "gemma3_two_way"],
    "paligemma": ["paligemma", "paligemma_two_way"],
    "mistral3": ["mistral3", "mistral3_plain"],
    "qwen2_5_vl": ["qwen2_5_vl", "qwen2_5_vl_mobius", "qwen2_5_vl_genai"],
}


def groups():
    inside = {name for names in GROUPS.values() for name in names}
    return GROUPS | {name: [name] for name in export.rows() if name not in inside}


def add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mode = 0o644
    archive.addfile(entry, io.BytesIO(content))


def packed(exports, names):
    """Bytes of a tar file, the same for the same content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in names:
            folder = exports / name
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                add(archive, f"{name}/{path.relative_to(folder)}", path.read_bytes())
            add(archive, f"{name}.json", (exports / "_expected" / f"{name}.json").read_bytes())
    return buffer.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", type=Path)
    parser.add_argument("fixtures", type=Path)
    parser.add_argument("names", nargs="*", help="archives to write, all when none is named")
    args = parser.parse_args()
    (args.fixtures / "pictures").mkdir(parents=True, exist_ok=True)
    for name, content in pictures.files().items():
        (args.fixtures / "pictures" / name).write_bytes(content)
    table = groups()
    for group in args.names or table:
        content = packed(args.exports, table[group])
        target = args.fixtures / f"{group}.tar.zst"
        command = ["zstd", "-19", "--long=24", "-q", "-f", "-", "-o", str(target)]
        subprocess.run(command, input=content, check=True)
        print(f"{target.name}\t{target.stat().st_size}", flush=True)


if __name__ == "__main__":
    main()
