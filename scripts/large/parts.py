"""Print what a planned run needs, part by part, beside a trainer that keeps everything.

usage: parts.py SIZE LORA.json PLAIN.json, two plans of `finetune --dry-run --json`: the run with adapters and a limit, and the
run that trains all weights of the trained layers in f32 without gradient checkpointing, on the same samples.

Of the second, every number is from its plan but two. Weights: f32 copies of all frozen weights, which are 16-bit in the file. Rows:
the dense model's stream behind every trained layer for all tokens, which this product computes for the tokens of the fit alone.
"""
import json
import sys

size, lora, plain = sys.argv[1], *(json.load(open(path)) for path in sys.argv[2:4])


def held(plan, place, phase, *names):
    own = [item for item in plan["bytes"] if item["place"] == place and phase in (None, item["phase"])]
    return sum(item["bytes"] for item in own if not names or item["what"] in names)


def rows(plan, every):
    if every:
        tokens = plan["data"]["tokens"]
        scale = [tokens / target["tokens"] if "stream" in target["what"] else 1 for target in plan["targets"]]
        return sum(target["bytes"] * times for target, times in zip(plan["targets"], scale))
    return sum(target["bytes"] for target in plan["targets"] if target["written"])


def weights(plan, every):
    frozen = held(plan, "memory", "steps", "frozen weights", "connector's weights")
    own = held(plan, "memory", "steps", "trained weights", "connector's adapters", "fitted weights", "weights in use",
               "trained weights in bf16")
    return (2 * frozen + held(plan, "memory", "steps", "trained weights")) if every else frozen + own


state = "gradients", "optimiser state", "mean of the weights"
activations = "activations", "connector's activations"
table = [("weights", weights)]
table += [(what, lambda plan, _, names=names: held(plan, "memory", "steps", *names))
          for what, names in (("gradients, moments and mean", state), ("activations and logits of a pass", activations))]
table += [("rows on disk", rows), ("checkpoint on disk", lambda plan, _: held(plan, "disk", None, "checkpoint"))]
gigabytes = lambda number: f"{number / 1e9:.1f} GB"
print(f"| {size}, steps | `lora`, {lora['memory_limit_bytes'] / 1e9:.0f} GB | everything kept |\n|---|---:|---:|")
for what, of in table:
    print(f"| {what} | {gigabytes(of(lora, False))} | {gigabytes(of(plain, True))} |")
data = lora["data"]
print(f"{data['samples']} samples of {data['tokens'] // data['samples']} tokens; the run takes at most {gigabytes(lora['memory_bytes'])}, "
      f"fits: {lora['fits']}; passes of {lora['batch_tokens']} and {plain['batch_tokens']} tokens")
