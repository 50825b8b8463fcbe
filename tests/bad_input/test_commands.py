"""Bad arguments of inference.py, train.py, the pipeline script and every script in scripts/."""

import os
from pathlib import Path

import pytest
from bad_files import NOT_TEXT, bad_file

import demo
import inference
import train
from scripts import (
    benchmark,
    compare_videos,
    contact_sheet,
    convert_checkpoint,
    create_lmdb,
    download_weights,
    encode_clips,
    encode_prompts,
    evaluate,
    evaluate_vae,
    export_generator,
    generate_ode_pairs,
    make_teaser,
    measure_precision,
    measure_switches,
    measure_v2v,
    pipeline_parallel_inference,
    plan_pipeline,
    plot_metrics,
    process_videos,
    random_transformer,
    sample_teacher,
    write_shapes_clips,
)

WORD, NEGATIVE, ZERO, HUGE = "x", "-1", "0", "3000000000"
CONFIG, OUT = "--config_path {config}", "{tmp}/out"
INFER = f"{CONFIG} --prompt a --output_folder {OUT}"
TEACHER = f"{CONFIG} --data_path {{prompts}} --output_folder {OUT}"
PARALLEL = f"{CONFIG} --prompt a --output_path {OUT}"
PAIRS = f"{CONFIG} --caption_path {{prompts}} --output_folder {OUT}"
PROCESS = f"--input_dir {{tmp}}/videos --output_dir {OUT}"
PLAN = f"{CONFIG} --denoise 1 --context 1 --decode 1"
# command, good arguments, flag, bad values
NUMBERS = [
    *(
        (inference, INFER, flag, (WORD, "1e3", "nan", "", NEGATIVE, *more))
        for flag, more in {
            "num_output_frames": (ZERO, HUGE, "10"),
            "num_samples": (ZERO, HUGE, "1000000000"),
            "batch_size": (ZERO,),
            "height": (ZERO, HUGE, "33"),
            "width": (ZERO, HUGE, "33"),
            "fps": (ZERO, HUGE, "1000"),
            "seed": (),
            "window": ("1",),
            "sink": (),
            "num_frame_first_blocks": (),
            "strength": (ZERO, "2"),
            "num_rollout": (ZERO, HUGE),
            "num_overlap_frames": (ZERO,),
        }.items()
    ),
    (contact_sheet, "{tmp}/videos", "columns", (WORD, NEGATIVE, ZERO, "1", HUGE)),
    (contact_sheet, "{tmp}/videos", "videos", (WORD, NEGATIVE, ZERO)),
    (make_teaser, f"{{tmp}}/videos --output {OUT}.webp", "columns", (WORD, NEGATIVE, ZERO, HUGE)),
    (make_teaser, f"{{tmp}}/videos --output {OUT}.webp", "panel", (WORD, NEGATIVE, ZERO, HUGE)),
    (make_teaser, f"{{tmp}}/videos --output {OUT}.webp", "quality", (WORD, NEGATIVE, "101")),
    (compare_videos, "{tmp}/a {tmp}/b", "columns", (WORD, NEGATIVE)),
    (compare_videos, "{tmp}/a {tmp}/b", "scale", (WORD, NEGATIVE, HUGE)),
    (compare_videos, "{tmp}/a {tmp}/b", "fps", (WORD, NEGATIVE, "nan", "inf", HUGE)),
    (evaluate, "{tmp}/videos", "block_frames", (WORD, NEGATIVE, ZERO, HUGE)),
    (evaluate, "{tmp}/videos", "max_frames", (WORD, NEGATIVE, ZERO, "1")),
    (evaluate, "{tmp}/videos", "processes", (WORD, NEGATIVE, HUGE)),
    (evaluate, "{tmp}/videos", "examples", (WORD, NEGATIVE, HUGE)),
    (evaluate, "{tmp}/videos", "floor_videos", (WORD, NEGATIVE, HUGE)),
    (plan_pipeline, PLAN, "ranks", (WORD, NEGATIVE, ZERO, HUGE)),
    (plan_pipeline, PLAN, "num_output_frames", (WORD, NEGATIVE, ZERO, HUGE)),
    (plan_pipeline, PLAN, "bandwidth", (WORD, NEGATIVE, ZERO, "nan", "inf")),
    *((plan_pipeline, PLAN, flag, (WORD, NEGATIVE, "nan", "inf")) for flag in ("latency", "denoise", "context")),
    (random_transformer, f"--output {OUT}", "layers", (WORD, NEGATIVE, ZERO, HUGE, "1000000")),
    (random_transformer, f"--output {OUT}", "width", (WORD, NEGATIVE, ZERO, HUGE, "3")),
    (random_transformer, f"--output {OUT}", "head_dim", (WORD, NEGATIVE, ZERO, HUGE, "3")),
    (write_shapes_clips, f"--output {OUT}", "num_clips", (WORD, NEGATIVE, ZERO, HUGE)),
    (write_shapes_clips, f"--output {OUT}", "num_frames", (WORD, NEGATIVE, ZERO, HUGE)),
    (write_shapes_clips, f"--output {OUT}", "seed", (WORD, NEGATIVE)),
    (encode_clips, f"--output {OUT}", "num_clips", (WORD, NEGATIVE, ZERO, HUGE)),
    (encode_clips, f"--output {OUT}", "num_frames", (WORD, NEGATIVE, ZERO, HUGE)),
    (encode_clips, f"--output {OUT}", "seed", (WORD, NEGATIVE)),
    (encode_clips, f"--videos {{tmp}}/videos --output {OUT}", "fps", (WORD, NEGATIVE, ZERO, "nan", HUGE)),
    (process_videos, PROCESS, "num_frames", (WORD, NEGATIVE, ZERO, HUGE, "6")),
    (process_videos, PROCESS, "height", (WORD, NEGATIVE, ZERO, HUGE, "40")),
    (process_videos, PROCESS, "width", (WORD, NEGATIVE, ZERO, HUGE, "40")),
    (process_videos, PROCESS, "fps", (WORD, NEGATIVE, ZERO, "nan", HUGE)),
    (process_videos, PROCESS, "aspect_tolerance", (WORD, NEGATIVE, "nan")),
    (process_videos, PROCESS, "crf", (WORD, NEGATIVE, "52")),
    (process_videos, PROCESS, "num_workers", (WORD, NEGATIVE, ZERO, HUGE)),
    (process_videos, f"{PROCESS} --shard 0", "num_shards", (WORD, NEGATIVE, ZERO, HUGE)),
    (process_videos, f"{PROCESS} --num_shards 2", "shard", (WORD, NEGATIVE, "2")),
    (measure_precision, CONFIG, "num_videos", (WORD, NEGATIVE, ZERO)),
    (measure_switches, f"{CONFIG} --output_folder {OUT}", "num_videos", (WORD, NEGATIVE, ZERO)),
    (measure_v2v, f"{CONFIG} --output_folder {OUT}", "num_videos", (WORD, NEGATIVE, ZERO)),
    (measure_v2v, f"{CONFIG} --output_folder {OUT}", "strengths", (WORD, NEGATIVE, ZERO, "2", "nan")),
    (evaluate_vae, "--base {model}", "num_clips", (WORD, NEGATIVE, ZERO, HUGE)),
    (evaluate_vae, "--base {model}", "num_frames", (WORD, NEGATIVE, ZERO, HUGE, "6")),
    (evaluate_vae, "--base {model}", "seed", (WORD, NEGATIVE)),
    (sample_teacher, TEACHER, "num_samples", (WORD, NEGATIVE, ZERO, HUGE)),
    (sample_teacher, TEACHER, "batch_size", (WORD, NEGATIVE, ZERO)),
    (sample_teacher, TEACHER, "seed", (WORD, NEGATIVE)),
    (generate_ode_pairs, PAIRS, "num_inference_steps", (WORD, NEGATIVE, ZERO, HUGE)),
    (generate_ode_pairs, PAIRS, "num_frames", (WORD, NEGATIVE, ZERO, HUGE)),
    (generate_ode_pairs, PAIRS, "timestep_shift", (WORD, NEGATIVE, ZERO, "nan", "1e-300")),
    (generate_ode_pairs, PAIRS, "guidance_scale", (WORD, "nan", "inf")),
    (generate_ode_pairs, PAIRS, "batch_size", (WORD, NEGATIVE, ZERO)),
    (create_lmdb, f"--data_path {{tmp}} --lmdb_path {OUT}", "shards", (WORD, NEGATIVE, ZERO, HUGE)),
    (convert_checkpoint, f"--input {{model}} --output {OUT} --to diffusers", "num_heads", (WORD, NEGATIVE, ZERO, HUGE)),
    (export_generator, f"--logdir {{tmp}} --output {OUT}", "iteration", (WORD, NEGATIVE, HUGE)),
    (benchmark, CONFIG, "repeats", (WORD, NEGATIVE, ZERO)),
    (benchmark, CONFIG, "warmup", (WORD, NEGATIVE)),
    (demo, CONFIG, "port", (WORD, NEGATIVE, HUGE)),
    (demo, CONFIG, "session_minutes", (WORD, NEGATIVE, ZERO, "nan")),
    (train, f"{CONFIG} --logdir {OUT} train.objective=flow_matching", "min_exit_step", (WORD, NEGATIVE, HUGE)),
]


def split(text: str, world, tmp_path: Path) -> tuple[str, ...]:
    """Return the arguments in a text, with the paths of this test."""
    names = {"config": world.config, "prompts": world.prompts, "model": world.model, "tmp": tmp_path}
    return tuple(text.format(**names).split())


def name(value: object) -> str:
    return getattr(value, "__name__", str(value)).rpartition(".")[2] or "empty"


CASES = [(module, good, flag, value) for module, good, flag, values in NUMBERS for value in values]
CASE_NAMES = [f"{module.__name__}-{flag}-{value}" for module, _, flag, value in CASES]


@pytest.mark.parametrize(("module", "good", "flag", "value"), CASES, ids=CASE_NAMES)
def test_bad_numbers(world, tmp_path, refuse, module, good, flag, value):
    for folder in ("videos", "a", "b"):
        (tmp_path / folder).mkdir()
    if module is contact_sheet:
        (tmp_path / "videos/a.mp4").touch()
    refuse(module.main, (*split(good, world, tmp_path), f"--{flag}={value}"))


# command, good arguments, flag, suffix of the file, kinds of bad files
YAML = ("missing", "folder", "binary", "words", "number", "list", "deep", "zip")
ALL = ("missing", "folder", "empty", "binary", "words", "number", "list", "deep", "zip")
LATENTS = ("missing", "folder", "empty", "binary", "words", "zip")
FILES = [
    (inference, f"--prompt a --output_folder {OUT}", "config_path", ".yaml", YAML),
    (inference, f"--output_folder {OUT}", "config_path", ".json", ALL),
    (inference, f"{CONFIG} --output_folder {OUT}", "data_path", ".txt", NOT_TEXT),
    (inference, f"{CONFIG} --output_folder {OUT} --data_path {{prompts}}", "extended_prompt_path", ".txt", ALL),
    (inference, INFER, "prompt_track", ".txt", ALL),
    (inference, INFER, "prompt_track", ".yaml", ALL),
    (inference, f"{INFER} --num_output_frames 4", "image", ".png", ALL),
    (inference, INFER, "video", ".mp4", ALL),
    (inference, INFER, "video", ".safetensors", LATENTS),
    (inference, f"{INFER} --strength 0.5", "video", ".mp4", ALL),
    (inference, f"{INFER} --strength 0.5", "video", ".safetensors", LATENTS),
    (train, f"--logdir {OUT}", "config_path", ".yaml", ALL),
    (demo, "--port 0", "config_path", ".yaml", ALL),
    (demo, f"{CONFIG} --port 0", "data_path", ".txt", NOT_TEXT),
    (pipeline_parallel_inference, f"--prompt a --output_path {OUT}", "config_path", ".yaml", YAML),
    (pipeline_parallel_inference, f"{CONFIG} --output_path {OUT}", "data_path", ".txt", NOT_TEXT),
    (plan_pipeline, CONFIG, "profile", ".json", ALL),
    (benchmark, CONFIG, "against", ".json", ALL),
    (sample_teacher, f"{CONFIG} --output_folder {OUT}", "data_path", ".txt", NOT_TEXT),
    (generate_ode_pairs, f"{CONFIG} --output_folder {OUT}", "caption_path", ".txt", NOT_TEXT),
    (encode_prompts, f"{CONFIG} model.text_cache={OUT}", "data_path", ".txt", NOT_TEXT),
    (encode_clips, f"--output {OUT} --num_clips 1", "base", "", ALL),
    (encode_clips, f"--base {{model}} --output {OUT}", "videos", "", ALL),
    (process_videos, f"--output_dir {OUT}", "input_dir", "", ALL),
    (evaluate_vae, "", "base", "", ALL),
    (random_transformer, f"--output {OUT}", "base", "", ALL),
    (create_lmdb, f"--lmdb_path {OUT}", "data_path", "", ALL),
    (export_generator, f"--output {OUT}", "logdir", "", ALL),
    (convert_checkpoint, f"--output {OUT} --to diffusers", "input", ".pt", ALL),
]
FILE_CASES = [(*row[:4], kind) for row in FILES for kind in row[4]]


@pytest.mark.parametrize(
    ("module", "good", "flag", "suffix", "kind"),
    FILE_CASES,
    ids=[f"{m.__name__}-{f}{s}-{k}" for m, _, f, s, k in FILE_CASES],
)
def test_bad_files(world, tmp_path, refuse, module, good, flag, suffix, kind):
    path = bad_file(tmp_path, kind, suffix)
    refuse(module.main, (*split(good, world, tmp_path), f"--{flag}={path}"))


OUTPUTS = [
    (inference, f"{CONFIG} --prompt a", "output_folder", ""),
    (demo, f"{CONFIG} --port 0", "output_folder", ""),
    (sample_teacher, f"{CONFIG} --data_path {{prompts}}", "output_folder", ""),
    (generate_ode_pairs, f"{CONFIG} --caption_path {{prompts}}", "output_folder", ""),
    (encode_clips, "--num_clips 1", "output", ""),
    (process_videos, "--input_dir {tmp}", "output_dir", ""),
    (write_shapes_clips, "--num_clips 1", "output", ""),
    (random_transformer, "", "output", ""),
    (create_lmdb, "--data_path {tmp}", "lmdb_path", ""),
    (plot_metrics, "{tmp}", "output", ".png"),
    (contact_sheet, "{tmp}", "output", ".png"),
    (make_teaser, "{tmp}", "output", ".webp"),
    (convert_checkpoint, "--input {model}/generator --to generator", "output", ".pt"),
]
OUTPUT_CASES = [
    (*row, place) for row in OUTPUTS for place in ("below a file", "null byte", "long name", "proc", "folder")
    if row[3] or place not in ("folder", "long name")
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "good", "flag", "suffix", "place"),
    OUTPUT_CASES,
    ids=[f"{m.__name__}-{f}-{p}" for m, _, f, _, p in OUTPUT_CASES],
)
def test_bad_outputs(world, tmp_path, refuse, module, good, flag, suffix, place):
    (tmp_path / "file").write_text("x")
    (tmp_path / f"folder{suffix}").mkdir(exist_ok=True)
    (tmp_path / "a.mp4").touch()
    paths = {
        "below a file": tmp_path / f"file/x{suffix}",
        "null byte": f"{tmp_path}/a\0b{suffix}",
        "long name": tmp_path / ("x" * 300 + suffix),
        "proc": f"/proc/x{suffix}",
        "folder": tmp_path / f"folder{suffix}",
    }
    refuse(module.main, (*split(good, world, tmp_path), f"--{flag}={paths[place]}"))


@pytest.mark.parametrize(
    ("main", "words", "fragment"),
    [
        (inference.main, f"{CONFIG} --prompt a", "--output_folder"),
        (inference.main, f"{CONFIG} --output_folder {OUT}", "--prompt"),
        (inference.main, f"{INFER} --data_path {{prompts}}", "--prompt"),
        (inference.main, f"{INFER} --image a --video b", "not both"),
        (inference.main, f"{INFER} --extended_prompt_path x", "--data_path"),
        (inference.main, f"{INFER} --prompt_track {{prompts}}", "is not `block: prompt`"),
        (inference.main, f"{INFER} rollout.prompt_switch=nope", "prompt_switch"),
        (inference.main, f"{INFER} model.offload=gpu", "model.offload"),
        (inference.main, f"{CONFIG} --memory x", "invalid float"),
        (measure_precision.main, f"{CONFIG} --row nope", "cannot read"),
        (measure_precision.main, f"{CONFIG} --row model.quantization=fp8", "model.quantization=fp8 needs"),
        (inference.main, f"{CONFIG} --memory nan", "--memory must be a positive number"),
        (inference.main, f"{CONFIG} --memory 0", "--memory must be a positive number"),
        (inference.main, f"{CONFIG} --memory 8 model.base={{tmp}}/none", "does not exist"),
        (inference.main, f"{INFER} model.quantization=int4", "model.quantization"),
        (inference.main, f"{INFER} rollout.cache_dtype=int4", "cache_dtype"),
        (inference.main, f"{INFER} rollout.moving_sink=true rollout.sink=0", "rollout.moving_sink needs a sink"),
        (inference.main, f"{INFER} --inference_method nope", "invalid choice"),
        (inference.main, f"{INFER} --order sideways", "invalid choice"),
        (inference.main, f"{INFER} --device nope", "no device"),
        (inference.main, f"{INFER} --device cuda:99", "no device"),
        (inference.main, f"{INFER} --nope", "unrecognized"),
        (inference.main, f"{INFER} nope", "cannot read"),
        (inference.main, f"{INFER} model.base={{tmp}}/none", "does not exist"),
        (inference.main, f"{INFER} model.lora={{tmp}}/none", "none"),
        (inference.main, f"{INFER} model.attention_backend=nope", "attention_backend"),
        (inference.main, f"{INFER} rollout.schedule=bidirectional --image a.png", "cannot continue an image"),
        (inference.main, f"{INFER} rollout.schedule=bidirectional --video a.mp4", "cannot continue an image"),
        (inference.main, f"{INFER} rollout.schedule=bidirectional --num_rollout 2", "needs a causal generator"),
        (inference.main, f"{INFER} --num_rollout 2 --num_overlap_frames 9", "below the 9 latent frames"),
        (inference.main, f"{INFER} --num_rollout 1000000", "latent frames; at most"),
        (inference.main, f"{INFER} rollout.guidance_scale=nan", "finite"),
        (inference.main, f"{INFER} rollout.num_steps=3 rollout.leading_steps=4", "at most 3 steps"),
        (demo.main, f"{CONFIG} --host 0.0.0.0", "add --token"),
        (demo.main, f"{CONFIG} --host 0.0.0.0 --token short", "add --token"),
        (demo.main, f"{CONFIG} --host 256.0.0.1 --token long-enough", "cannot listen"),
        (demo.main, f"{CONFIG} --port 0 --device nope", "no device"),
        (demo.main, f"{CONFIG} --port 0 rollout.schedule=bidirectional", "needs a causal generator"),
        (demo.main, f"{CONFIG} --port 0 nope", "cannot read"),
        (sample_teacher.main, f"{TEACHER} teacher.base={{tmp}}/none", "does not exist"),
        (sample_teacher.main, f"{TEACHER} teacher.path={{tmp}}/none", "none"),
        (pipeline_parallel_inference.main, f"{PARALLEL} rollout.guidance_scale=2", "run without guidance"),
        (pipeline_parallel_inference.main, f"{PARALLEL} --num_rollout 2", "one rollout per video"),
        (pipeline_parallel_inference.main, f"{PARALLEL} --plan --num_rollout 2", "one rollout per video"),
        (train.main, CONFIG, "--logdir"),
        (train.main, f"{CONFIG} --logdir {OUT}", "objective"),
        (train.main, f"{CONFIG} --dry-run world_size=x", "world_size"),
        (train.main, f"{CONFIG} --dry-run world_size=0", "world_size"),
        (train.main, f"{CONFIG} --logdir {OUT} world_size=2", "world_size"),
        (train.main, f"{CONFIG} --logdir {OUT} train.objective=nope", "objective"),
        (train.main, f"{CONFIG} --dry-run video.source=x.mp4", "not for training"),
        (train.main, f"{CONFIG} --dry-run rollout.write_window=3", "rollout.write_window is for inference"),
        (train.main, f"{CONFIG} --dry-run rollout.cache_dtype=int8", "rollout.cache_dtype is for inference"),
        (pipeline_parallel_inference.main, f"{CONFIG} --prompt a", "--output_path"),
        (pipeline_parallel_inference.main, f"{CONFIG} --data_path {{prompts}} --output_path x.mp4", "one file"),
        (download_weights.main, "nope", "unknown name"),
        (download_weights.main, "", "no name"),
        (evaluate.main, "{tmp}/none", "no folder"),
        (evaluate.main, "{tmp}", "no videos"),
        (compare_videos.main, "{tmp}/none {tmp}/nothing", ""),
        (process_videos.main, f"{PROCESS} --shard 1", "belong together"),
        (encode_clips.main, f"--output {OUT} --captions x.json", "--captions needs --videos"),
        (encode_clips.main, f"--output {OUT} --videos x --num_clips 1", "not for --videos"),
        (encode_clips.main, f"--output {OUT} --videos x", "--videos needs --base"),
        (inference.main, f"{CONFIG} --output_folder {OUT} --data_path {{tmp}}/a.txt.gz", "gunzip"),
        (inference.main, f"{CONFIG} --output_folder {OUT} --data_path {{tmp}}/a.jsonl", "one prompt per line"),
        (convert_checkpoint.main, f"--input {{model}} --output {OUT} --to nope", "invalid choice"),
    ],
)
def test_missing_and_contradicting_arguments(world, tmp_path, refuse, main, words, fragment):
    refuse(main, split(words, world, tmp_path), fragment)


@pytest.mark.parametrize("suffix", [".mp4", ".json", ".png", ".safetensors"])
def test_a_folder_in_the_place_of_a_file_is_found_before_videos_are_made(world, tmp_path, refuse, suffix, monkeypatch):
    monkeypatch.setattr("pipeline.generate.TextToVideo.load", None)  # would fail
    (tmp_path / f"out/a-0{suffix}").mkdir(parents=True)
    refuse(inference.main, (*split(INFER, world, tmp_path), "--save_latents"), "it is a folder")


def test_a_folder_in_the_place_of_the_benchmarks_results_is_found_first(tmp_path, refuse, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_peak", None)  # would fail
    refuse(benchmark.main, ("--what", "pass", "--output", tmp_path), f"cannot write {tmp_path}: it is a folder")


@pytest.mark.parametrize(
    ("variables", "fragment"),
    [
        ({"WORLD_SIZE": "2"}, "no RANK and no MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "no MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "no MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "no port"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "no port"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x must be"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1 must be"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "must be below"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK=x must be"),
        ({"RANK": "0"}, "MASTER_ADDR"),
    ],
    ids=str,
)
def test_an_incomplete_environment(variables, fragment, monkeypatch):
    from utils.distributed import check_launcher, rank
    from utils.errors import UserError

    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    os.environ.update(variables)
    try:
        with pytest.raises(UserError, match=fragment):
            rank()
            check_launcher()
    finally:
        for variable in variables:
            del os.environ[variable]
