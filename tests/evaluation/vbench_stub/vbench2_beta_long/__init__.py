"""A stub of VBench-Long: it cuts every video into two "clips", and treats an existing folder of clips as complete."""

import os
import shutil
from pathlib import Path

from vbench import VBench, by_video

TABLES = ("clip_length_config", "slow_fast_eval_config", "sb_mapping_file_path", "bg_mapping_file_path")


class VBenchLong(VBench):
    def preprocess(self, videos_path, mode, threshold=35.0, segment_length=16, duration=2, **kwargs):
        assert mode in ("long_custom_input", "long_vbench_standard") and not kwargs["use_semantic_splitting"]
        for number, video in enumerate(sorted(Path(videos_path).glob("*.mp4"))):
            folder = Path(videos_path, "split_clip", video.stem)
            assert not folder.exists()
            folder.mkdir(parents=True)
            if number == 1 and os.environ.get("STUB_FAILS") == "split":
                raise RuntimeError("out of memory")
            for clip in range(2):
                shutil.copy(video, folder / f"{video.stem}_{clip:03d}.mp4")

    def evaluate(self, videos_path, name, prompt_list=(), dimension_list=None, mode="", **kwargs):
        assert all(os.path.isfile(os.path.join("elsewhere", kwargs[table])) for table in TABLES)
        assert kwargs["dev_flag"] and kwargs["sb_clip2clip_feat_extractor"] == "dinov2"
        self.preprocess(videos_path, mode, **kwargs)
        for dimension in dimension_list:  # as VBench-Long does for the consistency dimensions
            os.mkdir(os.path.join(videos_path, f"{dimension}_cat_firstframes_videos"))
        super().evaluate(videos_path, name, prompt_list, dimension_list, mode=mode, **kwargs)

    def compute(self, dimension, info):
        """Return [mean, clips, videos]."""
        _, clips = super().compute(dimension, info)
        videos = by_video(clips)
        return [sum(video["video_results"] for video in videos) / len(videos), clips, videos]
