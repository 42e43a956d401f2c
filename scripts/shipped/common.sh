# Functions of `run` and of scripts/easy_vqa/run. Expects: here, root, interlace, model, train, held_back, test, samples, seeds.

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
quiet() { "$@" >/dev/null; }
# Writes the seconds of user and system time of a command and its children to a file.
timed() { # FILE COMMAND...
    local file=$1 TIMEFORMAT='%U %S'
    shift
    { time "$@" 2>&3; } 3>&2 2>"$file"
}
# Mean loss of a report in nats of an answer token.
loss_in() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["model"]["mean_loss"])' "$1"; }

# Every measurement is a file of its own, so a stopped run goes on where it was.
held_back_loss() { # NAME FOLDER
    [ -e "held-$1.json" ] || quiet "$interlace" eval "$2" --data "$held_back" -q -o "held-$1.json"
}
look_at_test() { # NAME FOLDER
    [ -e "test-$1.json" ] || { say "test: $1" && quiet "$interlace" eval "$2" --data "$test" --batch-size 32 -q -o "test-$1.json"; }
}

plan() { # STRATEGY RATIO
    local name=$1-$2 how=()
    case $1 in
        sleb* | finercut | *-heal | *-loss) how=(--data "$train" --turns separate --samples 16) ;;
        *) how=(--scores scores.json) ;;
    esac
    case $1 in interlace | interlace-oa | interlace-tn) how+=(--beyond-structure) ;; esac
    # The longer packs are for `angular`: the block of as many layers as are dropped.
    [ -e scores.json ] || quiet "$interlace" score "$model" --data "$train" --turns separate --samples 128 --packs 1,2,3,4,6,8 -q \
        -o scores.json
    [ -e "plan-$name.json" ] || {
        local begin=$SECONDS
        quiet "$interlace" plan "$model" --strategy "$1" --drop-ratio "$2" "${how[@]}" -q -o "plan-$name.json"
        say "plan $name: $((SECONDS - begin)) s"
    }
    [ -e "pruned-$name" ] || quiet "$interlace" prune "$model" --plan "plan-$name.json" -q -o "pruned-$name"
}

train_model() { # NAME MODEL WHICH-LAYERS RECIPE RATE SEED [MORE...]
    local name=$1 from=$2 layers=$3 recipe=$4 rate=$5 seed=$6 batch=16
    shift 6
    [ "$recipe" != fast ] || batch=24 # the recipe's own
    [ -e "$name" ] || [ -e "held-$name.json" ] || {
        # shellcheck disable=SC2086
        timed "time-$name.txt" quiet "$interlace" finetune "$from" $layers --data "$train" --turns separate --samples "$samples" --seed "$seed" \
            --recipe "$recipe" --teacher "$model" --learning-rate "$rate" --batch-size "$batch" --accumulation-steps 1 -q \
            "$@" -o "$name"
    }
    held_back_loss "$name" "$name"
    say "$name: held-back loss $(loss_in "held-$name.json")"
}
heal() { # STRATEGY RATIO RECIPE RATE SEED [+HOW MORE...]     +HOW: the closed form that the model was pruned with
    local how=${6:-}
    healed=healed-$1-$2$how-$3-$4-$5
    train_model "$healed" "pruned-$1-$2$how" "--plan plan-$1-$2.json" "$3" "$4" "$5" "${@:7}"
}
compensate() { # STRATEGY RATIO HOW [RANK]
    local name=pruned-$1-$2+$3${4:-}
    # The fit reads other samples than those on which the loss decides what is kept.
    [ -e "$name" ] || quiet "$interlace" prune "$model" --plan "plan-$1-$2.json" --compensate "$3" ${4:+--rank "$4"} \
        --data "$train" --turns separate --samples 128 --fit-tokens 8192 -q -o "$name"
    held_back_loss "$name" "$name"
}
dense() { # RECIPE RATE SEED
    local more=()
    # Nothing was dropped, so there is no gap to fit.
    [ "$1" = paper ] || more=(--settings "$here/../shipped/dense.toml")
    healed=dense-$1-$2-$3
    train_model "$healed" "$model" "--layers all" "$1" "$2" "$3" "${more[@]}"
}

# The rule of `auto` (docs/strategies.md), by the same commands: the plan with the lowest loss on the held-back questions after a
# healing with the recipe and seed 42. All samples together have fewer tokens than the short healing of `auto`, so it is whole.
choose_plan() { # RATIO RECIPE RATE
    local ratio=$1 strategy least= own
    for strategy in sleb shortgpt angular; do
        plan "$strategy" "$ratio"
        heal "$strategy" "$ratio" "$2" "$3" 42
        own=$(loss_in "held-$healed.json")
        if [ -z "$least" ] || python3 -c 'import sys; sys.exit(not float(sys.argv[1]) < float(sys.argv[2]))' "$own" "$least"; then
            least=$own chosen=$strategy
        fi
    done
    say "auto at $ratio: $chosen"
}
