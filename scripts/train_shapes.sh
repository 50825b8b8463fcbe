#!/usr/bin/env bash
# Train the miniature model, data/shapes-wan, from scratch: text encoder, VAE, tiny decoder, encoded clips, teacher, ODE
# pairs, causal initialisation, and the distilled generators.
#
#   scripts/train_shapes.sh [section.key=value ...]
#
# An interrupted run resumes with the same command. Overrides are passed to every train.py. Environment variables:
#   RUNS       folder for logs and checkpoints (default runs/shapes)
#   MODEL      folder for the weights (default data/shapes-wan)
#   CLIPS      number of encoded clips (default 4096)
#   PAIRS      number of ODE pairs (default 2048)
#   SIZE       frame size in pixels: 64, or 96 for the world with unnamed attributes (default 64)
#   PROCESSES  processes that share the work, with one thread each (default 2)
set -euo pipefail
cd "$(dirname "$0")/.."

runs=${RUNS:-runs/shapes}
model=${MODEL:-data/shapes-wan}
python=${PYTHON:-python}
processes=${PROCESSES:-2}
size=${SIZE:-64}
network=shapes
((size == 64)) || network=shapes-$size
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() { # script [argument ...]: run on all processes
    if ((processes > 1)); then
        "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" "$@"
    else
        "$python" "$@"
    fi
}

train() { # stage output [override ...]: train under the stage's own name
    train_as "$1" "$@"
}

train_as() { # name stage output [override ...]: train a stage under another name
    local name=$1 stage=$2 output=$3
    shift 3
    echo "== $name"
    run train.py --config_path "configs/shapes/$stage.yaml" --logdir "$runs/$name" \
        model.base="$model" train.output="$output" train.network="$network" data.frame_size="$size" \
        video.height="$size" video.width="$size" "$@"
}

# Copy the files that are not trained.
short=$runs/vae_short # weights of the VAE's first stage; a separate folder, so a second run never overwrites the final VAE
for folder in "$model" "$short"; do
    mkdir -p "$folder"
    [[ -e $folder/model_index.json ]] || cp -r data/shapes-wan/model_index.json data/shapes-wan/scheduler "$folder"
done

train text_encoder "$model" "$@"
vae=() # the larger frames have patterns and need a longer training
((size == 64)) || vae=(train.max_iterations=5000)
train vae "$short" "${vae[@]}" "$@"
train vae_long "$model" train.init="$short" "$@"
train tiny_decoder "$model" "$@"

echo "== clips"
run scripts/encode_clips.py --base "$model" --output "$runs/clips" --num_clips "${CLIPS:-4096}" \
    --size "$size"

train teacher "$model/transformer" data.path="$runs/clips" "$@"
if ((size > 64)); then
    train causal "$model/causal" data.path="$runs/clips" train.init="$model/transformer" "$@"
fi

echo "== ODE pairs"
"$python" scripts/write_shapes_clips.py --output "$runs" --num_clips "${PAIRS:-2048}" --seed 1 --size "$size" \
    --captions_only
run scripts/generate_ode_pairs.py --config_path configs/shapes.yaml --caption_path "$runs/captions.txt" \
    --output_folder "$runs/ode_pairs" --batch_size 8 --num_inference_steps 16 --dtype float16 model.base="$model" \
    video.height="$size" video.width="$size"

train ode_init "$model/ode_init" data.path="$runs/ode_pairs" train.init="$model/transformer" "$@"

distilled=(data.path="$runs/ode_pairs" data.prompts="$runs/captions.txt" train.init="$model/ode_init")
train hiar "$model/hiar" "${distilled[@]}" "$@"
train self_forcing "$model/self_forcing" "${distilled[@]}" "$@"
train_as hiar_without_forward_kl hiar "$runs/hiar_without_forward_kl/weights" "${distilled[@]}" \
    distill.forward_kl_weight=0 "$@"
