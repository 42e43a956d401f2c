# 131,072 tokens in one pass in place of 65,536 in two. A part of `run`, whose names and functions it has.
angular
measure held-back dense "$model"
samples=256 batch=1
heal angular-128k angular plain-kd 3e-4 --epochs 1
dense dense-all-128k 1e-4
published {angular,dense-all}-128k
