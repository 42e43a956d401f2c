# The healed rows of `seeds` with a linear map before the gap, fitted in closed form before healing. A part of `run`, whose names and
# functions it has.
angular
linear
measure held-back dense "$model"
measure held-back angular angular
measure held-back linear linear
samples=128 batch=1
for seed in 42 43; do
    dense "dense-all-64k-$seed" 1e-4 --seed "$seed"
    heal "linear-64k-$seed" linear plain-kd 3e-4 --seed "$seed"
done
published linear {linear,dense-all}-64k-{42,43}
