"""A network of the zoo trained by the Trainer of transformers, grafted into the graphs of its exporters.

Saves the base with `save_pretrained`, trains all of it for a few steps on random tokens, saves the result the same way, and lets
`interlace graft` write it into each graph. ONNX Runtime's logits for a prompt are then compared with PyTorch's.

usage: graft_trained.py ZOO INTERLACE WORK      e.g. graft_trained.py fixtures/zoo target/release/interlace /tmp/graft
"""
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import Trainer, TrainingArguments

import graft

GRAPHS = [
    "llama/dyn18-ids.onnx", "llama/optimum-O2.onnx", "llama/ts17-noname.onnx", "optimum/llama-with-past", "genai/llama-fp32-embeds",
]


class Tokens(torch.utils.data.Dataset):
    def __init__(self, vocabulary):
        self.rows = torch.randint(0, vocabulary, (64, 24), generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return {"input_ids": self.rows[number], "labels": self.rows[number]}


def saved(zoo, work):
    model = graft.network("llama")
    model.load_state_dict(graft.checkpoint(zoo, "llama"), strict=False)
    model.save_pretrained(work / "base")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = TrainingArguments(
        output_dir=work / "trainer", max_steps=12, learning_rate=2e-3, per_device_train_batch_size=8, save_strategy="no",
        report_to=[], use_cpu=True, seed=1, disable_tqdm=True,
    )
    Trainer(model=model, args=settings, train_dataset=Tokens(model.config.vocab_size)).train()
    model.save_pretrained(work / "trained")
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    print(f"{len(moved)} of {len(before)} tensors changed")
    return model.eval()


def feeds(session, config, ids, embeddings):
    given = {}
    for port in session.get_inputs():
        dtype = np.float32 if "float" in port.type else np.int64
        if "past" in port.name or len(port.shape) == 4:
            given[port.name] = np.zeros([1, config.num_key_value_heads, 0, config.head_dim], dtype)
        elif len(port.shape) == 3:
            given[port.name] = embeddings
        elif "position" in port.name:
            given[port.name] = np.arange(ids.shape[1], dtype=dtype)[None]
        elif "mask" in port.name:
            given[port.name] = np.ones(ids.shape, dtype)
        else:
            given[port.name] = ids.astype(dtype)
    return given


def main():
    zoo, interlace, work = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    work.mkdir(parents=True)
    model = saved(zoo, work)
    ids = torch.randint(0, model.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        want = model(ids).logits.numpy()
        embeddings = model.get_input_embeddings()(ids).numpy()
    for number, graph in enumerate(GRAPHS):
        out = work / f"out{number}"
        leave = ["--leave-out", "model.embed_tokens"] if "embeds" in graph else []
        subprocess.run(
            [interlace, "graft", zoo / graph, "--base", work / "base", "--tuned", work / "trained", "-o", out, "--quiet", *leave],
            check=True,
        )
        names = [Path(graph).name, "model.onnx", "decode.onnx"]
        path = next(out / name for name in names if (out / name).is_file()) if out.is_dir() else out
        session = onnxruntime.InferenceSession(path)
        found = session.run(None, feeds(session, model.config, ids.numpy(), embeddings))
        logits = next(value for value in found if value.shape == want.shape)
        print(f"{graph}: largest difference {np.abs(logits - want).max():.1e}, of logits up to {np.abs(want).max():.1f}")


if __name__ == "__main__":
    main()
