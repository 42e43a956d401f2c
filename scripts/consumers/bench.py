"""Rows of a benchmark file as VLMEvalKit writes them, with the prompts of `interlace eval`."""
import base64
import csv
import io
import sys

from PIL import Image

csv.field_size_limit(sys.maxsize)


def rows(path, count):
    with open(path, newline="", encoding="utf-8") as file:
        every = list(csv.DictReader(file, delimiter="\t"))
    cells = {row["index"]: row["image"] for row in every}
    for row in every[:count]:
        cell = row["image"] if len(row["image"]) > 64 else cells[row["image"]]
        picture = Image.open(io.BytesIO(base64.b64decode(cell))).convert("RGB")
        yield row["index"], prompt(row), picture


def prompt(row):
    letters = [letter for letter in "ABCDEFGH" if row.get(letter)]
    if not letters:
        return row["question"]
    options = "".join(f"{letter}. {row[letter]}\n" for letter in letters)
    return f"Question: {row['question']}\nOptions:\n{options}Please select the correct answer from the options above. \n"


def encoded(processor, text, picture):
    """The processor's arrays for one question about one picture."""
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    return processor(text=[text], images=[[picture]], return_tensors="np", add_special_tokens=False)
