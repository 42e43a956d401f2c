# The strategy `auto` by `interlace run`, healed on 8,192 tokens of three kinds of text. A part of `run`, whose names and functions it
# has. The benchmark is one question without a picture, which `run` asks for; its score says nothing.
mkdir -p auto
printf 'index\tquestion\tanswer\n0\tWhich file lists the sources of packages?\tsources.list\n' >auto/one.tsv
# Scores and the losses of `sleb` are on two sequences: every 180th block of the three kinds.
awk 'NR % 180 == 1' "$text/three-train.jsonl" >auto/calibration.jsonl
cat >auto/recipe.toml <<END
model = "../../model"
output = "run"

[calibration]
data = "calibration.jsonl"

[plan]
drop_count = $drop
strategies = ["auto"]

[plan.auto]
candidates = ["sleb", "shortgpt", "angular"]
step_tokens = 8192

[finetune]
data = "$text/three-train.jsonl"
samples = 16
held_back = 0.03
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
"$interlace" run auto/recipe.toml
