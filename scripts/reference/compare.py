#!/usr/bin/env python3
"""Finetunes one pruned model alternately with `interlace finetune` and with the Hugging Face Trainer, and prints both results.

Both use the same plan, samples, order, batches, learning rate and number of steps, in float32, with the same number of
threads and without gradient checkpointing. The Trainer's samples are precomputed merged embeddings, so its time excludes the
pictures; `interlace` prepares its samples inside the run, and its rate is printed with and without this work.

    python3 scripts/reference/compare.py --interlace target/release/interlace --model fixtures/model \
        --data fixtures/data/finetune.parquet --bench fixtures/data/bench.tsv --work /tmp/compare

Output: the losses of every step, tokens per second and peak memory of each round, tokens per second of processor time (which
depends little on other load of the machine), and the scores of both results by `interlace eval`. With `--device cuda` both
train on the first GPU, and the peak memory is the most that each side's tensors take there. Needs numpy, onnx,
onnxruntime, pillow, pyarrow, torch, transformers and accelerate.
"""

import argparse
import io
import json
import math
import os
import pathlib
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time

BATCH, LEARNING_RATE, WARMUP_RATIO = 16, 1e-3, 0.03
DECODER = pathlib.Path("onnx", "decoder_model_merged.onnx")
PROJECTIONS = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]


def initializers(path):
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    return model, {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def linears(model, weights):
    """Names of the decoder's matrices in execution order: seven per layer, then the head."""
    return [n.input[1] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]


def prepare(arguments):
    """Writes what the Trainer needs: weights, configuration, and each sample's embeddings, ids and answer mask."""
    import numpy as np
    import onnxruntime
    import pyarrow.parquet
    from PIL import Image
    from transformers import AutoTokenizer

    root, work = arguments.work / "pruned", arguments.work / "peer"
    work.mkdir()
    config = json.loads((root / "config.json").read_text())
    model, weights = initializers(root / DECODER)
    names = linears(model, weights)
    count = config["text_config"]["num_hidden_layers"]
    assert len(names) == 7 * count + 1, len(names)
    state = {f"model.layers.{n // 7}.{PROJECTIONS[n % 7]}.weight": weights[name].T for n, name in enumerate(names[:-1])}
    norms = [name for name in weights if name.endswith("norm.weight")]
    order = sorted({int(name.split(".")[2]) for name in norms if ".layers." in name})
    for name in norms:
        parts = name.split(".")
        if ".layers." in name:
            parts[2] = str(order.index(int(parts[2])))
        state[".".join(parts)] = weights[name]
    state["lm_head.weight"] = weights[names[-1]].T
    np.savez(work / "weights.npz", **state)
    (work / "config.json").write_text(json.dumps(config["text_config"]))

    tokenizer = AutoTokenizer.from_pretrained(root)
    session = lambda name: onnxruntime.InferenceSession(root / "onnx" / name)
    vision, embed = session("vision_encoder.onnx"), session("embed_tokens.onnx")
    image_token = config["image_token_id"]
    texts = {}
    pictures = {}
    for number, row in enumerate(pyarrow.parquet.read_table(arguments.data).to_pylist()):
        pictures[number] = row["images"][0]["bytes"]
        for turn, pair in enumerate(row["texts"]):
            texts[number, turn] = (pair["user"], pair["assistant"])
    order = json.loads((arguments.work / "order.json").read_text())
    every, samples = [], []
    features = {}
    for name in order:
        turn, number = (int(part) for part in re.match(r"turn (\d+) of row (\d+) of ", name).groups())
        if number not in features:
            picture = np.asarray(Image.open(io.BytesIO(pictures[number])).convert("RGB"))
            pixels = picture.transpose(2, 0, 1)[None, None].astype(np.float32) / 127.5 - 1
            mask = np.ones((1, 1, *pixels.shape[3:]), bool)
            features[number] = vision.run(None, {"pixel_values": pixels, "pixel_attention_mask": mask})[0]
        user, assistant = texts[number, turn]
        patches = features[number].reshape(-1, features[number].shape[-1])
        before = (f"<|im_start|>User:<fake_token_around_image><global-img>{'<image>' * len(patches)}"
                  f"<fake_token_around_image>{user}<end_of_utterance>\nAssistant:")
        prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"{before} {assistant}<end_of_utterance>\n", add_special_tokens=False)["input_ids"]
        ids = np.array(ids)
        embeds = embed.run(None, {"input_ids": ids[None]})[0][0]
        embeds[ids == image_token] = patches
        every.append(embeds)
        answer = tokenizer(f" {assistant}<end_of_utterance>", add_special_tokens=False)["input_ids"]
        samples.append({"ids": ids.tolist(), "prompt": len(prompt), "end": len(prompt) + len(answer)})
    np.save(work / "embeds.npy", np.concatenate(every))
    (work / "samples.json").write_text(json.dumps(samples))


def train(arguments):
    """The Trainer's run, in a process of its own; prints one JSON object."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.set_num_threads(arguments.threads)
    work = arguments.work / "peer"
    config = json.loads((work / "config.json").read_text())
    foreign = {"architectures", "dtype", "model_type", "_name_or_path", "tie_word_embeddings"}
    config = LlamaConfig(**{k: v for k, v in config.items() if k not in foreign}, tie_word_embeddings=False)
    net = LlamaForCausalLM(config).float()
    with np.load(work / "weights.npz") as weights:
        state = {name: torch.from_numpy(np.array(weights[name])) for name in weights.files}
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert missing == ["model.embed_tokens.weight"] and not unexpected, (missing, unexpected)
    net.requires_grad_(False)
    for layer in json.loads((arguments.work / "layers.json").read_text()):
        net.model.layers[layer].requires_grad_(True)
    embeds = np.load(work / "embeds.npy", mmap_mode="r")
    samples, start = json.loads((work / "samples.json").read_text()), 0
    for sample in samples:
        sample["start"] = start
        start += len(sample["ids"])

    def collate(batch):
        longest = max(len(sample["ids"]) for sample in batch)
        rows = torch.zeros(len(batch), longest, embeds.shape[1])
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest), -100)
        for row, sample in enumerate(batch):
            length = len(sample["ids"])
            rows[row, :length] = torch.from_numpy(np.array(embeds[sample["start"]:sample["start"] + length]))
            mask[row, :length] = 1
            labels[row, sample["prompt"]:sample["end"]] = torch.tensor(sample["ids"][sample["prompt"]:sample["end"]])
        return {"inputs_embeds": rows, "attention_mask": mask, "labels": labels}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    steps = len(samples) // BATCH
    settings = TrainingArguments(
        output_dir=str(work / "out"), per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, max_steps=steps,
        learning_rate=LEARNING_RATE, lr_scheduler_type="cosine", warmup_steps=math.ceil(WARMUP_RATIO * steps),
        weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=arguments.device == "cpu", disable_tqdm=True, remove_unused_columns=False, label_names=["labels"], seed=42)
    trainer = InOrder(model=net, args=settings, train_dataset=samples, data_collator=collate)
    began, worked = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = {name: p.detach().cpu().numpy() for name, p in net.named_parameters() if p.requires_grad}
    np.savez(work / "trained.npz", **trained)
    print(json.dumps({
        "losses": losses, "seconds": seconds, "cpu_seconds": worked, "tokens": start,
        "answer_tokens": sum(sample["end"] - sample["prompt"] for sample in samples),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if arguments.device == "cpu"
        else torch.cuda.max_memory_allocated(),
    }))


def put_back(arguments):
    """The pruned model with the Trainer's weights, as a folder that `interlace eval` reads."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    target = arguments.work / "peer-model"
    shutil.copytree(arguments.work / "pruned", target)
    model, weights = initializers(target / DECODER)
    names = linears(model, weights)
    with np.load(arguments.work / "peer" / "trained.npz") as trained:
        new = {}
        for key in trained.files:
            _, _, layer, *rest = key.split(".")
            module = ".".join(rest[:-1])
            if module in PROJECTIONS:
                new[names[7 * int(layer) + PROJECTIONS.index(module)]] = trained[key].T
            else:
                norms = sorted((n for n in weights if n.endswith(f".{module}.weight")), key=lambda n: int(n.split(".")[2]))
                new[norms[int(layer)]] = trained[key]
    for tensor in model.graph.initializer:
        if tensor.name in new:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(new.pop(tensor.name)), tensor.name))
    assert not new, list(new)
    onnx.save(model, target / DECODER, save_as_external_data=True, location=DECODER.name + "_data", size_threshold=1024)


def run(command, **options):
    result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, **options)
    if result.returncode:
        sys.exit(f"compare: {' '.join(map(str, command))} failed")
    return result.stdout


def ours(arguments, steps, name):
    """One run of `interlace finetune`: its report, its steps' metrics, and the wall and CPU seconds that all of it took."""
    target = arguments.work / name
    for folder in (target, target.with_name(name + ".work")):
        shutil.rmtree(folder, ignore_errors=True)
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    began, worked = time.perf_counter(), used()
    text = run([
        arguments.interlace, "finetune", arguments.work / "pruned", "--plan", arguments.work / "plan.json",
        "--recipe", "paper", "--data", arguments.data, "--turns", "separate", "--samples", steps * BATCH, "--learning-rate", LEARNING_RATE,
        "--batch-size", BATCH, "--accumulation-steps", 1, "--precision", "f32", "--device", arguments.device,
        "-o", target, "--quiet", "--json",
    ], env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)})
    seconds, worked = time.perf_counter() - began, used() - worked
    lines = (target.with_name(name + ".work") / "metrics.jsonl").read_text().splitlines()
    return json.loads(text), [json.loads(line) for line in lines], seconds, worked


def scores(arguments, folder):
    report = arguments.work / f"{folder}.report.json"
    report.unlink(missing_ok=True)
    run([arguments.interlace, "eval", arguments.work / folder, "--data", arguments.bench, "-o", report, "--quiet"])
    return json.loads(report.read_text())


def compare(arguments):
    arguments.work.mkdir(parents=True)
    tool, work = arguments.interlace, arguments.work
    plan = json.loads(run([tool, "plan", arguments.model, "--drop", arguments.drop, "-o", work / "plan.json", "--json"]))
    run([tool, "prune", arguments.model, "--plan", work / "plan.json", "-o", work / "pruned", "--quiet"])
    report, metrics, *_ = ours(arguments, arguments.steps, "ours")
    (work / "layers.json").write_text(json.dumps(report["layers"]))
    (work / "order.json").write_text(json.dumps([name for step in metrics for name in step["samples"]]))
    here = [sys.executable, __file__, "--work", work, "--data", arguments.data, "--threads", arguments.threads,
            "--device", arguments.device]
    run([*here, "--part", "prepare"])
    rounds = {"interlace": [], "interlace, all of it": [], "Trainer": []}
    busy = {"interlace, all of it": [], "Trainer": []}
    memory = {"interlace": [], "Trainer": []}
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    for _ in range(arguments.rounds):
        report, metrics, seconds, worked = ours(arguments, arguments.steps, "ours")
        peer = json.loads(run([*here, "--part", "train"], env=environment).splitlines()[-1])
        for what in ["tokens", "answer_tokens"]:
            assert peer[what] == report[what], (what, peer[what], report[what])
        rounds["interlace"].append(report["tokens_per_s"])
        rounds["interlace, all of it"].append(report["tokens"] / seconds)
        rounds["Trainer"].append(peer["tokens"] / peer["seconds"])
        busy["interlace, all of it"].append(report["tokens"] / worked)
        busy["Trainer"].append(peer["tokens"] / peer["cpu_seconds"])
        peak = "peak_memory_bytes" if arguments.device == "cpu" else "peak_gpu_memory_bytes"
        memory["interlace"].append(report[peak] / 1e6)
        memory["Trainer"].append(peer["peak_memory_bytes"] / 1e6)
    print("| step | interlace | Trainer | apart |\n|---:|---:|---:|---:|")
    worst = 0.0
    for number, (own, other) in enumerate(zip(metrics, peer["losses"]), 1):
        apart = abs(own["loss"] - other) / abs(other)
        if number <= 50:
            worst = max(worst, apart)
        print(f"| {number} | {own['loss']:.6f} | {other:.6f} | {apart:.1e} |")
    print(f"\nlargest relative difference in the first 50 steps: {worst:.1e}\n")
    print("| | tokens/s by round | median | per CPU second | peak memory, MB |\n|---|---|---:|---:|---:|")
    for name, rates in rounds.items():
        peak = f"{statistics.median(memory[name]):.0f}" if name in memory else ""
        effort = f"{statistics.median(busy[name]):.0f}" if name in busy else ""
        each = ", ".join(f"{rate:.0f}" for rate in rates)
        print(f"| {name} | {each} | {statistics.median(rates):.0f} | {effort} | {peak} |")
    faster = statistics.median(rounds["interlace"]) / statistics.median(rounds["Trainer"])
    smaller = statistics.median(memory["interlace"]) / statistics.median(memory["Trainer"])
    print(f"\n{faster:.2f} times the tokens/s, {smaller:.2f} of the peak memory\n")
    if arguments.bench:
        put_back(arguments)
        for name, folder in [("interlace", "ours"), ("Trainer", "peer-model")]:
            print(f"{name}: average score {100 * scores(arguments, folder)['model']['mean_of_groups']:.2f}")
    if worst > 1e-3:
        sys.exit("compare: the losses are more than 1e-3 apart")
    if arguments.device == "cpu" and (faster < 1.9 or smaller > 0.5):
        sys.exit("compare: expected at least 1.9 times the tokens/s at 0.5 of the memory or less")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interlace", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--bench", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for both sides; peak memory is then the tensors' on the GPU")
    parser.add_argument("--drop", default="3,6,8,13", help="layers to drop")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--part", choices=["prepare", "train"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    {"prepare": prepare, "train": train, None: compare}[arguments.part](arguments)


if __name__ == "__main__":
    main()
