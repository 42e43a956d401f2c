# The published rows of `three` with two seeds each. A part of `run`, whose names and functions it has.
measure held-back dense "$model"
batch=1
if [ "$network" = gemma3 ]; then
    samples=16
    for seed in 42 43; do
        dense "dense-all-8k-$seed" 2e-5 --seed "$seed"
        heal "shortgpt-8k-$seed" shortgpt plain-kd 5e-5 --epochs 1 --seed "$seed"
    done
    published {shortgpt,dense-all}-8k-{42,43}
else
    angular
    samples=128
    for seed in 42 43; do
        dense "dense-all-64k-$seed" 1e-4 --seed "$seed"
        heal "angular-64k-$seed" angular plain-kd 3e-4 --seed "$seed"
    done
    published {angular,dense-all}-64k-{42,43}
fi
