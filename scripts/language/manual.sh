# Healed on one kind of text, the manual. A part of `run`, whose names and functions it has.
# Sequences of healing, sequences in a step, and rates of `best`.
case $network in
    smollm2) samples=32 batch=2 rates=5e-4 ;;
    gemma3) samples=16 batch=1 rates=5e-5,2e-4 ;;
esac
drop interlace --strategy interlace --drop-count "$drop" --scores scores.json
healed=(--plan shortgpt.json --teacher "$model")

# The yardsticks, the paper's method, and the best selector with the recipes.
train dense-all manual "$model" --layers all --recipe paper --learning-rate 1e-4
train interlace-paper manual interlace --plan interlace.json --recipe paper --learning-rate 1e-3
train shortgpt-best manual shortgpt "${healed[@]}" --recipe best --learning-rate "$rates"
measure test dense "$model"
for name in dense-all interlace-paper shortgpt-best; do
    measure test "$name" "$name"
done
if [ "$network" = gemma3 ]; then
    train dense-all-2e-5 manual "$model" --layers all --recipe paper --learning-rate 2e-5
    train interlace-fast manual interlace --plan interlace.json --teacher "$model" --recipe fast
    for name in dense-all-2e-5 interlace interlace-fast shortgpt; do
        measure test "$name" "$name" manual
    done
else
    train dense-few manual "$model" --layers "$(layers shortgpt.json)" --recipe paper --learning-rate 1e-4
    train shortgpt-paper manual shortgpt --plan shortgpt.json --recipe paper --learning-rate 1e-3
    train shortgpt-fast manual shortgpt "${healed[@]}" --recipe fast
    for name in dense-few shortgpt-paper shortgpt; do
        measure test "$name" "$name" manual
    done
    # Candidates, judged by what is held back.
    train shortgpt-fit manual shortgpt "${healed[@]}" --recipe best --learning-rate 5e-4 --settings "$settings/fit.toml"
    train shortgpt-kd manual shortgpt-fit "${healed[@]}" --recipe best --learning-rate 5e-4 --settings "$settings/kd.toml"
    train shortgpt-kd-all manual shortgpt-fit --layers all --teacher "$model" --recipe best --learning-rate 1e-4 \
        --settings "$settings/kd.toml"
    train shortgpt-wide manual shortgpt-fit "${healed[@]}" --recipe best --learning-rate 1e-3 --settings "$settings/wide.toml"
    train shortgpt-mixture-all mixture shortgpt --layers all --teacher "$model" --recipe best --learning-rate 5e-4
    measure held-back dense "$model"
    for name in dense-{all,few} interlace-paper shortgpt-{best,paper,fast,fit,kd,kd-all,wide,mixture-all}; do
        measure held-back "$name" "$name"
    done
    measure test shortgpt-fast shortgpt-fast
    measure test shortgpt-wide shortgpt-wide
fi
