# How far healing may move the weights: models between the pruned and the healed one. A part of `run`, whose names and functions it has.
angular
samples=128 batch=1
measure held-back dense "$model"
dense dense-all-64k-42 1e-4 --seed 42
heal angular-64k-42 angular plain-kd 3e-4 --seed 42
for share in 0.5 0.75 0.9; do
    [ -e "blend-$share" ] || "$work/venv/bin/python" "$here/blend.py" angular angular-64k-42 "$share" "blend-$share"
    measure held-back "blend-$share" "blend-$share"
done
