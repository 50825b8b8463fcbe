"""Sessions of a loaded pipeline for the server."""

from collections.abc import Sequence
from pathlib import Path

from live.generation import Session
from live.protocol import ModelInfo, Start
from pipeline import TextToVideo
from pipeline.build import TEMPORAL_STRIDE, rollout_sigmas
from pipeline.output import device_name
from pipeline.text_to_video import find_file
from utils.prompts import read_prompts

NUM_EXAMPLES = 12
WORLD_PROMPTS = {"shapes-wan": "data/shapes_prompts.txt"}  # of models that were trained on a world of their own
OTHER_PROMPTS = "data/prompts.txt"


class PipelineEngine:
    """Opens sessions of one pipeline."""

    def __init__(self, pipe: TextToVideo, examples: Sequence[str]):
        """
        Args:
            examples: prompts that the page offers.
        """
        self.pipe = pipe
        config, rollout = pipe.config, pipe.config.rollout
        self.info = ModelInfo(
            name="/".join(Path(path).name for path in (config.model.base, config.model.generator) if path),
            fps=config.video.fps,
            width=config.video.width,
            height=config.video.height,
            sigmas=tuple(rollout_sigmas(rollout)),
            block_frames=TEMPORAL_STRIDE * rollout.block_frames,
            schedule="block_first" if rollout.schedule == "block_first" else "timestep_first",
            rule=rollout.prompt_switch,
            examples=tuple(examples),
            context=rollout.context,
            device=device_name(pipe.net.device),
        )

    def open(self, start: Start, seed: int, image_path: str | None) -> Session:
        """Return a new session; see `Engine`."""
        return self.pipe.session(
            start.prompt,
            seed=seed,
            schedule=start.schedule,
            image=image_path,
            prompt_switch=start.prompt_switch,
        )


def example_prompts(base: str, path: str | None = None) -> list[str]:
    """Return example prompts for the model in the folder `base`, or those of the file `path`.

    Raises:
        UserError: if the file cannot be read.
    """
    file = path or find_file(WORLD_PROMPTS.get(Path(base).name, OTHER_PROMPTS))
    return [prompt.text for prompt in read_prompts(file)][:NUM_EXAMPLES]
