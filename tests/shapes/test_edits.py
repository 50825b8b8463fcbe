"""shapes/edits.py and scripts/measure_v2v.py: rendered ground truth scores perfectly, and each error lowers a score."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_model import write_config, write_model

from scripts import measure_v2v
from shapes import world
from shapes.edits import measure_edit, measure_start, measurement_table, sample_edit

POSITION = "position of the clip, within 4 pixels"


def means(sums) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items() if count}


def test_edits_are_reproducible_and_change_only_the_colour():
    for index in range(20):
        edit = sample_edit(3, index)
        assert edit == sample_edit(3, index)
        assert edit.scene.color not in (edit.clip.scene.color, edit.scene.background)
        assert replace(edit.scene, color=edit.clip.scene.color) == edit.clip.scene
    assert len({sample_edit(3, index) for index in range(20)}) == 20


def test_a_perfect_edit_and_its_errors():
    edit = sample_edit(3, 1)
    recoloured = replace(edit.clip, scene=edit.scene)
    perfect = means(measure_edit(world.render(recoloured, 9), edit))
    assert perfect[POSITION] == perfect["colour of the prompt"] == perfect["background"] == perfect["shape"] == 1
    assert perfect["colour of the clip"] == 0
    kept = means(measure_edit(world.render(edit.clip, 9), edit))
    assert (kept[POSITION], kept["colour of the prompt"], kept["colour of the clip"]) == (1, 0, 1)
    moved = replace(recoloured, x=(recoloured.x + 3) % 64)
    assert means(measure_edit(world.render(moved, 9), edit))[POSITION] == 1
    far = replace(recoloured, x=(recoloured.x + 6) % 64)
    assert means(measure_edit(world.render(far, 9), edit))[POSITION] == 0
    empty = np.full((9, 64, 64, 3), 90, np.uint8)
    assert means(measure_edit(empty, edit))[POSITION] == 0


@pytest.mark.parametrize("first", [1, 13])  # block borders of a video of 25 pixel frames
def test_a_jump_at_the_seam_is_measured(first):
    clip = world.sample_clip(3, 2)
    frames = world.render(clip, 25)
    given = frames[:first]
    smooth = means(measure_start(frames, first, clip, given, given))
    assert smooth["step at the seam, pixels"] < 0.3 and smooth["PSNR to the given frames, dB"] == 99
    later = world.render(replace(clip, x=(clip.x + 5) % 64), 25)
    jump = means(measure_start(np.concatenate([given, later[first:]]), first, clip, given, given + 1))
    assert 4 < jump["step at the seam, pixels"] < 6 and jump["step inside blocks, pixels"] < 0.3
    assert 48 < jump["PSNR to the reconstruction, dB"] < 48.2
    assert "PSNR to the given frames, dB" not in means(measure_start(frames, first, clip))


def test_tables_have_means_and_intervals():
    table = measurement_table("row", {"a": [{"x": (0.0, 1.0), "y": (0, 0)}, {"x": (1.0, 1.0), "y": (0, 0)}]}, 100, 0)
    assert table.splitlines()[-1].split("|")[1:4] == [" a   ", " 50 (0 to 100) ", " - "]


def test_the_script_prints_both_tables(tmp_path, call):
    config = write_config(tmp_path / "c.yaml", write_model(tmp_path / "model"), video={"height": 64, "width": 64})
    words = ("--config_path", config, "--output_folder", tmp_path / "out", "--num_videos", 1, "--strengths", 0.5)
    code, out, err = call(measure_v2v, "rollout.denoising_step_list=[1000]", *words)
    assert code == 0, err
    assert out.count("| 0.5 ") == out.count("| none ") == out.count("| image ") == out.count("| clip ") == 1
    assert (tmp_path / "out/edits.png").exists() and len(list((tmp_path / "out").glob("*.json"))) == 4
