# The strategy `auto` by `interlace run`, healed on 4,096 tokens of three kinds of text. A part of `run`, whose names and functions it
# has. `interlace run` wants a benchmark: here one question of text.
mkdir -p auto
printf 'index\tquestion\tanswer\n0\tWhich file lists the sources of packages?\tsources.list\n' >auto/one.tsv
# Scores are on two sequences: every 180th block of the three kinds. `sleb` is left out: it measures some 190 losses of two sequences.
awk 'NR % 180 == 1' "$text/three-train.jsonl" >auto/calibration.jsonl
cat >auto/recipe.toml <<END
model = "../../model"
output = "run"

[calibration]
data = "calibration.jsonl"
fraction = 1.0

[plan]
drop_count = $drop
strategies = ["auto"]

[plan.auto]
candidates = ["shortgpt", "angular"]
step_tokens = 4096

[finetune]
data = "$text/three-train.jsonl"
samples = 8
held_back = 0.02
dense = { enabled = false }

[finetune.settings]
precision = "bf16"
fit = { enabled = false }
kd = { temperature = 1.0 }
batch = { size = 1, accumulation_steps = 1 }
optimizer = { learning_rate = 3e-4 }
schedule = { epochs = 1 }

[eval]
benchmarks = ["one.tsv"]

[bench]
enabled = false
END
"$interlace" run auto/recipe.toml 2>auto/log || { cat auto/log >&2; exit 1; }
grep "^auto:" auto/log
