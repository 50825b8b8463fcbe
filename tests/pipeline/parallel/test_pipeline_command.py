"""scripts/pipeline_parallel_inference.py: any number of ranks make inference.py's videos, and a dead one is named."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import write_config, write_model

from utils.video import VideoWriter

ROOT = Path(__file__).resolve().parents[3]
# Ranks are forked from a process that has imported everything once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pipeline.parallel.runner", "scripts.pipeline_parallel_inference", "inference"])


def rank_main(
    module: str,
    words: list[str],
    environment: dict[str, str],
    log: str,
    comes_within: float = 45.0,
    linger: float = 0,
    gpus: int = 0,
) -> None:
    """One rank: a script's main() with its words, output and errors into a file.

    `linger` is how many seconds the writer takes between a video's last frame and its end; it makes LOG.end then.
    `gpus` is how many torch says that there are.
    """
    import importlib

    from pipeline.output import VideoOutput
    from pipeline.parallel import peers

    peers.STARTUP_TIMEOUT = comes_within
    torch.cuda.device_count = lambda: gpus
    finish = VideoOutput._write_metadata

    def late(self, wanted, sheet):
        if linger:
            Path(f"{log}.end").touch()
            time.sleep(linger)
        finish(self, wanted, sheet)

    VideoOutput._write_metadata = late
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["script.py", *words]
    importlib.import_module(module).main()


class Ranks:
    """N processes that run the pipeline script."""

    def __init__(self, folder: Path, count: int, words: list, absent: tuple = (), **options: float):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.logs = [folder / f"rank{rank}.log" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
            }  # fmt: skip
            arguments = ("scripts.pipeline_parallel_inference", list(map(str, words)), environment, str(log))
            process = CONTEXT.Process(target=rank_main, args=arguments, kwargs=options, daemon=True)
            if rank not in absent:
                process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Exit codes; everybody must be through by the timeout."""
        deadline = time.monotonic() + timeout
        started = [p for p in self.processes if p.pid]
        for process in started:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [p.exitcode for p in started]
        for process in started:
            process.kill()
        assert None not in codes, f"still running after {timeout} s: {codes}\n{self.output}"
        return codes

    @property
    def output(self) -> str:
        """What all have said."""
        return "".join(log.read_text() for log in self.logs if log.exists())


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny model, a configuration, prompts and an image."""
    folder = tmp_path_factory.mktemp("world")
    model = write_model(folder / "model")
    write_config(folder / "tiny.yaml", model, video={"num_output_frames": 12})
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    Image.new("RGB", (32, 32), (200, 40, 40)).save(folder / "start.png")
    with VideoWriter(folder / "start.mp4") as video:  # two latent frames
        video.write(np.random.default_rng(0).integers(256, size=(5, 32, 32, 3), dtype=np.uint8))
    save_file({"latents": torch.randn(2, 16, 4, 4).half()}, folder / "start.safetensors")
    return folder


@pytest.fixture(scope="module")
def expected(world, tmp_path_factory):
    """expected(word, ...): the latents that inference.py makes, by file stem; each made once."""
    made: dict[tuple, dict[str, torch.Tensor]] = {}

    def make(*words: str) -> dict[str, torch.Tensor]:
        if words not in made:
            folder = tmp_path_factory.mktemp("expected")
            common = ["--config_path", world / "tiny.yaml", "--data_path", world / "prompts.txt", "--save_latents"]
            words_ = list(map(str, [*common, "--output_folder", folder, *words]))
            process = CONTEXT.Process(target=rank_main, args=("inference", words_, {}, str(folder / "log")))
            process.start()
            process.join()
            assert process.exitcode == 0, (folder / "log").read_text()
            made[words] = latents(folder)
        return made[words]

    return make


def latents(folder: Path) -> dict[str, torch.Tensor]:
    return {file.stem: load_file(file)["latents"] for file in sorted(folder.glob("*.safetensors"))}


def start(world: Path, folder: Path, count: int, *words, **options) -> Ranks:
    folder.mkdir(exist_ok=True)
    common = ["--config_path", world / "tiny.yaml", "--data_path", world / "prompts.txt", "--save_latents"]
    return Ranks(folder, count, [*common, "--output_path", folder, *words], **options)


CASES = {
    "timestep_first": (),
    "hybrid_block0": ("--inference_method", "hybrid_block0"),
    "a short window": ("--window", "6", "--sink", "1"),
    "an image": ("--image", "start.png", "--num_output_frames", "10"),
    "a clip": ("--video", "start.mp4", "--num_output_frames", "11"),
    "latents": ("--video", "start.safetensors", "--num_output_frames", "11"),
    "clean context": ("rollout.context=clean",),
    "input context": ("rollout.context=input",),
    "two steps at once": ("rollout.leading_steps=2",),
    "block-first": ("--inference_method", "frame_first"),
}


COUNTS = {"timestep_first": (1, 2, 3, 4, 6), "hybrid_block0": (1, 2, 3, 4, 6), "a clip": (2,), "latents": (2,)}


@pytest.mark.parametrize(("case", "counts"), [(case, COUNTS.get(case, (3, 4))) for case in CASES])
def test_any_number_of_ranks_makes_the_same_latents(world, expected, tmp_path, case, counts):
    words = [str(world / word) if word.startswith("start.") else word for word in CASES[case]]
    reference = expected(*words)
    assert len(reference) == 2
    for count in counts:
        for late in ((), ("--no_dac",)) if count in (2, 4) else ((),):
            folder = tmp_path / f"{count}{len(late)}"
            ranks = start(world, folder, count, *words, *late)
            assert ranks.wait() == [0] * count, ranks.output
            made = latents(folder)
            assert made.keys() == reference.keys()
            for stem, tensor in reference.items():
                assert torch.equal(made[stem], tensor), (count, late, stem)
                assert (folder / f"{stem}.mp4").stat().st_size and (folder / f"{stem}.json").exists()


def test_two_pipelines_share_the_videos(world, expected, tmp_path):
    ranks = start(world, tmp_path / "out", 8)
    assert ranks.wait() == [0] * 8, ranks.output
    for stem, tensor in expected().items():
        assert torch.equal(latents(tmp_path / "out")[stem], tensor)


def test_contexts_written_by_passes_of_their_own_change_rounding_only(world, expected, tmp_path):
    ranks = start(world, tmp_path / "out", 3, "rollout.fuse_context=false")
    assert ranks.wait() == [0, 0, 0], ranks.output
    for stem, tensor in expected().items():
        torch.testing.assert_close(latents(tmp_path / "out")[stem], tensor, atol=2e-4, rtol=0)


def test_a_rerun_makes_only_what_is_missing(world, tmp_path):
    assert start(world, tmp_path / "out", 2).wait() == [0, 0]
    (tmp_path / "out/a red circle-0.mp4").unlink()
    before = (tmp_path / "out/a blue square-0.mp4").stat().st_mtime_ns
    ranks = start(world, tmp_path / "out", 2)
    assert ranks.wait() == [0, 0] and "1 of 2 videos exist already" in ranks.output
    assert (tmp_path / "out/a red circle-0.mp4").exists()
    assert (tmp_path / "out/a blue square-0.mp4").stat().st_mtime_ns == before
    assert start(world, tmp_path / "out", 2).wait() == [0, 0]  # nothing to do


def test_the_profile_has_every_op_and_a_timeline(world, tmp_path):
    words = ("--profile", "--profile_output", tmp_path / "p", "--prompt", "a red circle")
    ranks = Ranks(tmp_path, 2, ["--config_path", world / "tiny.yaml", "--output_path", tmp_path / "v.mp4", *words])
    assert ranks.wait() == [0, 0], ranks.output
    assert "| roles " in ranks.output and (tmp_path / "v.mp4").exists()
    from pipeline.parallel.profile import RankProfile

    counts = {}
    for rank in range(2):
        profile = RankProfile.load(tmp_path / f"p_rank{rank}.json")
        number, spans = profile.rank, profile.spans
        assert number == rank and all(s.end >= s.start >= 0 for s in spans)
        for span in spans:
            counts[rank, span.name] = counts.get((rank, span.name), 0) + 1
    # 4 blocks, two steps each; all but the first block beside the context before it
    for rank in range(2):
        assert counts[rank, "denoise"] == 2 and counts[rank, "context+denoise"] == 6
    assert counts[0, "send"] == counts[1, "receive wait"] == counts[1, "decode"] == 4
    width, height = Image.open(tmp_path / "p.png").size
    assert width > 800 and height > 100


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory as Linux does")
def test_two_thousand_blocks_take_no_more_memory_than_a_few(world, tmp_path):
    words = ("--num_output_frames", "6000", "--window", "6", "rollout.denoising_step_list=[1000,800,600,300]")
    common = ["--config_path", world / "tiny.yaml", "--prompt", "a red circle", "--output_path", tmp_path / "v.mp4"]
    ranks = Ranks(tmp_path, 4, [*common, *words])
    pages: list[list[int]] = []
    while all(p.is_alive() for p in ranks.processes):
        with contextlib.suppress(OSError):
            files = [Path(f"/proc/{p.pid}/statm") for p in ranks.processes]
            pages.append([int(file.read_text().split()[1]) for file in files])
        time.sleep(0.5)
    assert ranks.wait() == [0, 0, 0, 0], ranks.output
    quarter = len(pages) // 4
    assert quarter > 4
    for rank in range(4):
        early, late = (
            sorted(p[rank] for p in part)[quarter // 2] for part in (pages[quarter : 2 * quarter], pages[-quarter:])
        )
        assert (late - early) * 4096 < 6e6, (rank, early, late)


# ---- What goes wrong ----

LONG = ("--num_output_frames", "3000", "--window", "6")


def kill(ranks: Ranks, rank: int) -> None:
    os.kill(ranks.processes[rank].pid, signal.SIGKILL)


def frames_in(folder: Path) -> int:
    from utils.video import read_video

    [video] = folder.glob("*.unfinished.mp4")
    return len(read_video(video)[0])


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_dies_in_the_middle_is_named_and_the_frames_stay(world, tmp_path, rank):
    folder = tmp_path / "out"
    ranks = start(world, folder, 4, *LONG)
    deadline = time.monotonic() + 90
    while not any(f.stat().st_size > 5000 for f in folder.glob(".*.partial.mp4")) and time.monotonic() < deadline:
        time.sleep(0.1)
    kill(ranks, rank)
    started = time.monotonic()
    codes = ranks.wait(60)
    assert time.monotonic() - started < 60 and codes.count(1) == 3, ranks.output
    assert ranks.output.count("error:") == 1
    assert f"error: rank {rank} (" in ranks.output and "has died" in ranks.output
    if rank < 3:  # the last one writes the file itself; what it leaves is hidden, and plays
        assert frames_in(folder) > 10 and "the frames so far are in" in ranks.output
    assert start(world, folder, 2, "--num_output_frames", "6").wait() == [0, 0]  # nothing stands in the way of the next
    assert not list(folder.glob("*.unfinished.mp4"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_named(world, tmp_path, rank):
    ranks = start(world, tmp_path / "out", 3, comes_within=4.0, absent=(rank,))
    assert 0 not in ranks.wait(60)
    assert "did not start" in ranks.output or "no answer from" in ranks.output
    if rank == 1:
        assert "rank 1 (steps 1-1)" in ranks.output.replace("(step 1)", "(steps 1-1)")


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_dies_at_the_start_ends_all(world, tmp_path, rank):
    ranks = start(world, tmp_path / "out", 4, *LONG, comes_within=8.0)
    while not ranks.logs[rank].exists():
        time.sleep(0.01)
    kill(ranks, rank)
    codes = ranks.wait(60)
    assert codes.count(0) == 0
    # Without rank 0, who holds the store here, the others have nobody to ask.
    assert f"rank {rank} (" in ranks.output or (rank == 0 and "no answer from" in ranks.output)


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_dies_at_the_end_leaves_no_half_video(world, tmp_path, rank):
    folder = tmp_path / "out"
    (tmp_path / "prompt.txt").write_text("a red circle\n")
    only = ("--data_path", tmp_path / "prompt.txt")
    ranks = start(world, folder, 4, *only, linger=6.0)
    end = Path(f"{ranks.logs[3]}.end")
    deadline = time.monotonic() + 90
    while not end.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)  # the others have nothing left to do and say so
    kill(ranks, rank)
    codes = ranks.wait(60)
    videos = list(folder.glob("[!.]*.mp4"))
    if rank in (1, 2):  # its part is done, and the video becomes whole without it
        assert codes.count(0) == 3 and len(videos) == 1, ranks.output
    else:
        assert codes.count(0) == 0 and "rank " in ranks.output and not [v for v in videos if "unfinished" not in v.name]
    assert start(world, folder, 2, *only).wait() == [0, 0]
    assert len(list(folder.glob("[!.]*.mp4"))) == 1 and not list(folder.glob(".*"))


def test_ctrl_c_ends_everybody(world, tmp_path):
    folder = tmp_path / "out"
    ranks = start(world, folder, 2, *LONG)
    deadline = time.monotonic() + 90
    while not list(folder.glob(".*.partial.mp4")) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGINT)
    assert ranks.wait(30) == [1, 1]
    assert ranks.output.count("error:") == 1 and "interrupted" in ranks.output


def test_broken_weights_are_one_line(world, tmp_path):
    ranks = start(world, tmp_path / "out", 2, "--checkpoint_path", tmp_path / "none.pt")
    assert 0 not in ranks.wait(60)
    assert ranks.output.count("error:") == 1 and "none.pt" in ranks.output and "Traceback" not in ranks.output


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda", "2 processes on this machine need a GPU each, but there are 1: start 1, or use --device cpu"),
        ("cuda:0", "--device cuda:0 is one GPU, and 2 processes on this machine need one each: use --device cuda"),
    ],
)
def test_ranks_that_would_share_a_gpu_are_refused(world, tmp_path, device, says):
    ranks = start(world, tmp_path / "out", 2, "--device", device, gpus=1)
    assert ranks.wait(60) == [1, 1]
    assert ranks.output.splitlines() == [f"error: {says}"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--num_output_frames", "10"], "10 latent frames cannot be divided into blocks of 3"),
        (["--prompt", "a cat"], "give --prompt TEXT or --data_path FILE"),
        (["--output_path", "one.mp4"], "is one file, but there are 2 videos"),
        (["--image", "nowhere.png", "--num_output_frames", "10"], "there is no such file"),
        (["--no_such_flag"], "unrecognized arguments"),
    ],
)
def test_bad_requests_are_one_line_for_all_ranks(world, tmp_path, words, says):
    ranks = start(world, tmp_path / "out", 2, *words)
    assert ranks.wait() == [2, 2]
    assert says in ranks.output and "Traceback" not in ranks.output


def test_too_many_ranks_for_the_work_are_refused(world, tmp_path):
    ranks = start(world, tmp_path / "out", 13)
    assert set(ranks.wait()) == {2}
    assert "13 processes are 3 pipelines, but there is work for 2: start at most 12" in ranks.output


def test_the_plan_is_printed_without_weights(world, tmp_path):
    ranks = start(world, tmp_path / "out", 3, "--plan", "model.base=nowhere")
    assert ranks.wait() == [0, 0, 0]
    assert ranks.output.splitlines() == ["rank 0: text, step 0", "rank 1: step 1", "rank 2: steps 2-3, decoding"]


@pytest.mark.slow
def test_torchrun_names_the_dead_and_leaves_nobody_behind(world, tmp_path):
    words = ["--config_path", world / "tiny.yaml", "--prompt", "a red circle", "--output_path", tmp_path, *LONG]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*launcher, "scripts/pipeline_parallel_inference.py", *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".*.partial.mp4")) and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[0]), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode != 0 and b"rank 0 (text, steps 0-1) has died" in err, err.decode()
        for worker in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(int(worker), 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
