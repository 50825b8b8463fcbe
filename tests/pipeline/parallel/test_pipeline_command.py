"""scripts/pipeline_parallel_inference.py: any number of ranks makes inference.py's videos (law 1, docs/method.md)."""

import contextlib
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from rank_processes import read_latents_in

from pipeline.parallel.profile import RankProfile
from scripts import pipeline_parallel_inference

# Words of the command, and the numbers of ranks. With 2 and 4 ranks, --no_dac is tested, too.
CASES = {
    "timestep-first": ((), (1, 2, 3, 4, 6)),
    "a block-first start": (("--inference_method", "hybrid_block0"), (1, 2, 3, 4, 6)),
    "a short window": (("--window", "6", "--sink", "1"), (3, 4)),
    "an image": (("--image", "start.png", "--num_output_frames", "10"), (3, 4)),
    "a clip": (("--video", "start.mp4", "--num_output_frames", "11"), (2,)),
    "latents": (("--video", "start.safetensors", "--num_output_frames", "11"), (2,)),
    "a changed clip": (("--video", "seven.mp4", "--strength", "0.6"), (1, 3, 6)),
    "an image per prompt": (("--i2v", "pairs.json", "--num_output_frames", "10"), (1, 3, 4)),
    "clean context": (("rollout.context=clean",), (3, 4)),
    "context noise, independent first frame": (
        (
            "rollout.context=clean",
            "rollout.context_noise=0.2",
            "rollout.independent_first_frame=true",
            "--image",
            "start.png",
            "--num_output_frames",
            "10",
            "rollout.leading_blocks=1",
        ),
        (4,),
    ),
    "a prompt track": (
        ("--prompt_track", "track.txt", "rollout.prompt_switch=recache", "--window", "6", "--sink", "1"),
        (1, 2, 4),
    ),
    "a prompt track, block-first": (
        ("--prompt_track", "track.txt", "rollout.prompt_switch=flush", "--inference_method", "frame_first"),
        (3,),
    ),
    "input context": (("rollout.context=input",), (3, 4)),
    "two steps at once": (("rollout.leading_steps=2",), (3, 4)),
    "block-first": (
        ("--inference_method", "frame_first", "--data_path", "two.txt"),
        (3, 4),
    ),  # 4 ranks form two pipelines
}


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_makes_the_same_latents(inputs, expected, run_ranks, tmp_path, case):
    words, counts = CASES[case]
    words = tuple(str(inputs / word) if (inputs / word).exists() else word for word in words)
    reference = expected(*words)
    for count in counts:
        for flags in ((), ("--no_dac",)) if count in (2, 4) else ((),):
            folder = tmp_path / f"{count}{''.join(flags)}"
            run_ranks(folder, count, *words, *flags)
            made = read_latents_in(folder)
            assert made.keys() == reference.keys()
            for stem, latents in reference.items():
                assert torch.equal(made[stem], latents), (count, flags, stem)
                assert (folder / f"{stem}.mp4").stat().st_size and (folder / f"{stem}.json").exists()


@pytest.mark.parametrize("count", [2, 8])
def test_one_or_two_pipelines_make_several_videos(inputs, expected, run_ranks, tmp_path, count):
    words = "--data_path", inputs / "two.txt"
    run_ranks(tmp_path / "out", count, *words)
    made = read_latents_in(tmp_path / "out")
    assert len(made) == 2 and made.keys() == expected(*words).keys()
    for stem, reference in expected(*words).items():
        assert torch.equal(made[stem], reference)


def test_separate_context_passes_change_latents_by_rounding_only(expected, run_ranks, tmp_path):
    run_ranks(tmp_path / "out", 3, "rollout.fuse_context=false")
    [made], [reference] = read_latents_in(tmp_path / "out").values(), expected().values()
    torch.testing.assert_close(made, reference, atol=2e-4, rtol=0)


def test_a_rerun_makes_only_missing_videos(inputs, run_ranks, tmp_path):
    folder, words = tmp_path / "out", ("--data_path", inputs / "two.txt")
    run_ranks(folder, 2, *words)
    (folder / "a red circle-0.mp4").unlink()
    before = (folder / "a blue square-0.mp4").stat().st_mtime_ns
    output = run_ranks(folder, 2, *words)
    assert "1 of 2 videos exist already" in output
    assert output.count(f"wrote 1 video (1 existed) to {folder} in ") == 1  # by rank 0 only
    assert (folder / "a red circle-0.mp4").exists()
    assert (folder / "a blue square-0.mp4").stat().st_mtime_ns == before
    assert f"wrote 0 videos (2 existed) to {folder}" in run_ranks(folder, 2, *words)


def test_a_video_with_nan_is_an_error_and_made_again(expected, start, run_ranks, tmp_path):
    """The frames before the NaN stay in a file that no later run counts as the video."""
    ranks = start(tmp_path / "out", 2, nan_block=2)
    assert 0 not in ranks.wait()
    message = "error: NaN or infinity in block 2 (latent frames 6 to 8) of a red circle-0.mp4"
    assert ranks.output.count("error:") == 1 and message in ranks.output, ranks.output
    assert not [file for file in ranks.folder.glob("[!.]*") if ".unfinished." not in file.name]
    assert f"wrote 1 video to {ranks.folder} in " in run_ranks(ranks.folder, 2)
    [made], [reference] = read_latents_in(ranks.folder).values(), expected().values()
    assert torch.equal(made, reference)


def test_the_profile_has_every_op_and_a_timeline(run_ranks, tmp_path):
    words = ("--profile", "--profile_output", tmp_path / "p", "--prompt", "a red circle", "--output_path")
    output = run_ranks(tmp_path / "out", 2, *words, tmp_path / "v.mp4")
    assert "| rank | roles " in output and (tmp_path / "v.mp4").exists()
    counts = {}
    for rank in range(2):
        profile = RankProfile.load(tmp_path / f"p_rank{rank}.json")
        assert profile.rank == rank and all(span.end >= span.start >= 0 for span in profile.spans)
        counts[rank] = Counter(span.name for span in profile.spans)
        # Four blocks with two steps each. Every block but the first is denoised in the pass that writes a context.
        assert counts[rank]["denoise"] == 2 and counts[rank]["context+denoise"] == 6
    assert counts[0]["send"] == counts[1]["receive wait"] == counts[1]["decode"] == 4
    width, height = Image.open(tmp_path / "p.png").size
    assert width > 800 and height > 100


def test_the_profile_of_a_prompt_track_names_the_same_blocks(inputs, run_ranks, tmp_path):
    words = ("--profile", "--profile_output", tmp_path / "p", "--prompt_track", inputs / "track.txt")
    run_ranks(tmp_path / "out", 1, *words, "rollout.denoising_step_list=[1000]")
    spans = RankProfile.load(tmp_path / "p_rank0.json").spans
    denoised = [span.block for span in spans if span.name in ("denoise", "context+denoise")]
    assert sorted(denoised) == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from Linux's /proc")
def test_two_hundred_blocks_take_no_more_memory_than_fifty(start, tmp_path):
    words = (
        "--num_output_frames", "600", "--window", "6", "rollout.denoising_step_list=[1000,800,600]",
    )  # fmt: skip
    ranks = start(tmp_path / "out", 3, *words)
    pages: list[list[int]] = []
    while all(process.is_alive() for process in ranks.processes):
        with contextlib.suppress(OSError):
            files = [Path(f"/proc/{process.pid}/statm") for process in ranks.processes]
            pages.append([int(file.read_text().split()[1]) for file in files])
        time.sleep(0.1)
    assert ranks.wait() == [0, 0, 0], ranks.output
    quarter = len(pages) // 4
    assert quarter > 4
    for rank in range(3):
        early, late = (
            sorted(page[rank] for page in part)[quarter // 2]
            for part in (pages[quarter : 2 * quarter], pages[-quarter:])
        )
        print("MEM", rank, early * 4096 / 1e6, late * 4096 / 1e6)
        assert (late - early) * 4096 < 5e5, (rank, early, late)  # the pixels of 100 blocks are 3.7 MB


# ---- Bad requests end before any process joins the others ----


@pytest.fixture
def call_as_rank(call, monkeypatch, inputs, tmp_path):
    """call_as_rank(rank, number of ranks, word, ...): run the script in this process; returns (exit code, out, err)."""

    def run(rank: int, count: int, *words: object) -> tuple[int, str, str]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))
        common = ("--config_path", inputs / "tiny.yaml", "--data_path", inputs / "two.txt", "--output_path", tmp_path)
        return call(pipeline_parallel_inference, *common, *words)

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_output_frames", "10"], "10 latent frames cannot be divided into blocks of 3"),
        (["--prompt", "a cat"], "give --prompt TEXT or --data_path FILE"),
        (["--output_path", "one.mp4"], "is one file, but there are 2 videos"),
        (["--image", "nowhere.png", "--num_output_frames", "10"], "there is no such file"),
        (["--no_such_flag"], "unrecognized arguments"),
    ],
)
def test_all_ranks_refuse_a_bad_request_and_rank_0_prints_the_reason(call_as_rank, words, message):
    code, _, err = call_as_rank(0, 2, *words)
    assert code == 2 and message in err
    assert call_as_rank(1, 2, *words)[0] == 2


def test_only_rank_0_prints_an_error(call_as_rank):
    assert call_as_rank(1, 2, "--num_output_frames", "10") == (2, "", "")


@pytest.mark.parametrize("rank", [0, 12])
def test_too_many_ranks_are_refused(call_as_rank, rank):
    code, _, err = call_as_rank(rank, 13)
    message = "13 processes form 3 pipelines, but there are only 2 videos: start at most 12 processes"
    assert code == 2 and (message in err) == (rank == 0)


def test_the_plan_is_printed_without_weights(call_as_rank):
    plan = "rank 0: text, steps 0-1\nrank 1: steps 2-3\nrank 2: decoding\n"  # of a small video by Wan2.1-1.3B
    plan += "live video on one device: first block after 10 passes; a new prompt shows after 20 to 23 passes\n"
    assert call_as_rank(0, 3, "--plan", "model.base=nowhere") == (0, plan, "")
    assert call_as_rank(1, 3, "--plan", "model.base=nowhere") == (0, "", "")
