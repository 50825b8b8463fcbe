"""Benchmark of whole rollouts and videos."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmark.baseline import BaselineDenoiser, CleanBlocks, baseline_network
from benchmark.flops import PassFlops
from benchmark.host_syncs import host_syncs
from benchmark.measure import Measurement, Repeats, Results, peak_memory, ratios, reset_peak_memory
from benchmark.networks import PROMPT
from benchmark.plain_loop import plain_config, use_plain_network
from benchmark.plain_network import PlainNetwork
from pipeline.batching import unbatched
from pipeline.build import block_layout, context_frames, latent_size
from pipeline.output import VideoFiles, VideoJob, VideoOutput
from pipeline.parallel.profile import WORK, RecordedDenoiser, Recorder, Span
from pipeline.rollout import Rollout
from pipeline.schedule import DenoiseAndWrite, Op, WriteContext, WriteThenDenoise
from pipeline.text_to_video import TextToVideo
from utils.prompts import Prompt


class RolloutBenchmark:
    """Runs rollouts of one pipeline and times their passes."""

    def __init__(
        self,
        pipeline: TextToVideo,
        on_op: Callable[[Op], None] | None,
        baseline: bool = False,
        plain: PlainNetwork | None = None,
    ):
        """
        Args:
            on_op: called after each op.
            baseline: run diffusers' network without a cache instead; see benchmark/baseline.py.
            plain: run this network instead; see benchmark/plain_loop.py.
        """
        self.pipeline, self.on_op = pipeline, on_op
        self.config, self.device = pipeline.config, pipeline.net.device
        self.ops = list(pipeline.ops(pipeline.schedule()))
        self.caches = pipeline.schedule().caches
        self.baseline = baseline_network(pipeline) if baseline else None
        self.plain = plain

    def with_plain_network(self) -> "RolloutBenchmark":
        """Return a benchmark of the same rollout by the plain network with the same weights."""
        shared = self.pipeline
        pipeline = TextToVideo(plain_config(self.config), shared.net, shared.embeddings.cache, shared.vae)
        return RolloutBenchmark(pipeline, self.on_op, plain=PlainNetwork.sharing(shared.net))

    def prepare(self) -> Rollout:
        """Return a new rollout, built as in inference; for the baseline, with its denoiser and its cache."""
        rollout = self.pipeline.rollout([PROMPT], [0], on_op=self.on_op)
        if self.baseline is not None:
            embeddings = self.pipeline.embeddings.of([PROMPT]).to(self.device, self.pipeline.net.dtype)
            context, _ = context_frames(self.config.rollout, self.config.video.num_output_frames)
            rollout.denoiser = BaselineDenoiser(self.baseline, embeddings, context)
            rollout.new_cache = CleanBlocks
        if self.plain is not None:
            use_plain_network(rollout, self.plain, self.pipeline, [PROMPT])
        return rollout

    def run(self, rollout: Rollout) -> None:
        """Execute all ops of a rollout from `prepare`."""
        for _ in rollout.run(self.ops, self.caches):
            pass

    def record(self, clock: Callable[[], float] = time.perf_counter) -> list[Span]:
        """Run a rollout and return the spans of its passes, followed by the span of the whole rollout."""
        rollout, recorder = self.prepare(), Recorder(self.device, clock=clock)
        rollout.denoiser = RecordedDenoiser(rollout.denoiser, rollout.layout, recorder)
        with recorder("rollout"):
            self.run(rollout)
        return recorder.spans()

    def generate_video(self) -> tuple[float, float]:
        """Generate a video file; return the seconds until its first block is encoded, and the total seconds."""
        with tempfile.TemporaryDirectory() as folder:
            job = VideoJob(Prompt(0, PROMPT, "video"), 0, VideoFiles(Path(folder), "video"))
            start = time.perf_counter()
            with VideoOutput.for_jobs(self.config, self.pipeline.vae, [job], "", save_latents=False) as output:
                for latents in self.pipeline.generate_blocks([PROMPT], [0], on_op=self.on_op):
                    output.emit(latents)
            assert output.first_frame_at is not None
            return output.first_frame_at - start, time.perf_counter() - start

    def flops(self) -> int:
        """Return the floating-point operations of all ops; an independent first frame counts as a whole block."""
        config = self.config
        block_frames, layout = config.rollout.block_frames, block_layout(config.rollout, config.video.num_output_frames)
        limit, _ = context_frames(config.rollout, config.video.num_output_frames)
        size, text_length = latent_size(config.video), config.model.text_length
        count = PassFlops(self.pipeline.net.config, size, block_frames, limit, text_length)

        def op_flops(op: Op) -> int:
            context = min(layout.start(op.block), limit)
            if isinstance(op, WriteThenDenoise):
                return op_flops(op.write) + op_flops(op.denoise)
            if self.baseline is not None:
                return 0 if isinstance(op, WriteContext) else count.bidirectional(context + block_frames)
            return count.write(context) if isinstance(op, WriteContext) else count.denoise(context)

        ops = [op for item in self.ops for op in unbatched(item)]
        return sum(op_flops(op.denoise if isinstance(op, DenoiseAndWrite) else op) for op in ops)


def measure_rollout(
    benchmark: RolloutBenchmark, repeats: Repeats, peak_flops: float, plain: RolloutBenchmark | None = None
) -> Results:
    """Measure passes and rollouts and, unless the benchmark is the baseline, whole videos.

    Args:
        peak_flops: FLOP/s of a large matrix product.
        plain: from `with_plain_network`; runs after each rollout, for comparison.
    """
    pipeline, device = benchmark.pipeline, benchmark.device
    pipeline.embeddings.encode([PROMPT])
    rollouts: list[list[Span]] = []
    videos: list[tuple[float, float]] = []
    for number in range(repeats.total):
        if number == repeats.warmup:
            reset_peak_memory(device)
            rollouts, videos = [], []
        if plain is None:
            rollouts.append(benchmark.record(repeats.clock))
        if benchmark.baseline is None:
            videos.append(benchmark.generate_video())
    memory = peak_memory(device)
    comparison: Results = {}
    if plain is not None:  # after the measurement of memory
        pairs = [(benchmark.record(repeats.clock), plain.record(repeats.clock)) for _ in range(repeats.total)]
        rollouts = [own for own, _ in pairs[repeats.warmup :]]
        comparison = _compare(benchmark, rollouts, [other for _, other in pairs[repeats.warmup :]])
    rollout = benchmark.prepare()
    with host_syncs(device) as syncs:
        benchmark.run(rollout)

    flops = benchmark.flops()
    seconds = Measurement.of(spans[-1].seconds for spans in rollouts)
    return {
        **_time_results(benchmark, rollouts),
        "fps_video": None,
        "first_frame": None,
        **_video_results(benchmark, videos),
        "peak_memory": memory,
        "flops": flops,
        "share_of_peak": flops / seconds.median / peak_flops,
        "host_syncs": len(syncs),
        **comparison,
    }


def _compare(benchmark: RolloutBenchmark, rollouts: Sequence[list[Span]], plain: Sequence[list[Span]]) -> Results:
    """Return the seconds per block of plain rollouts, and their ratio to the rollouts that they alternated with."""
    own, other = ([spans[-1].seconds for spans in series] for series in (rollouts, plain))
    num_blocks = block_layout(benchmark.config.rollout, benchmark.config.video.num_output_frames).num_blocks
    return {"plain_block": Measurement.of(s / num_blocks for s in other), "times_plain": ratios(other, own)}


def _num_pixel_frames(benchmark: RolloutBenchmark) -> int:
    return 4 * (benchmark.config.video.num_output_frames - 1) + 1


def _time_results(benchmark: RolloutBenchmark, rollouts: Sequence[list[Span]]) -> Results:
    """Return seconds per pass, block and pixel frame, and pixel frames per second, of rollouts."""
    config = benchmark.config
    block_frames, num_frames = config.rollout.block_frames, config.video.num_output_frames
    layout, pixel_frames = block_layout(config.rollout, num_frames), _num_pixel_frames(benchmark)
    num_blocks = layout.num_blocks
    context, _ = context_frames(config.rollout, num_frames)
    # Steady state: the window is full for the block and for the block before it, which a joint pass writes. The last
    # block does not count, because its context is never written.
    full = [block for block in range(num_blocks - 1) if layout.start(block) > context]
    passes = [span for spans in rollouts for span in spans if span.name in WORK]
    steady = [span for span in passes if span.block in full] or passes
    seconds = [spans[-1].seconds for spans in rollouts]
    results: Results = {
        f"{name}_pass": Measurement.of(span.seconds for span in steady if span.name == name)
        for name in dict.fromkeys(span.name for span in steady)
        if not (benchmark.baseline is not None and name == "context")  # the baseline only stores the block
    }
    results |= {
        "block": Measurement.of(s / num_blocks for s in seconds),
        "pixel_frame": Measurement.of(s / pixel_frames for s in seconds),
        "fps_rollout": Measurement.of(pixel_frames / s for s in seconds),
        "fps_steady": None,
    }
    if full:
        steady_seconds = [sum(s.seconds for s in spans if s.name in WORK and s.block in full) for spans in rollouts]
        results["fps_steady"] = Measurement.of(4 * block_frames * len(full) / s for s in steady_seconds)
    return results


def _video_results(benchmark: RolloutBenchmark, videos: Sequence[tuple[float, float]]) -> Results:
    """Return pixel frames per second of whole videos, and the seconds to their first frame."""
    if not videos:
        return {}
    return {
        "fps_video": Measurement.of(_num_pixel_frames(benchmark) / total for _, total in videos),
        "first_frame": Measurement.of(first for first, _ in videos),
    }
