"""Scores of VLMEvalKit's own code for predictions at the edges of its rules. Run by hand.

    python scripts/vlmevalkit/golden.py CHECKOUT OUT

CHECKOUT is a checkout of open-compass/VLMEvalKit, OUT the file for the rows of each benchmark with their predictions and
scores. The judging functions are those of the checkout; only their imports from the rest of the package (logging, file formats)
are replaced. Needs numpy and pandas.
"""
import ast
import json
import pathlib
import random
import string
import sys
import types

import numpy as np
import pandas as pd

checkout, out = map(pathlib.Path, sys.argv[1:])
random.seed(20260101)


def functions(path, names, scope):
    """Runs the named top-level definitions of a file in `scope`."""
    tree = ast.parse((checkout / path).read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names
                 or isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names]
    assert len(tree.body) == len(names), (path, names)
    exec(compile(tree, path, "exec"), scope)
    return scope


class Log:
    def __getattr__(self, _):
        return lambda *_a, **_k: None


base = dict(np=np, pd=pd, string=string, os=__import__("os"), re=__import__("re"), cp=__import__("copy"), logger=Log(),
            defaultdict=__import__("collections").defaultdict, Optional=__import__("typing").Optional)
misc = functions("vlmeval/smp/misc.py", ["process_punctuation", "istype"], dict(base))
match = functions("vlmeval/utils/matching_util.py", ["_VERBOSE_ANSWER_RE", "can_infer_option", "can_infer_text", "can_infer"],
                  dict(base))
mcq = functions("vlmeval/dataset/utils/multiple_choice.py",
                ["build_choices", "prefetch_answer", "prefetch_circular_group", "MMMU_preproc"], dict(base, **match))
vqa = functions("vlmeval/dataset/utils/vqa_eval.py",
                ["_process_digit_article", "hit_calculate", "relaxed_correctness", "levenshtein_distance", "anls_compute",
                 "process_answer", "process_line"],
                dict(base, **misc, listinstr=lambda lst, s: any(item in s for item in lst)))
yorn = functions("vlmeval/dataset/utils/yorn.py",
                 ["AMBER_rating", "MME_rating", "Hallusion_rating", "POPE_rating", "YOrN_Extraction"],
                 dict(base, **misc, load=lambda data: data.copy(), d2df=lambda d: d))
hrbench = functions("vlmeval/dataset/utils/hrbench.py", ["report_acc_hrbench", "hrbench_score"], dict(base))

SPACES = ["", " ", "  ", "\n", "\t", "\u00a0", "\u3000", "\x1f"]
WORDS = ["cat", "dog", "hot dog", "a", "the", "red", "two", "none", "dont", "couldn'tve", "Mr.", "somebody'd", "It's", "İstanbul", "straße"]


def space():
    return random.choice(SPACES)


def choice_prediction(options):
    letters = list(options)
    letter = random.choice(letters + ["E", "Z", "b"])
    text = str(random.choice(list(options.values())))
    filler = " ".join(random.choice(["so", "then", "because", "it", "is", "A", "I", "think"]) for _ in range(random.randint(0, 9)))
    return random.choice([
        letter, f"{letter}.", f"({letter})", f"**{letter}**", f"{letter}: {text}", f"The answer is {letter}", text, text.upper(),
        f"{filler} {letter}", f"{letter} {filler}", f"The correct answer is **{letter}**. Here's why: {filler} {filler}",
        f"answer  is\n{letter.lower()} {filler} {filler}", f"{letter} or {random.choice(letters)}", f"{text} {filler} {filler} {filler}",
        "Sorry, I can't help with images of people yet.", "I can't process this file. B", "Cannot determine the answer",
        "I'm sorry, but without the image provided B", "Failed to obtain answer via API. B", "Z", "", " ", f"{letter}{space()}",
        f"the answer is {letter}, not that the answer is {random.choice(letters)}", f"{{{letter}}}", f"#{letter}!", f"[{letter}];",
        f"{letter} {letter}", f"Option {letter} with {text}", f"{text} and {random.choice(list(options.values()))}",
    ])


def options_of(number):
    pool = ["cat", "dog", "hot dog", "Red", "red car", "3", "3.5", "None of these", "a", "left of it", "İ", "straße", "no", "yes"]
    return dict(zip("ABCDEF", random.sample(pool, number)))


def choices(count, **columns):
    rows = []
    for index in range(count):
        options = options_of(random.choice([2, 3, 4, 4, 4, 6]))
        rows.append(dict(index=index, question=f"q{index}", **options, answer=random.choice(list(options)),
                         prediction=choice_prediction(options), **{k: random.choice(v) for k, v in columns.items()}))
    return pd.DataFrame(rows)


def vanilla(data):
    return np.array([float(mcq["prefetch_answer"](item) == item["answer"]) for _, item in data.iterrows()])


def circular(groups, categories):
    rows = []
    for group in range(1, groups + 1):
        options = options_of(4)
        answer = random.choice("ABCD")
        careful, category = random.random() < 0.7, random.choice(categories)
        for turn in range(random.choice([2, 4])):
            letters = "ABCD"
            turned = {letter: options[letters[(i + turn) % 4]] for i, letter in enumerate(letters)}
            right = letters[(letters.index(answer) - turn) % 4]
            said = right if careful and random.random() < 0.95 else None
            rows.append(dict(index=group + turn * 1_000_000, question=f"q{group}", **turned, answer=right, category=category,
                             prediction=said or choice_prediction(turned)))
    lonely = rows[-1].copy()
    lonely["index"] = 5_000_999
    return pd.DataFrame(rows + [lonely])


def circular_score(data):
    """As `mcq_circular_eval` does without a judge, up to its files."""
    data = data.copy()
    data["g_index"] = [int(x % 1e6) for x in data["index"]]
    data["GT"] = data["answer"]
    main = data[data["index"] == data["g_index"]].copy()
    hits = []
    for index in main["index"]:
        found = mcq["prefetch_circular_group"](data[data["g_index"] == index])
        hits.append(found["hit"] if found is not None else 0)
    main["hit"] = hits
    return main


def number_prediction(value):
    return random.choice([
        str(value), f"{value}%", f"{value * 1.05:.6g}", f"{value * 1.0501:.6g}", f"{value * 0.95:.6g}", f" {value} ", f"{value}.", f"{value:.3e}",
        "inf", "nan", "-inf", f"1_{abs(int(value))}", f"{int(value):,}", f"{value} %", f"{value}%%", "0", "0.0", "ten", f"+{value}", "٣", "1e400", "Red", "red",
    ])


def vqa_rows(count, listed, make):
    rows = []
    for index in range(count):
        answers, prediction = make()
        cell = repr(answers) if listed or len(answers) > 1 else answers[0]
        rows.append(dict(index=index, question=f"q{index}", answer=cell, prediction=prediction))
    return pd.DataFrame(rows)


def text_answer():
    words = [random.choice(WORDS) for _ in range(random.randint(1, 3))]
    return " ".join(words) + random.choice(["", ".", "!", ",", " ?"])


def noisy(text):
    return random.choice([
        text, text.upper(), text.lower(), f"{space()}{text}{space()}", text.replace(" ", "  "), text + ".", text.replace("a", "-"), f"the {text}",
        f"{text}, 1,000", f"5. {text}", f"{text} 3.5.", "..." * 12 + text + "." * 9, f"{text}/{text}", f"{text} / {text}", text.replace("\n", " "), text[:-1] or "x", "zzz", "",
        f"it says {text} here", f"{text}\n", f"[{text}]", f"{text}@x", "two", "2", "none", "0",
    ])


def judged(data, dataset, method):
    data = data.copy()
    data["prediction"] = [str(x) for x in data["prediction"]]
    data["answer"] = [str(x) for x in data["answer"]]
    lines = [vqa["process_line"](line, method) for _, line in data.iterrows()]
    return np.array([float(x) for x in vqa["hit_calculate"](lines, dataset)])


def yes_no_prediction():
    return random.choice(["yes", "Yes.", "No", "no!", "Yes, there is", "yes and no", "nothing", "", "I know", "no-one", "yes/no", "YES", "No; never", "not", "yes?no",
                          "Yes\n", "no\x1f", "eyes", "yes,sir", "1,000 yes"])


def yes_no(count, **columns):
    rows = [dict(index=i, question=f"q{i}", answer=random.choice(["Yes", "No"]), prediction=yes_no_prediction(),
                 **{k: random.choice(v) for k, v in columns.items()}) for i in range(count)]
    data = pd.DataFrame(rows)
    data["extracted"] = [yorn["YOrN_Extraction"](x) for x in data["prediction"]]
    data["score"] = data["answer"] == data["extracted"]
    return data


tables, scores = {}, {}


def keep(name, data, rows, headline, **figures):
    tables[name] = data.drop(columns=[c for c in ("extracted", "score", "set_id", "figure_id", "question_id") if c in data])
    scores[name] = dict(headline=float(headline), rows=[float(x) for x in rows],
                        figures={k: float(v) for k, v in figures.items()})


for name in ["AI2D_TEST", "VStarBench"]:
    data = choices(320, category=["x", "y"])
    hits = vanilla(data)
    keep(name, data, hits, hits.mean())

data = circular(150, ["a", "b", "c"])
main = circular_score(data)
hit_of = dict(zip(main["index"], main["hit"]))
keep("MMBench_DEV_EN_V11", data, [], main["hit"].mean(),
     **{f"category {c}": main[main["category"] == c]["hit"].mean() for c in "abc"})

data = choices(320, category=["single", "cross"], cycle_category=["0", "1", "2", "3"])
data["hit"] = vanilla(data)
report = hrbench["report_acc_hrbench"](data)
average = report[report["cycle"] == "Average"].set_index("type")["accuracy"]
keep("HRBench4K", data.drop(columns="hit"), data["hit"], average["all"],
     **{f"category {c}": average[c] for c in ("single", "cross")})

data = choices(320)
for i in range(0, 320, 3):
    for letter in "ABCDEF":
        data.loc[i, letter] = None
    data.loc[i, "answer"] = random.choice(["cat", "12", "A"])
    data.loc[i, "prediction"] = random.choice(["cat", "12", "A", "B", "Other answers", "it is a cat", "The answer is A"])
ready = mcq["MMMU_preproc"](data.copy())
ready["answer"] = [v if v in list(string.ascii_uppercase) else "A" for v in ready["answer"]]
hits = vanilla(ready)
keep("MMMU_DEV_VAL", data, hits, hits.mean())

def chart():
    value = random.choice([5, 100, 0, -3.5, 0.25, 1234, 7])
    gold = random.choice([str(value), f"{value}%", "Red", f"{value}.0", "0%", f" {value}", "nan"])
    return [gold], number_prediction(value)


data = vqa_rows(320, False, chart)
hits = judged(data, "ChartQA_TEST", "relaxed_accuracy")
keep("ChartQA_TEST", data, hits, hits.mean())


def annotated():
    right = text_answer()
    return [noisy(right) if random.random() < 0.5 else right for _ in range(10)], noisy(right)


data = vqa_rows(320, True, annotated)
hits = judged(data, "TextVQA_VAL", "vqa_score")
keep("TextVQA_VAL", data, hits, hits.mean())


def document():
    right = text_answer()
    return [right] + [noisy(right) or "x" for _ in range(random.randint(0, 2))], noisy(right)


data = vqa_rows(320, True, document)
hits = judged(data, "DocVQA_VAL", "anls")
keep("DocVQA_VAL", data, hits, hits.mean())

for name in ["OCRVQA_TESTCORE", "GQA_TestDev_Balanced"]:
    data = vqa_rows(320, name.startswith("OCR"), lambda: ([(r := text_answer())], noisy(r)) if name.startswith("GQA") else document())
    hits = judged(data, name, "accuracy")
    keep(name, data, hits, hits.mean())

# OCRBench judges inside a method with file access around it: its two lines are repeated here.
FORMULAS = "Handwritten Mathematical Expression Recognition"
categories = [FORMULAS, "Digit String Recognition", "Scene Text-centric VQA"]


def ocr():
    right = random.choice([r"\frac { a } { b }", "x ^ 2", "Coca Cola", "line\nbreak", "İx", "12 3"])
    return [right, "zz9"], random.choice([right, right.upper(), right.replace(" ", ""), f"it says {right} there", f" {right}\n", right.replace("\n", " "), "nothing", right[:-1]])


data = vqa_rows(320, True, ocr)
data["category"] = [random.choice(categories) for _ in range(len(data))]
hits = []
for _, line in data.iterrows():
    formula = line["category"] == FORMULAS
    predict, found = str(line["prediction"]), 0.0
    for answer in eval(line["answer"]):
        if formula:
            answer = answer.strip().replace("\n", " ").replace(" ", "")
            predict = predict.strip().replace("\n", " ").replace(" ", "")
        else:
            answer = answer.lower().strip().replace("\n", " ")
            predict = predict.lower().strip().replace("\n", " ")
        if answer in predict:
            found = 1.0
            break
    hits.append(found)
keep("OCRBench", data, hits, np.mean(hits), final_score=sum(hits), final_score_norm=sum(hits) / 10)

data = yes_no(320, category=["adversarial", "popular", "random", "adversarial,popular", "adversarial,popular,random"])
rated = yorn["POPE_rating"](data)
overall = rated.set_index("split")["Overall"] / 100
keep("POPE", data, data["score"], overall["Overall"],
     **{f"category {c}": overall[c] for c in ("adversarial", "popular", "random")})

names = ["OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene",
         "code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"]
data = yes_no(28 * 12)
data["category"] = [names[i // 2 % 14] for i in range(len(data))]
data["image_path"] = [f"{names[i // 2 % 14]}/{i // 28}.png" for i in range(len(data))]
rated = yorn["MME_rating"](data)
keep("MME", data, data["score"], np.mean([rated[name] for name in names]) / 200,
     **{f"category {name}": rated[name] / 200 for name in names})

data = yes_no(320)
data["l2-category"] = [random.choice(["chart", "map"]) for _ in range(len(data))]
data["category"] = [random.choice(["VD", "VS"]) for _ in range(len(data))]
data["index"] = [f"{i}_x_y_{i // 40}_{i // 5 % 4}_{i % 5}" for i in range(len(data))]
rated = yorn["Hallusion_rating"](data).set_index("split").loc["Overall"] / 100
keep("HallusionBench", data, data["score"], rated["aAcc"], a_acc=rated["aAcc"], f_acc=rated["fAcc"], q_acc=rated["qAcc"])

data = yes_no(320, category=["discriminative-attribute-state", "discriminative-attribute-number", "discriminative-hallucination",
                             "discriminative-relation", "relation", "other"])
data["answer"] = [random.choice([a, a.lower()]) for a in data["answer"]]
data["image_path"] = [f"{i // 3}.png" for i in range(len(data))]
data["score"] = data["answer"].str.lower() == data["extracted"].str.lower()
rated = yorn["AMBER_rating"](data)
keep("AMBER", data, data["score"], rated["Avg ACC"] / 100)

for name, data in tables.items():
    rows = json.loads(data.to_json(orient="records"))
    scores[name]["data"] = [{k: v for k, v in row.items() if v is not None} for row in rows]
out.write_text(json.dumps(scores, ensure_ascii=True, separators=(",", ":")))
print({name: (len(data), round(scores[name]["headline"], 4)) for name, data in tables.items()})
