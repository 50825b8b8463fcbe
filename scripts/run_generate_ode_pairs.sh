#!/usr/bin/env bash
# Generate ODE pairs on all GPUs of one or several machines. Run the same command again to resume.
#
#   CAPTION_PATH=prompts.txt OUTPUT_FOLDER=data/ode_pairs scripts/run_generate_ode_pairs.sh [section.key=value ...]
#
# CONFIG_PATH      default: configs/hiar.yaml     NUM_GPUS    processes on this machine; default: one per GPU
# CAPTION_PATH     prompts, one per line          NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    for several machines
# OUTPUT_FOLDER    folder for the pairs           GUIDANCE_SCALE, NUM_INFERENCE_STEPS, TIMESTEP_SHIFT, NUM_FRAMES,
# NUM_PROMPTS      use only the first N           SAVE_INDICES, SEED, DTYPE, MODEL_NAME    flags of the Python script
set -euo pipefail
cd "$(dirname "$0")/.."

: "${CAPTION_PATH:?set CAPTION_PATH to a file of prompts}" "${OUTPUT_FOLDER:?set OUTPUT_FOLDER to a folder for the pairs}"
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
words=(--config_path "${CONFIG_PATH:-configs/hiar.yaml}" --caption_path "$CAPTION_PATH" --output_folder "$OUTPUT_FOLDER")
for name in GUIDANCE_SCALE NUM_INFERENCE_STEPS TIMESTEP_SHIFT NUM_FRAMES NUM_PROMPTS SAVE_INDICES SEED DTYPE MODEL_NAME LATENT_SHAPE; do
    if [[ -n ${!name:-} ]]; then
        # shellcheck disable=SC2206 # SAVE_INDICES holds several words
        words+=("--${name,,}" ${!name})
    fi
done
if [[ -n ${RESUME_FLAG:-} ]]; then
    words+=(--resume)
fi
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="${NPROC_PER_NODE:-${NUM_GPUS:-$((gpus > 0 ? gpus : 1))}}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" \
    scripts/generate_ode_pairs.py "${words[@]}" "$@"
