"""scripts/benchmark.py: claims about what its figures are, on a tiny model.

Operations are those that torch counts; the loop never waits for the device, and it would be noticed if it did; the
peer has the same weights and makes the same first block; a video takes as long as inference.py takes for one more.
"""

import itertools
import json
import time

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models import attention_dispatch as dispatch
from tiny_model import TEXT_ENCODER, TRANSFORMER, VAE, write_config, write_model

import inference
from benchmark.inference import (
    PROMPT,
    Networks,
    Watch,
    measure_passes,
    measure_rollout,
    peer_config,
    rollout_flops,
)
from benchmark.measure import Effort, Spread, counted_flops
from model import presets
from model.denoiser import Denoiser
from pipeline.build import choose_attention_backend
from scripts import benchmark
from utils.config import load_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A tiny model's configuration: 5 blocks, of which the last two see a full window."""
    folder = tmp_path_factory.mktemp("benchmark")
    video = {"height": 32, "width": 32, "num_output_frames": 15}
    return write_config(folder / "tiny.yaml", write_model(folder / "model"), video=video, rollout={"window": 9})


@pytest.fixture
def watch(config_file):
    """watch(word, ..., peer=False): a rollout of the tiny model with these overrides."""

    def make(*words: str, peer: bool = False) -> Watch:
        config = load_config(str(config_file), words)
        config = peer_config(config) if peer else config
        return Watch(Networks(config, CPU).pipeline(), None, peer)

    return make


@pytest.fixture
def bench(call, config_file, tmp_path):
    """bench(word, ...): run the script on the tiny model; returns what it prints and its JSON."""

    def run(*words: str) -> tuple[str, dict]:
        output = tmp_path / "new.json"
        code, out, err = call(benchmark, "--config_path", config_file, "--output", output, *words)
        assert code == 0, err
        return out, json.loads(output.read_text())

    return run


# ---- Figures ----


@pytest.mark.parametrize("fuse", ["true", "false"])
@pytest.mark.parametrize("schedule", ["timestep_first", "block_first"])
@pytest.mark.parametrize("context", ["output", "input"])
def test_operations_of_a_rollout_are_those_that_torch_counts(watch, schedule, fuse, context):
    words = (f"rollout.schedule={schedule}", f"rollout.fuse_context={fuse}", f"rollout.context={context}")
    watched = watch(*words)
    rollout = watched.prepare()
    assert rollout_flops(watched) == counted_flops(lambda: watched.run(rollout)) > 0


def test_operations_of_the_baseline_are_those_that_torch_counts(watch):
    watched = watch(peer=True)
    rollout = watched.prepare()
    assert rollout_flops(watched) == counted_flops(lambda: watched.run(rollout))


def test_figures_of_a_rollout_fit_together(watch):
    figures = measure_rollout(watch("rollout.fuse_context=false"), Effort(0, 2), peak_flops=1e12)
    blocks, pixel_frames = 5, 57
    seconds = figures["block"].median * blocks
    assert figures["pixel_frame"].median == pytest.approx(seconds / pixel_frames)
    assert figures["fps_rollout"].low == pytest.approx(1 / figures["pixel_frame"].high)
    assert figures["share_of_peak"] == pytest.approx(figures["flops"] / seconds / 1e12)
    assert figures["fps_video"].high < figures["fps_rollout"].high and figures["first_frame"].median > 0
    assert figures["denoise_pass"].median > figures["context_pass"].median * 0.5
    # 4 denoise and 4 context passes a block
    expected = 12 / 4 / (figures["denoise_pass"].median + figures["context_pass"].median)
    assert figures["fps_steady"].median == pytest.approx(expected, rel=0.5)


def test_no_full_window_no_steady_state(watch):
    figures = measure_rollout(watch("rollout.window=15"), Effort(0, 1), peak_flops=1e12)
    assert figures["fps_steady"] is None and figures["context+denoise_pass"].median > 0


@pytest.mark.parametrize("words", [[], ["rollout.schedule=block_first"], ["rollout.order=diagonal"]])
def test_the_loop_never_waits_for_the_device(watch, words, monkeypatch):
    watched = watch(*words)
    assert measure_rollout(watched, Effort(0, 1), 1e12)["host_syncs"] == 0
    denoise = Denoiser.denoise

    def reading(self, x, *arguments):
        x.sum().item()
        return denoise(self, x, *arguments)

    monkeypatch.setattr(Denoiser, "denoise", reading)
    denoised = sum(type(op).__name__ == "Denoise" for op in watched.ops)
    assert measure_rollout(watched, Effort(0, 1), 1e12)["host_syncs"] == denoised > 0


def test_single_passes_see_a_full_window(config_file):
    networks = Networks(load_config(str(config_file)), CPU)
    names = ["denoise", "context", "context+denoise"]
    figures = measure_passes(networks, names, Effort(1, 2), peak_flops=1e12)
    assert all(figures[f"{name}_pass"].median > 0 for name in names)
    assert figures["cache"] == 2 * 2 * 9 * 4 * 32 * 4  # k and v, layers, frames, tokens of each, width, bytes
    assert figures["parameters"] == sum(p.numel() for p in networks.transformer().parameters())


# ---- The baseline ----


def first_block(watched: Watch) -> torch.Tensor:
    rollout = watched.prepare()
    return next(iter(rollout.run(watched.ops, watched.caches)))[1]


def test_the_baseline_has_our_weights_and_makes_our_first_block(watch):
    peer, ours = watch(peer=True), watch("rollout.schedule=block_first")
    assert isinstance(peer.plain, WanTransformer3DModel)
    shared = dict(peer.plain.named_parameters())
    assert all(p.data_ptr() == shared[name].data_ptr() for name, p in peer.pipeline.net.named_parameters())
    torch.testing.assert_close(first_block(peer), first_block(ours), rtol=1e-4, atol=1e-4)


def test_the_baseline_goes_over_the_whole_window_in_every_pass(watch):
    peer = watch(peer=True)
    frames = []
    peer.plain.register_forward_pre_hook(lambda _, arguments: frames.append(arguments[0].shape[2]))
    blocks = list(peer.prepare().run(peer.ops, peer.caches))
    assert frames == [length for length in (3, 6, 9, 9, 9) for _ in range(4)]
    assert [block for block, _ in blocks] == [0, 1, 2, 3, 4]


# ---- The command ----


def test_the_default_run(bench):
    out, document = bench("--repeats", "1", "--warmup", "0")
    rows = {row["what"]: row for row in document["results"]}
    assert list(rows) == ["rollout", "baseline", "decoder", "text_encoder"]
    ours, theirs = (rows[kind]["figures"]["fps_rollout"]["median"] for kind in ("rollout", "baseline"))
    assert rows["rollout"]["figures"]["times_baseline"] == ours / theirs
    assert document["matmul_peak"]["float32"] > 1e9 and document["machine"]["torch"] == torch.__version__
    assert "| rollout |" in out and "x baseline" in out and "| decoder |" in out
    tables = [line for line in out.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
    for kind in ("decoder", "text_encoder"):
        assert rows[kind]["figures"]["flops"] > 0 and rows[kind]["figures"]["peak_memory"] > 1e8


def cases(config_file, monkeypatch, *words: str) -> list[benchmark.Case]:
    monkeypatch.setattr("sys.argv", ["benchmark", "--config_path", str(config_file), *words])
    args = benchmark.parse_arguments()
    return list(benchmark.make_cases(args, benchmark.Preset(args.config_path, args.config_path, [])))


def test_options_multiply_and_the_same_is_measured_once(config_file, monkeypatch):
    words = ["--schedule", "timestep_first", "block_first", "--order", "step_major", "diagonal", "--fuse", "on", "off"]
    found = cases(config_file, monkeypatch, *words, "--window", "6", "9", "rollout.sink=3")
    rollouts = [case for case in found if case.kind == "rollout"]
    assert len(rollouts) == 2 * 2 * 3  # block-first knows no order
    settings = [case.settings for case in rollouts]
    assert all(a != b for a, b in itertools.combinations(settings, 2))
    assert {case.config.rollout.window for case in rollouts} == {6, 9}
    assert all(case.config.rollout.sink == 3 for case in rollouts)
    assert sum(case.kind == "baseline" for case in found) == 2  # a window each
    [_, small] = cases(config_file, monkeypatch, "--what", "pass", "--size", "32x32", "32x48")
    assert (small.config.video.height, small.config.video.width) == (32, 48)


def test_ratios_to_an_earlier_run(bench, tmp_path):
    _, document = bench("--what", "text_encoder", "--repeats", "1")
    row = document["results"][0]
    row["figures"]["prompt"]["median"] *= 2
    (tmp_path / "old.json").write_text(json.dumps(document))
    row["settings"]["dtype"] = "bfloat16"
    (tmp_path / "other.json").write_text(json.dumps(document))
    out, _ = bench("--what", "text_encoder", "--against", str(tmp_path / "old.json"))
    [line] = [line for line in out.splitlines() if "| TFLOP |" in line and "text_encoder float32" in line]
    assert line.split("|")[-2].strip() == "1.000" and "prompt, ms" in out.split("Against")[1]
    out, _ = bench("--what", "text_encoder", "--against", str(tmp_path / "other.json"))
    assert "no row of" in out


def test_a_backend_is_chosen_for_one_network(make_net):
    before = dispatch._AttentionBackendRegistry.get_active_backend()[0]
    one, other = make_net(), make_net()
    choose_attention_backend(one, "_native_math")
    assert one.layers[0].attn1.processor._attention_backend == "_native_math"
    assert other.layers[0].attn1.processor._attention_backend is None
    assert dispatch._AttentionBackendRegistry.get_active_backend()[0] == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--size", "64"], "--size 64: give HEIGHTxWIDTH"),
        (["--size", "32x40"], "--width 40 is not a multiple of 16"),
        (["--frames", "16"], "16 latent frames cannot be divided into blocks of 3"),
        (["--window", "x"], "rollout.window"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--attention", "none_such"], "model.attention_backend=none_such"),
        (["--attention", "native", "_native_cudnn"], "attention backend _native_cudnn does not run in float32 on cpu"),
        (["--against", "none.json"], "none.json is no JSON of scripts/benchmark.py"),
        (["--what", "training"], "tiny.yaml trains nothing"),
        (["--device", "moon"], "no device 'moon'"),
        (["typo.key=1"], "typo"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(call, config_file, tmp_path, words, says):
    output = tmp_path / "new.json"
    code, out, err = call(benchmark, "--config_path", config_file, "--output", output, *words)
    last = err.splitlines()[-1]  # diffusers warns of its own
    assert code == 2 and last.startswith("error: ") and says in last and "Traceback" not in err
    assert out == "" and not output.exists()


def test_networks_of_published_size_have_random_weights(call, tmp_path, monkeypatch):
    monkeypatch.setitem(presets.TRANSFORMERS, "wan-1.3b", TRANSFORMER)
    monkeypatch.setitem(presets.VAES, "wan", VAE)
    monkeypatch.setitem(presets.TEXT_ENCODERS, "wan", TEXT_ENCODER)
    output = tmp_path / "new.json"
    words = ["--preset", "h100", "--device", "cpu", "--size", "32x32", "--dtype", "float32", "--frames", "9"]
    words += ["--what", "rollout", "baseline", "pass", "decoder", "text_encoder", "--passes", "denoise"]
    code, _, err = call(benchmark, *words, "--repeats", "1", "--warmup", "0", "--output", output)
    assert code == 0, err
    rows = {row["what"]: row["figures"] for row in json.loads(output.read_text())["results"]}
    assert rows["rollout"]["host_syncs"] == 0 and rows["rollout"]["times_baseline"] > 0
    assert "denoise_pass" in rows["pass"] and "context_pass" not in rows["pass"]


def test_rows_for_which_memory_is_too_small_are_left_empty(bench, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(benchmark, "measure_decoder", full)
    out, document = bench("--what", "decoder", "text_encoder", "--repeats", "1")
    assert [bool(row["figures"]) for row in document["results"]] == [False, True] and "| text_encoder |" in out


@pytest.mark.parametrize("kind", ["rollout", "baseline"])
def test_rows_that_cannot_be_compiled_say_so_and_have_no_figures(call, config_file, tmp_path, monkeypatch, kind):
    def failing(graph, inputs):
        raise RuntimeError("no compiler here")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend=failing))
    output = tmp_path / "new.json"
    words = ["--config_path", config_file, "--what", kind, "--compile", "on", "--repeats", "1", "--warmup", "0"]
    code, out, err = call(benchmark, *words, "--output", output)
    [row] = json.loads(output.read_text())["results"]
    assert code == 0 and row["figures"] == {} and f"| {kind} |" in out
    assert f"cannot be compiled (RuntimeError: no compiler here): {kind} " in err and "run uncompiled" not in err


# ---- Against the clock, and training ----


@pytest.mark.slow
def test_a_video_takes_as_long_as_inference_takes_for_one_more(call, config_file, watch, tmp_path):
    """To 5% on a quiet machine (docs/benchmarks.md); the least of several, in turns, on any."""
    prompts = {}
    for count in (1, 5):
        prompts[count] = tmp_path / f"{count}.txt"
        prompts[count].write_text("".join(f"{PROMPT} {number}\n" for number in range(count)))
    watched = watch()
    watched.pipeline.embeddings.encode([PROMPT])
    times: dict[str | int, list[float]] = {"video": [], 1: [], 5: []}
    for turn in range(3):
        times["video"] += [watched.video()[1] for _ in range(2)]
        for count, file in prompts.items():
            words = ["--config_path", config_file, "--data_path", file, "--output_folder", tmp_path / f"{turn} {count}"]
            started = time.perf_counter()
            code, _, err = call(inference, *words)
            times[count].append(time.perf_counter() - started)
            assert code == 0, err
    one_more = (min(times[5]) - min(times[1])) / 4
    assert 0.5 < one_more / min(times["video"]) < 2


@pytest.mark.slow
def test_training_is_timed_in_a_process_of_its_own(call, config_file, tmp_path):
    content = json.loads(config_file.read_text())
    content["train"] = {"objective": "score_distillation", "init": content["model"]["generator"], "batch_size": 2}
    content["distill"] = {"generator_every": 2, "max_rollout_frames": 6}
    content["data"] = {"num_frames": 6}
    file, output = tmp_path / "train.yaml", tmp_path / "new.json"
    file.write_text(json.dumps(content))
    words = ["--config_path", file, "--output", output, "--what", "training"]
    code, _, err = call(benchmark, *words, "--iterations", "4", "--block_backward", "on", "off")
    assert code == 0, err
    rows = json.loads(output.read_text())["results"]
    assert [row["settings"]["block_backward"] for row in rows] == ["on", "off"]
    for row in rows:
        figures = row["figures"]
        assert figures["generator_iteration"]["median"] > figures["critic_iteration"]["low"] > 0
        assert figures["iterations_per_second"] > 0 and figures["flops"] > 1e6
        assert 1e8 < figures["critic_memory"] <= figures["peak_memory"]
    code, _, err = call(benchmark, *words, "--iterations", "1")
    assert code == 2 and "--iterations must be at least distill.generator_every=2" in err
    code, _, err = call(benchmark, *words, "train.init=none_such")
    assert code == 2 and "Traceback" not in err  # found out in the other process


def test_a_spread_is_a_mapping_in_json():
    assert benchmark.to_json({"block": Spread(2.0, 1.0, 3.0), "flops": 5}) == {
        "block": {"median": 2.0, "low": 1.0, "high": 3.0},
        "flops": 5,
    }
