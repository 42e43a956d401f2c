# Healed on text that the dense model writes itself: it goes on, at temperature 1, from the beginnings of every twelfth block of the
# three kinds. A part of `run`, whose names and functions it has. `angular-as-many` is healed on as many
# tokens of the three kinds.
angular
measure held-back dense "$model"
samples=32 batch=1
dense dense-all-16k 1e-4
if [ ! -e written-train.jsonl ]; then
    python3 - "$text/three-train.$suffix" >asked.jsonl <<'END'
import json
import sys

for number, line in enumerate(open(sys.argv[1])):
    if number % 12 == 0:
        asked = "Go on with this text:\n\n" + json.loads(line)["text"][:160]
        print(json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "-"}]}))
END
    "$interlace" generate "$model" --data asked.jsonl --temperature 1 --max-tokens 400 --quiet -o answers.jsonl >&2
    python3 -c 'import json, sys; [print(json.dumps({"text": json.loads(line)["answer"]})) for line in sys.stdin]' \
        <answers.jsonl >written-train.jsonl
fi
# `text` is a folder of texts by name; as many tokens as the model wrote.
samples=$(($(python3 -c 'import json, sys; print(sum(len(json.loads(line)["text"]) for line in sys.stdin))' <written-train.jsonl) / 2300))
batch=1
(text=$PWD && train angular-written written angular --layers all --teacher "$model" --recipe best --learning-rate 3e-4 \
    --settings "$settings/plain-kd.toml" --epochs 1)
measure held-back angular-written angular-written
heal angular-as-many angular plain-kd 3e-4 --epochs 1
