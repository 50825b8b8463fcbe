"""Generate long videos from text: `from pipeline import TextToVideo`. See docs/api.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.text_to_video import TextToVideo as TextToVideo
    from pipeline.video import Video as Video

__all__ = ["TextToVideo", "Video"]


def __getattr__(name: str) -> Any:
    """Import the public classes when they are first used, so that `import pipeline.schedule` loads no torch."""
    if name == "TextToVideo":
        from pipeline.text_to_video import TextToVideo

        return TextToVideo
    if name == "Video":
        from pipeline.video import Video

        return Video
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
