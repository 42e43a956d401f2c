"""Text of The Debian Administrator's Handbook as JSON lines `{"text": ..}`, one line per page of HTML.

usage: text.py PACKAGE OUT      PACKAGE: folder of the unpacked package debian-handbook

Paragraphs, titles, list items and listings are kept, separated by blank lines; tables, contents lists and navigation
are not. Some chapters are for training (`train.jsonl`), others are held out (`held-out.jsonl`).
"""
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

CHAPTERS = {"train": [4, 5, 6, 7, 8, 10, 11, 12, 13], "held-out": [9, 15]}
VOID = {"img", "br", "hr", "meta", "link", "input", "col"}
SKIPPED_TAGS = {"head", "script", "style", "table"}
SKIPPED_IDS = {"banner", "title"}
SKIPPED_CLASSES = {"toc", "docnav", "navheader", "navfooter", "footnotes"}
BLOCKS = {"p", "div", "li", "dt", "dd", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "ul", "ol", "dl"}


class Blocks(HTMLParser):
    """Blocks of text in the order of the page."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks, self.words, self.listing = [], [], False
        # For each open element its name, and whether it is skipped.
        self.open = []

    def skipping(self):
        return bool(self.open) and self.open[-1][1]

    def close_block(self):
        text = "".join(self.words)
        text = text.strip("\n") if self.listing else re.sub(r"\s+", " ", text).strip()
        if text:
            self.blocks.append(text)
        self.words = []

    def handle_starttag(self, tag, attributes):
        if tag in VOID:
            return
        if tag in BLOCKS:
            self.close_block()
        classes = set((dict(attributes).get("class") or "").split())
        heading = dict(attributes).get("id") in SKIPPED_IDS
        skipped = self.skipping() or heading or tag in SKIPPED_TAGS or bool(classes & SKIPPED_CLASSES)
        self.open.append((tag, skipped))
        self.listing |= tag == "pre"

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag in VOID or tag not in [name for name, _ in self.open]:
            return
        if tag in BLOCKS:
            self.close_block()
        while self.open.pop()[0] != tag:
            pass
        self.listing = any(name == "pre" for name, _ in self.open)

    def handle_data(self, data):
        if not self.skipping():
            self.words.append(data)


def page(path):
    parser = Blocks()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close_block()
    return "\n\n".join(parser.blocks) + "\n\n"


def pages(folder):
    """(chapter, file), in reading order."""
    name = "index.html"
    while name:
        html = (folder / name).read_text(encoding="utf-8")
        title = re.search(r"<title[^>]*>(.*?)</title>", html, re.S).group(1)
        found = re.match(r"(?:Chapter )?(\d+)\.", title)
        if found:
            yield int(found.group(1)), folder / name
        following = re.search(r'<link rel="next" href="([^"#]+)"', html)
        name = following and following.group(1)


def main():
    package, out = map(Path, sys.argv[1:])
    book = list(pages(package / "usr/share/doc/debian-handbook/html/en-US"))
    out.mkdir(parents=True, exist_ok=True)
    for name, chapters in CHAPTERS.items():
        rows = [json.dumps({"text": page(path)}, ensure_ascii=False) + "\n" for number, path in book if number in chapters]
        (out / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"{name}.jsonl\t{len(rows)} pages\t{sum(map(len, rows))} characters")


if __name__ == "__main__":
    main()
