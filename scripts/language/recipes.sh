# The named recipes after `angular`, healed on 65,536 tokens of three kinds of text. A part of `run`, whose names and functions it has.
angular
samples=128 batch=1
measure held-back dense "$model"
measure held-back angular angular
dense dense-all-64k-42 1e-4
batch=2 planned=(--plan angular.json --teacher "$model")
train angular-64k-paper three angular --plan angular.json --recipe paper --learning-rate 1e-3
# `fast` with its own budgets, and with fewer tokens for the fit and the steps.
train angular-64k-fast three angular "${planned[@]}" --recipe fast
for tokens in 4096 8192; do
    printf '[data]\nstep_tokens = %s\n[fit]\ntokens = %s\n' "$tokens" "$tokens" >"fast-$tokens.toml"
    train "angular-64k-fast-$tokens" three angular "${planned[@]}" --recipe fast --settings "fast-$tokens.toml"
done
train angular-64k-best three angular "${planned[@]}" --recipe best --learning-rate 5e-4
for name in angular-64k-{paper,fast,fast-4096,fast-8192,best}; do measure held-back "$name" "$name"; done
published dense-all-64k-42 angular angular-64k-{paper,fast,best}
