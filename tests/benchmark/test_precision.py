"""benchmark/precision.py: errors of 8-bit options against the videos of the unchanged configuration."""

import math

from commands import run_main, write_world

from scripts import measure_precision


def test_an_unchanged_row_has_no_error_and_8_bit_caches_have_some(tmp_path):
    world = write_world(tmp_path, "a\nb\n")
    rows = "--row", "model.offload=none", "--row", "rollout.cache_dtype=int8 rollout.order=diagonal"
    short = "video.num_output_frames=6", "rollout.denoising_step_list=[1000,500]"
    words = "--config_path", world.config, "--data_path", world.prompts, "--num_videos", 1, *rows, *short
    result = run_main(measure_precision.main, *words)
    assert result.code == 0, result.err
    header, _, same, int8 = ([c.strip() for c in line.split("|")[1:-1]] for line in result.out.splitlines())
    assert header == ["change", "latent RMSE", "PSNR, dB"] and same == ["`model.offload=none`", "0.000", "inf"]
    assert 0 <= float(int8[1]) < 1 and 20 < float(int8[2]) < math.inf
