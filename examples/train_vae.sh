#!/usr/bin/env bash
# Train and score the VAE: examples/train_vae.sh MESHES OUT [key=value of train_vae …]
# MESHES: a directory of meshes; those named in configs/train_vae.yaml as held out are scored and not trained on.
# May be set before the call: VAE (compact or full), RESOLUTIONS (256,512), COUNT (8 shapes of each family), COPIES (4 turned and stretched
# ones of each mesh, at least 1), WORKERS (processes). At 1024, or for the full size, add patch_latents=24 patch_tokens=800 tokens=9000
# max_tokens=150000. Stops and goes on at any stage.
set -euo pipefail
meshes=$1 out=$2
shift 2
vae=${VAE:-compact} resolutions=${RESOLUTIONS:-256,512} count=${COUNT:-8} copies=${COPIES:-4} workers=${WORKERS:-$(nproc)}
export OMP_NUM_THREADS=1
[ -e "$out/shapes/shapes.csv" ] || python -m reference_model.shapes out="$out/shapes" count="$count"
if [ ! -e "$out/copies/done" ]; then
  python -m reference_model.variants meshes="$meshes" out="$out/copies" count="$copies"
  touch "$out/copies/done"
fi
for resolution in ${resolutions//,/ }; do
  for name in meshes shapes copies; do
    source=$([ $name = meshes ] && echo "$meshes" || echo "$out/$name")
    python -m reference_model.prepare meshes="$source" out="$out/prepared/${name}_$resolution" resolution="$resolution" workers="$workers" val=0 test=0
  done
done
python -m reference_model.train_vae train=gpu-multi "vae=$vae" data=prepared prepared="$out/prepared" out="$out/run" \
  "resolutions=[$resolutions]" tokens=4000 trainer.optimizer=muon trainer.lr=7e-4 trainer.warmup=100 checkpointing=false workers="$workers" "$@"
held_out=$(python -c "from reference_model.cli import parse; print(','.join(parse('train_vae', ('out',), [])[0].held_out))")
python -m reference_model.evaluate_vae meshes="$meshes" weights="$out/run/weights.safetensors" out="$out/scores" \
  "resolution=[$resolutions]" "names=[$held_out]" workers="$workers"
