"""Questions with the wording of VLMEvalKit's own code for some models, and its parsing of a judge's replies. Run by hand.

    python scripts/vlmevalkit/prompts.py CHECKOUT OUT

CHECKOUT is a checkout of open-compass/VLMEvalKit, OUT the file for the rows with their texts. The functions are those of
the checkout; only their imports from the rest of the package (files of pictures, lists of benchmarks) are replaced. Needs numpy
and pandas.
"""
import ast
import json
import os
import pathlib
import random
import re
import string
import sys
import types

import numpy as np
import pandas as pd

checkout, out = map(pathlib.Path, sys.argv[1:])
random.seed(20260102)

TYPES = {"MCQ": ["MMBench_DEV_EN_V11", "CCBench", "MMStar", "SEEDBench_IMG", "AI2D_TEST", "AI2D_TEST_NO_MASK", "ScienceQA_TEST",
                 "MMMU_DEV_VAL", "RealWorldQA", "HRBench4K"],
         "Y/N": ["MME", "HallusionBench", "POPE", "AMBER"],
         "VQA": ["ChartQA_TEST", "DocVQA_VAL", "InfoVQA_VAL", "TextVQA_VAL", "OCRVQA_TESTCORE", "OCRBench", "GQA_TestDev_Balanced",
                 "MIA-Bench"]}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names}
# Classes whose `build_prompt` asks for a word or a phrase.
WORD = ["ChartQA_TEST", "DocVQA_VAL", "InfoVQA_VAL", "TextVQA_VAL", "OCRVQA_TESTCORE", "GQA_TestDev_Balanced"]


def parts(path, wanted, scope):
    """Runs the named top-level definitions of a file, of classes only the named methods."""
    tree = ast.parse((checkout / path).read_text())
    body = []
    for node in tree.body:
        name = getattr(node, "name", None)
        if name in wanted:
            if isinstance(node, ast.ClassDef):
                node.bases, node.keywords, node.decorator_list = [], [], []
                node.body = [item for item in node.body if getattr(item, "name", None) in wanted[name]]
                assert len(node.body) == len(wanted[name]), (name, wanted[name])
            body.append(node)
    assert len(body) == len(wanted), (path, list(wanted))
    tree.body = body
    # A method that calls the class above it is told which one.
    code = ast.unparse(tree).replace("super().build_prompt(line)", "self.above(line)")
    code = re.sub(r"from vlmeval\.dataset import DATASET_TYPE|from transformers\.image_utils import load_image|import pandas as pd"
                  r"|import string", "pass", code)
    exec(compile(code, path, "exec"), scope)
    return scope


def listinstr(lst, s):
    return any(item in s for item in lst)


scope = dict(pd=pd, string=string, os=os, re=re, listinstr=listinstr, toliststr=lambda x: [x], load_image=lambda x: x,
             DATASET_TYPE=lambda name, default=None: TYPE_OF[name], DATASET_MODALITY=lambda name: "IMAGE", Image=types.SimpleNamespace(Image=int))
parts("vlmeval/smp/misc.py", {"cn_string": None}, scope)
parts("vlmeval/vlm/internvl/utils.py", {"build_multi_choice_prompt": None}, scope)
parts("vlmeval/dataset/image_base.py", {"ImageBaseDataset": ["build_prompt"]}, scope)
parts("vlmeval/dataset/image_mcq.py", {"ImageMCQDataset": ["build_prompt"]}, scope)
parts("vlmeval/dataset/image_vqa.py", {"ImageVQADataset": ["build_prompt"]}, scope)
parts("vlmeval/dataset/image_yorn.py", {"ImageYORNDataset": ["build_prompt"]}, scope)
parts("vlmeval/vlm/smolvlm.py", {"SmolVLM": ["build_prompt_default", "build_prompt_puremcq", "build_prompt_mmbench",
                                             "build_prompt_chartqa", "build_prompt_docvqa", "build_prompt_textvqa",
                                             "build_prompt_mathvista", "build_prompt_mmmu", "generate_inner"]}, scope)
parts("vlmeval/vlm/qwen3_vl/prompt.py", {"Qwen3VLPromptMixin": ["build_prompt", "_build_mmmu_prompt", "_build_mcq_prompt",
                                                               "_build_yorn_prompt", "_build_vqa_prompt"]}, scope)
parts("vlmeval/vlm/internvl/internvl_chat.py", {"InternVLChat": ["use_custom_prompt", "build_prompt"]}, scope)
parts("vlmeval/dataset/miabench.py", {"process_rawscore": None, "get_score_dict": None}, scope)


def dataset(name):
    class Dataset:
        meta_only, dataset_name = False, name

        def dump_image(self, line):
            return ["picture"]

        def above(self, line):
            return scope["ImageBaseDataset"].build_prompt(self, line)

        def build_prompt(self, line):
            kind = TYPE_OF[name]
            owner = {"MCQ": "ImageMCQDataset", "Y/N": "ImageYORNDataset"}.get(kind)
            owner = owner or ("ImageVQADataset" if name in WORD else "ImageBaseDataset")
            return scope[owner].build_prompt(self, line)
    return Dataset()


class Asked(Exception):
    pass


def smolvlm(name, line):
    class Model(scope["SmolVLM"]):
        def processor(self, text, images, return_tensors):
            raise Asked(text)
    model = Model()
    try:
        model.generate_inner(dataset(name).build_prompt(line), dataset=name)
    except Asked as asked:
        text = str(asked)
        return text.split("<|im_start|>User:", 1)[1].split("<end_of_utterance>")[0].replace("<image>", "")


def qwen(name, line):
    model = scope["Qwen3VLPromptMixin"]()
    model.dump_image = lambda line, dataset: ["picture"]
    return model.build_prompt(line, name)[-1]["value"]


def internvl(name, line):
    model = scope["InternVLChat"]()
    model.dump_image, model.use_mpo_prompt, model.use_cot = lambda line, dataset: ["picture"], False, False
    model._use_custom_prompt = True
    return model.build_prompt(line, name)[0]["value"]


STYLES = {"vlmevalkit": lambda name, line: dataset(name).build_prompt(line)[-1]["value"], "qwen3-vl": qwen, "smolvlm": smolvlm,
          "internvl": internvl}
ROWS = [
    dict(question="What is it?", A="cat", B="dog", hint=np.nan),
    dict(question="What is it?", A="cat", B="dog", C="an (A) owl", hint="Look at the ears."),
    dict(question="这是什么?", A="猫", B="狗", hint=np.nan),
    dict(question="Which?", A="猫", B="dog", hint=np.nan),
    dict(question=" Is it red? ", A=np.nan, B=np.nan, hint=np.nan),
    dict(question="Why\nso?", A=np.nan, B=np.nan, hint="A hint"),
]
prompts = []
for name, kind in TYPE_OF.items():
    for row in ROWS:
        if (kind == "MCQ") != isinstance(row["A"], str) and not (kind == "MCQ" and row["question"].startswith("Why")):
            continue
        line = pd.Series(dict(index=1, **{key: row.get(key, np.nan) for key in ["question", "A", "B", "C", "hint"]}))
        for style, write in STYLES.items():
            if style == "smolvlm" and name.startswith("MMMU"):
                continue
            # A hint without options ends VLMEvalKit's own function for SmolVLM.
            if style == "smolvlm" and name in ("MMBench_DEV_EN_V11", "CCBench") and not isinstance(row["A"], str):
                continue
            given = {key: value for key, value in row.items() if isinstance(value, str)}
            prompts.append(dict(benchmark=name, style=style, row=given, text=write(name, line)))

FORMS = ["score of component 1: {0}/{1}, score of component 2: {2}/{3}, total score: {4}/10. Because.",
         "Score of component 1: {0}/{1}, total score: {4}/10", "total score: {4}/10.", "score of component 1: {0}.5/{1}, total score: {4}/10.",
         "**score of component 1**: {0}/{1}, score of component 2: {2}/{3}, total: {4}/10. x", "a:{0}/{1}, b: {4}/10.",
         "score of component 1: {0} / {1}, score of component 2: {2}/ {3}, total score:  {4}/10 .", "a: {0}/0, b: {4}/10.",
         "score: {0}/{1}, score: {2}/{3}, score: 1/2, total score: {4}/10. More", "no scores here, none at all. x", "",
         "score of component 1: {0}/{1} points, total score: {4}/10.", "a: x: {0}/{1}, b: {4}/10.", "a: {0}/{1}/7, b: {4}/10/3",
         "a: -{0}/{1}, b: +{4}/10.", "a: {0}_0/{1}, b: {4}/10", "a: {0}/{1},\nscore of component 2: {2}/{3},\ntotal score: {4}/10\n"]
KINDS = ["['length', 'style']", "['describe']", "['a', 'b', 'c']", "['same', 'same']", "[]", "['mention', \"x\"]"]
grades = []
for number in range(150):
    kind = random.choice(KINDS)
    form = FORMS[number % len(FORMS)] if number < 60 else random.choice(FORMS)
    reply = form.format(random.randint(0, 5), random.randint(1, 5), random.randint(0, 5), random.randint(1, 5), random.randint(0, 10))
    try:
        found = scope["process_rawscore"](kind[2:-2].split("', '"), reply)
        total = found.pop("total_score")
    except Exception:
        found, total = {}, None
    grades.append(dict(types=kind, reply=reply, components=found, total=total))
frame = pd.DataFrame(grades)
averages = scope["get_score_dict"](
                                   frame.rename(columns={"types": "component_type"}), list(frame["reply"]))
out.write_text(json.dumps(dict(prompts=prompts, grades=grades, averages=averages), ensure_ascii=False, indent=0) + "\n")
print(len(prompts), "prompts,", len(grades), "replies,", sum(g["total"] is not None for g in grades), "of them read")
