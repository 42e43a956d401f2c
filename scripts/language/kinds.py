"""Five kinds of text as JSON lines `{"text": ..}`, in three parts that share no chapter, novel, letter or collection.

usage: kinds.py PACKAGES OUT      PACKAGES: folder with the unpacked packages named in README.md

`OUT/KIND-train.jsonl` is for healing, `OUT/KIND-held-back.jsonl` for every choice, `OUT/KIND-test.jsonl` for the published
figures; `OUT/mixture-train.jsonl` has a third each of the healing parts of manual, novels and dictionary, and `OUT/three-train.jsonl`
all of these. There is no healing part of the news: no model is healed on them.
"""
import gzip
import json
import re
import struct
import sys
import zlib
from xml.etree import ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "smollm2"))
from text import page, pages

# Characters of each part; four or five make a token.
SIZES = {"train": 240_000, "held-back": 6_000, "test": 12_000}
# Characters of a block, which is a row; what is measured comes from blocks evenly spaced over its source.
BLOCK = 1_000

CHAPTERS = {"train": [4, 5, 6, 7, 8, 10, 11, 12], "held-back": [13], "test": [9, 15]}
NOVELS = {"train": ["emma", "prideandprejudice", "mansfieldpark"], "held-back": ["persuasion"], "test": ["northangerabbey"]}
LETTERS = {"train": "ABDEFGIKLMNOQRVWY", "held-back": "H", "test": "CPST"}
COLLECTIONS = {
    "train": ["art", "cookie", "food", "law", "men-women", "politics", "science", "sports", "work", "miscellaneous"],
    "held-back": ["wisdom", "education"],
    "test": ["people", "definitions"],
}
TOPICS = {"held-back": "crude", "test": "acq"}


def blocks(pieces):
    """Joins pieces of text to blocks of about BLOCK characters."""
    block = ""
    for piece in pieces:
        block += piece + "\n\n"
        if len(block) >= BLOCK:
            yield block
            block = ""


def manual(packages, part):
    folder = packages / "usr/share/doc/debian-handbook/html/en-US"
    texts = [page(path) for number, path in pages(folder) if number in CHAPTERS[part]]
    return list(blocks(piece for text in texts for piece in text.split("\n\n") if piece.strip()))


def strings(serialised):
    """The first vector of strings in R's serialised form (XDR), or none."""
    found = re.search(rb"\x00\x00\x00\x10(.{4})\x00\x04\x00\x09", serialised, re.S)
    if not found:
        return []
    count, at, lines = struct.unpack(">i", found.group(1))[0], found.end() - 4, []
    for _ in range(count):
        length = struct.unpack(">i", serialised[at + 4 : at + 8])[0]
        lines.append(serialised[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return lines


def novels(packages, part):
    """Paragraphs of novels. R's database of data has one stream of zlib after the other, each behind its length."""
    base = packages / "usr/lib/R/site-library/janeaustenr/data/Rdata"
    texts, rest = {}, base.with_suffix(".rdb").read_bytes()
    while rest:
        stream = zlib.decompressobj()
        lines = strings(stream.decompress(rest[4:]))
        rest = stream.unused_data
        if lines:
            texts[re.sub("[^a-z]", "", " ".join(lines[:8]).lower())] = "\n".join(lines)
    wanted = [text for name in NOVELS[part] for title, text in texts.items() if title.startswith(name)]
    assert len(wanted) == len(NOVELS[part]), f"{NOVELS[part]} among {[title[:20] for title in texts]}"
    paragraphs = [re.sub(r"\s+", " ", piece).strip() for text in wanted for piece in re.split(r"\n\s*\n", text)]
    return list(blocks(filter(None, paragraphs)))


def dictionary(packages, part):
    """Entries of the dictionary, without the marks of their sources."""
    with gzip.open(packages / "usr/share/dictd/gcide.dict.dz", "rt", encoding="utf-8", errors="replace") as file:
        entries = re.split(r"\n\n(?=\S)", file.read())
    # A few entries are in another encoding: they have the replacement character.
    entries = [entry for entry in entries if "[1913 Webster]" in entry and "\ufffd" not in entry]
    chosen = [entry for entry in entries if entry[0] in LETTERS[part]]
    clean = [re.sub(r"[ \t]*\n\s*\n?\s*", " ", re.sub(r"\[1913 Webster\]|\[PJC\]|\\[^\\]*\\", "", entry)) for entry in chosen]
    return list(blocks(re.sub(r" +", " ", entry).strip() for entry in clean))


def quotations(packages, part):
    folder = packages / "usr/share/games/fortunes"
    texts = [(folder / f"{name}.u8").resolve().read_text(encoding="utf-8") for name in COLLECTIONS[part]]
    return list(blocks(piece.strip() for text in texts for piece in re.split(r"^%$", text, flags=re.M)))


def news(packages, part):
    """Stories of a news agency, one paragraph to a line of text."""
    folder = packages / "usr/lib/R/site-library/tm/texts" / TOPICS[part]
    bodies = [ElementTree.parse(path).findtext(".//BODY").strip() for path in sorted(folder.glob("*.xml"))]
    # A paragraph begins with spaces; each story ends with the agency's name.
    bodies = [re.sub(r"\n[ ]{2,}", "\n\n", re.sub(r"\s*Reuter\s*$", "", body, flags=re.I)) for body in bodies]
    return list(blocks("\n".join(" ".join(piece.split()) for piece in body.split("\n\n")) for body in bodies))


KINDS = {"manual": manual, "novels": novels, "dictionary": dictionary, "quotations": quotations, "news": news}
HEALED = ["manual", "novels", "dictionary"]


def spread(rows, size):
    """Rows evenly spaced over all, of about this many characters together, in their order."""
    mean = sum(map(len, rows)) / len(rows)
    count = min(len(rows), max(1, round(size / mean)))
    return [rows[number * len(rows) // count] for number in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.name}\t{len(rows)} rows\t{sum(map(len, rows))} characters")


def main():
    packages, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    mixture, three = [], []
    for kind, rows in KINDS.items():
        for part, size in SIZES.items():
            if kind == "news" and part == "train":
                continue
            chosen = spread(rows(packages, part), size)
            write(out / f"{kind}-{part}.jsonl", chosen)
            if part == "train" and kind in HEALED:
                mixture += spread(chosen, size // 3)
                three += chosen
    write(out / "mixture-train.jsonl", mixture)
    write(out / "three-train.jsonl", three)


if __name__ == "__main__":
    main()
