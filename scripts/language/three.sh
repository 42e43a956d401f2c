# Healed on three kinds of text. A part of `run`, whose names and functions it has. Choices are made by what is held back; the test
# parts are read for the published rows alone.
angular
measure held-back dense "$model"
measure held-back shortgpt shortgpt
measure held-back angular angular

if [ "$network" = gemma3 ]; then
    # On 8,192 tokens: the dense model, and the healed one at three rates.
    samples=16 batch=1
    dense dense-all 2e-5
    for rate in 2e-5 5e-5; do heal "plain-kd-$rate" shortgpt plain-kd "$rate" --epochs 1; done
    published plain-kd-5e-5 dense-all
    heal plain-kd-1e-4 shortgpt plain-kd 1e-4 --epochs 1
    heal no-fit shortgpt no-fit 5e-5 --epochs 1
else
    # The layers of `sleb` in smollm2.md.
    drop sleb --drop 3,5,14,16,17,18,25
    measure held-back sleb sleb
    samples=32 batch=2
    heal two-passes shortgpt no-fit 5e-4
    heal one-pass shortgpt no-fit 5e-4 --epochs 1
    train neighbours three shortgpt --plan shortgpt.json --teacher "$model" --recipe best --learning-rate 5e-4 \
        --settings "$settings/no-fit.toml" --epochs 1
    measure held-back neighbours neighbours
    batch=1
    heal small-steps shortgpt no-fit 3e-4 --epochs 1
    heal plain-kd shortgpt plain-kd 3e-4 --epochs 1
    heal plain-kd-alone shortgpt plain-kd-alone 3e-4 --epochs 1
    heal angular-plain-kd angular plain-kd 3e-4 --epochs 1
    # From there: another rate, weight of the dense model's answers, optimiser, teacher, a map before the gap, other layers.
    heal angular-5e-4 angular plain-kd 5e-4 --epochs 1
    heal angular-more-kd angular more-kd 3e-4 --epochs 1
    heal angular-muon angular muon-kd 3e-3 --epochs 1
    dense dense-all-16k 1e-4
    (model=dense-all-16k && heal angular-of-finetuned angular plain-kd 3e-4 --epochs 1)
    linear
    measure held-back linear linear
    heal linear-plain-kd linear plain-kd 3e-4 --epochs 1
    for layers in 11,12,13,14,15,16,17 13,14,15,16,17,18,19 12,13,14,15,16,17,25 13,14,15,16,17,25,26; do
        drop "layers-$layers" --drop "$layers"
        heal "layers-$layers-plain-kd" "layers-$layers" plain-kd 3e-4 --epochs 1
    done
fi
