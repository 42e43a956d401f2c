# More text: twice that of `seeds` in one pass (SmolLM2), and four times it (Gemma 3). A part of `run`, whose names and functions it has.
measure held-back dense "$model"
batch=1
if [ "$network" = gemma3 ]; then
    samples=64
    dense dense-all-32k 2e-5
    heal shortgpt-32k shortgpt plain-kd 5e-5 --epochs 1
    published {shortgpt,dense-all}-32k
else
    angular
    samples=256
    dense dense-all-128k 1e-4
    heal angular-128k angular plain-kd 3e-4 --epochs 1
    published {angular,dense-all}-128k
fi
