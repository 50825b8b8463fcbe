#!/usr/bin/env bash
# CausVid on the miniature: from video files to a causal and a bidirectional student, and their measurements.
#
#   scripts/causvid_shapes.sh [stage ...]
#
# Stages, in their order (default: all): videos clips pairs causal_init causal bidirectional inference evaluation.
# The same command continues an interrupted run. Environment variables:
#   RUNS       folder for all results (default runs/causvid)
#   CLIPS      number of video files (default 256)
#   PAIRS      number of ODE pairs (default 256)
#   PROCESSES  processes that share the work, with one thread each (default 2)
set -euo pipefail
cd "$(dirname "$0")/.."

runs=${RUNS:-runs/causvid}
python=${PYTHON:-python}
processes=${PROCESSES:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() { # script [argument ...]: run on all processes
    if ((processes > 1)); then
        "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" "$@"
    else
        "$python" "$@"
    fi
}

train() { # stage [override ...]
    run train.py --config_path "configs/shapes/causvid_$1.yaml" --logdir "$runs/logs/$1" "${@:2}"
}

generate() { # name config [override ...]: videos of the held-out prompts
    run inference.py --config_path "$2" --data_path data/shapes_eval_prompts.txt --seed 1 --batch_size 8 \
        --num_output_frames 21 --output_folder "$runs/generated/$1" "${@:3}"
}

videos() { # render video files of the miniature world with their captions
    local count=${CLIPS:-256}
    [[ -e $runs/videos/$(printf %05d.mp4 $((count - 1))) ]] ||
        "$python" scripts/write_shapes_clips.py --output "$runs/videos" --num_clips "$count"
}

clips() { # video files -> clips of one format -> latents -> LMDB
    run scripts/process_videos.py --input_dir "$runs/videos" --output_dir "$runs/clips" --height 64 --width 64
    run scripts/encode_clips.py --base data/shapes-wan --videos "$runs/clips" --output "$runs/latents"
    [[ -d $runs/clips_lmdb ]] ||
        "$python" scripts/create_lmdb.py --data_path "$runs/latents" --lmdb_path "$runs/clips_lmdb"
}

pairs() { # the teacher's trajectories for captions of their own -> LMDB
    "$python" scripts/write_shapes_clips.py --output "$runs" --num_clips "${PAIRS:-256}" --seed 1 --captions_only
    run scripts/generate_ode_pairs.py --config_path configs/shapes/causvid_causal_init.yaml --batch_size 8 \
        --caption_path "$runs/captions.txt" --output_folder "$runs/ode_pairs" --dtype float16
    [[ -d $runs/ode_lmdb ]] ||
        "$python" scripts/create_lmdb.py --data_path "$runs/ode_pairs" --lmdb_path "$runs/ode_lmdb"
}

causal_init() { # ODE regression
    train causal_init data.path="$runs/ode_lmdb" train.output="$runs/causal_init"
}

causal() { # DMD on data latents, from the causal initialisation
    train causal data.path="$runs/clips_lmdb" train.init="$runs/causal_init" train.output="$runs/causal"
}

bidirectional() { # DMD on data latents, from the teacher
    train bidirectional data.path="$runs/clips_lmdb" train.output="$runs/bidirectional"
}

inference() { # videos of both students, and of the shipped HiAR and Self-Forcing
    generate causal configs/shapes/causvid_causal.yaml model.generator="$runs/causal"
    generate bidirectional configs/shapes/causvid_bidirectional.yaml model.generator="$runs/bidirectional"
    generate causal_init configs/shapes/causvid_causal.yaml model.generator="$runs/causal_init"
    generate hiar configs/shapes.yaml
    generate self_forcing configs/shapes.yaml model.generator=data/shapes-wan/self_forcing rollout.schedule=block_first
}

evaluation() { # one table and one contact sheet per student
    "$python" scripts/evaluate.py causal="$runs/generated/causal" bidirectional="$runs/generated/bidirectional" \
        causal_init="$runs/generated/causal_init" hiar="$runs/generated/hiar" \
        self_forcing="$runs/generated/self_forcing" --output "$runs/evaluation"
    for name in causal bidirectional; do
        "$python" scripts/contact_sheet.py "$runs/generated/$name" --videos 8
    done
}

stages=(videos clips pairs causal_init causal bidirectional inference evaluation)
if (($#)); then stages=("$@"); fi
for stage in "${stages[@]}"; do
    echo "== $stage"
    "$stage"
done
