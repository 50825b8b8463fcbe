"""A stub of VBench 0.1.5 with the same interface, file layout and checks.

A video's score is the length of its prompt divided by 100, so that a wrong prompt gives a wrong score. Environment
variables name a dimension that fails (STUB_FAILS) and a file that records calls (STUB_CALLS).
"""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

NOT_FOR_CUSTOM = {"object_class", "multiple_objects", "scene", "appearance_style", "color", "spatial_relationship"}


class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert device == "cpu"
        self.full_info_dir, self.output_path = full_info_dir, output_path
        os.makedirs(output_path, exist_ok=True)

    def build_full_info_json(
        self, videos_path, name, dimension_list, prompt_list=(), special_str="", verbose=False, mode="", **kwargs
    ):
        files = os.listdir(videos_path)
        if mode == "custom_input":
            assert not set(dimension_list) & NOT_FOR_CUSTOM, "not supported for custom input"
            assert set(files) <= set(prompt_list), "prompts of some videos are missing"
            info = [
                {
                    "prompt_en": prompt_list[file],
                    "dimension": dimension_list,
                    "video_list": [os.path.join(videos_path, file)],
                }
                for file in files
            ]
        else:
            assert mode == "vbench_standard" and not prompt_list
            suffix = Path(files[0]).suffix  # of the first file
            info = []
            for entry in json.loads(Path(self.full_info_dir).read_text()):
                if set(dimension_list) & set(entry["dimension"]):
                    names = [f"{entry['prompt_en']}{special_str}-{i}{suffix}" for i in range(5)]
                    entry["video_list"] = [os.path.join(videos_path, n) for n in names if n in files]
                    info.append(entry)
        return self.save(info, f"{name}_full_info.json")

    def evaluate(
        self,
        videos_path,
        name,
        prompt_list=(),
        dimension_list=None,
        local=False,
        read_frame=False,
        mode="vbench_standard",
        **kwargs,
    ):
        self.check_surroundings()
        info = self.build_full_info_json(videos_path, name, dimension_list, prompt_list, mode=mode, **kwargs)
        assert kwargs["imaging_quality_preprocessing_mode"] == "longer"
        results = {d: self.compute(d, json.loads(Path(info).read_text())) for d in dimension_list}
        self.save(results, f"{name}_eval_results.json")

    def compute(self, dimension, info):
        """Return [mean, videos]."""
        if calls := os.environ.get("STUB_CALLS"):
            with open(calls, "a") as file:
                print(dimension, file=file)
        if dimension == os.environ.get("STUB_FAILS"):
            raise RuntimeError("no weights")
        videos = [
            {"video_path": video, "video_results": len(entry["prompt_en"]) / 100}
            for entry in info
            if dimension in entry["dimension"]
            for video in entry["video_list"]
        ]
        assert videos and all(Path(video["video_path"]).stat().st_size for video in videos)
        return [sum(video["video_results"] for video in videos) / len(videos), videos]

    def save(self, data, name):
        path = os.path.join(self.output_path, name)
        Path(path).write_text(json.dumps(data))
        return path

    @staticmethod
    def check_surroundings():
        """Check what DINO's repository needs: no other `utils` module, and no folder that hides packages."""
        assert "utils" not in sys.modules and importlib.util.find_spec("contact_sheet") is None


def by_video(clips):
    """Return VBench-Long's mean over the clips of each video. A clip is named VIDEO_NUMBER.mp4."""
    scores = {}
    for clip in clips:
        name = re.split("_", Path(clip["video_path"]).name)[0]
        scores.setdefault(name, []).append(clip["video_results"])
    return [{"video_path": f"{name}.mp4", "video_results": sum(s) / len(s)} for name, s in scores.items()]
