"""onnxruntime-genai's model builder, in an environment with onnxruntime-genai.

A variant is a precision with options appended: `fp32`, `fp32-embeds`, `fp16`, `int4`, `int4-qdq`, `int4-gather` (the
embeddings quantised too), `int4-shared` (one quantised table for embeddings and head, of a network that ties them),
`int8`.

usage: genai_export.py OUT_DIR WEIGHTS_DIR VARIANT...      WEIGHTS_DIR comes from save_weights.py
"""
import argparse
import traceback
from pathlib import Path

OPTIONS = {
    "embeds": {"exclude_embeds": True},
    "qdq": {"use_qdq": True},
    "gather": {"int4_op_types_to_quantize": ("MatMul", "Gather")},
    "shared": {"shared_embeddings": True, "int4_algo_config": "rtn"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("variants", nargs="+")
    args = parser.parse_args()
    from onnxruntime_genai.models import builder

    # The networks have no tokenizer to copy and no generation settings.
    builder.Model.save_processing = lambda *_: None
    builder.Model.make_genai_config = lambda *_: None
    for variant in args.variants:
        precision, *words = variant.split("-")
        options = {key: value for word in words for key, value in OPTIONS[word].items()}
        if precision == "int8":
            precision = "int4"
            options["int4_algo_config"] = "k_quant_mixed"
        target = args.out / f"{args.weights.name}-{variant}"
        try:
            builder.create_model("", str(args.weights), str(target), precision, "cpu", str(target / "cache"), **options)
            print(f"{target.name}\tok", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(f"{target.name}\tfailed: {type(error).__name__}: {str(error)[:200]}", flush=True)


if __name__ == "__main__":
    main()
