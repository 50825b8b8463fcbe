"""What benchmarks measure of generation, by the functions that `inference.py` runs. Each gives figures by name:

`*_pass`, `block`, `pixel_frame`, `prompt` and `first_frame` in seconds, `fps_*` in pixel frames per second,
`peak_memory` in bytes, `flops` a count, `share_of_peak` of the machine's matrix-product peak, `host_syncs` a count.
docs/benchmarks.md defines them.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from benchmark.flops import PassFlops
from benchmark.measure import (
    Effort,
    Figures,
    Spread,
    counted_flops,
    durations,
    host_syncs,
    peak_memory,
    reset_peak_memory,
)
from model import presets
from model.causal_wan import CausalWanModel
from model.embeddings import EmbeddingCache
from model.flow import flow_to_x0
from model.kv_cache import KVCache
from model.presets import random_network
from model.text_encoder import TextEncoder
from model.vae import WanVAE
from pipeline.build import (
    build_schedule,
    check_size,
    choose_attention_backend,
    context_frames,
    latent_size,
    load_embeddings,
    load_network,
    load_vae,
    prepare_network,
)
from pipeline.output import VideoFiles, VideoJob, VideoOutput
from pipeline.parallel.profile import WORK, RecordedDenoiser, Recorder, Span
from pipeline.rollout import Rollout
from pipeline.schedule import Denoise, DenoiseAndWrite, Op, WriteContext, WriteThenDenoise
from pipeline.text_to_video import TextToVideo
from utils.config import Config
from utils.device import DTYPES
from utils.errors import UserError
from utils.prompts import Prompt

PROMPT = "a red circle moving up fast on a blue background"


# ---- The networks ----


class Networks:
    """The networks of a configuration, or ones of published size with random weights, each made when it is needed."""

    def __init__(self, config: Config, device: torch.device, random: str = ""):
        """
        Args:
            random: name in presets.TRANSFORMERS of a DiT with random weights; empty to load what the config names.
        """
        self.config, self.device, self.random = config, device, random
        self.dtype = DTYPES[config.model.dtype]

    def transformer(self) -> CausalWanModel:
        """The generator; what should be measured compiled is compiled, or raises torch's TorchDynamoException."""
        if not self.random:
            return load_network(self.config, self.device, fall_back=False)
        net = random_network(CausalWanModel, presets.TRANSFORMERS[self.random], self.dtype, self.device)
        return prepare_network(net, self.config, self.device, fall_back=False)

    def vae(self) -> WanVAE:
        """The VAE."""
        if not self.random:
            return load_vae(self.config, self.device)
        return WanVAE(random_network(AutoencoderKLWan, presets.VAES["wan"], self.dtype, self.device))

    def text_encoder(self) -> TextEncoder:
        """The text encoder; one with random weights reads bytes."""
        config = self.config.model
        if not self.random:
            return load_embeddings(self.config, self.device).encoder
        sizes = presets.TEXT_ENCODERS["wan"]
        encoder = random_network(lambda **s: UMT5EncoderModel(UMT5Config(**s)), sizes, self.dtype, self.device)
        return TextEncoder(encoder, ByT5Tokenizer(), config.text_length)

    def pipeline(self) -> TextToVideo:
        """All that a rollout needs; random nets get random embeddings, which take no text encoder."""
        net = self.transformer()
        if self.random:
            embeddings = EmbeddingCache(RandomText(self.config.model.text_length, net.config.text_dim))
        else:
            embeddings = load_embeddings(self.config, self.device)
        return TextToVideo(self.config, net, embeddings, self.vae())

    def check(self) -> None:
        """Find out before anything is measured whether it can be.

        Raises:
            UserError: for a size or length that cannot be made, and an attention backend that does not run here.
        """
        if self.random:
            sizes = presets.TRANSFORMERS[self.random]
            check_size(self.config, sizes)
            build_schedule(self.config.rollout, self.config.video.num_output_frames)
        else:
            TextToVideo.check(self.config)
            sizes = {}
        one = dict(num_layers=1, num_attention_heads=1, ffn_dim=8, text_dim=8)
        net = random_network(CausalWanModel, sizes | one, self.dtype, self.device)
        name = self.config.model.attention_backend
        choose_attention_backend(net, name)
        x, text = torch.zeros(1, 16, 1, 4, 4, device=self.device), torch.zeros(1, 8, 8, device=self.device)
        try:
            with torch.no_grad():
                net(x, torch.zeros(1, device=self.device), text)
        except (RuntimeError, ValueError, ImportError, AssertionError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            place = f"{self.config.model.dtype} on {self.device}"
            raise UserError(f"attention backend {name} does not run in {place}: {reason}") from None


class RandomText(TextEncoder):
    """Stands for a text encoder where its weights would only take room."""

    def __init__(self, length: int, dim: int):
        super().__init__(None, None, length)
        self.dim = dim

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Random embeddings."""
        return torch.randn(len(prompts), self.length, self.dim)


# ---- Rollouts ----


class Watch:
    """One rollout of a pipeline at a time, its passes noted."""

    def __init__(self, pipeline: TextToVideo, observe: Callable[[Op], None] | None, peer: bool = False):
        self.pipeline, self.observe, self.peer = pipeline, observe, peer
        self.config, self.device = pipeline.config, pipeline.net.device
        self.ops = list(pipeline.ops(pipeline.schedule()))
        self.caches = pipeline.schedule().caches
        self.plain = plain_network(pipeline) if peer else None

    def prepare(self) -> Rollout:
        """A rollout as inference makes it; the peer's with its own denoiser."""
        rollout = self.pipeline.rollout([PROMPT], [0], on_op=self.observe)
        if self.plain is not None:
            embeddings = self.pipeline.embeddings.of([PROMPT]).to(self.device, self.pipeline.net.dtype)
            context, _ = context_frames(self.config.rollout, self.config.video.num_output_frames)
            rollout.denoiser = WholeWindow(self.plain, embeddings, context)
            rollout.new_cache = Past
        return rollout

    def run(self, rollout: Rollout) -> None:
        """All ops."""
        for _ in rollout.run(self.ops, self.caches):
            pass

    def spans(self) -> list[Span]:
        """Run a rollout; its passes and, the last, all of it."""
        rollout, record = self.prepare(), Recorder(self.device)
        rollout.denoiser = RecordedDenoiser(rollout.denoiser, rollout.layout, record)
        with record("rollout"):
            self.run(rollout)
        return record.spans()

    def video(self) -> tuple[float, float]:
        """Make a video as inference does, into files. Seconds to its first frames in the file, and in all."""
        with tempfile.TemporaryDirectory() as folder:
            wanted = VideoJob(Prompt(0, PROMPT, "video"), 0, VideoFiles(Path(folder), "video"))
            started, first = time.perf_counter(), None
            with VideoOutput.for_jobs(self.config, self.pipeline.vae, [wanted], "", save_latents=False) as output:
                for latents in self.pipeline.generate_blocks([PROMPT], [0], on_op=self.observe):
                    output.emit(latents)
                    first = first or time.perf_counter() - started
            assert first is not None
            return first, time.perf_counter() - started


def measure_rollout(watch: Watch, effort: Effort, peak_flops: float) -> Figures:
    """Passes, rollouts, and, but for the peer, whole videos."""
    pipeline, config, device = watch.pipeline, watch.config, watch.device
    pipeline.embeddings.encode([PROMPT])
    rounds: list[list[Span]] = []
    videos: list[tuple[float, float]] = []
    for number in range(effort.warmup + effort.repeats):
        if number == effort.warmup:
            reset_peak_memory(device)
            rounds, videos = [], []
        rounds.append(watch.spans())
        if not watch.peer:
            videos.append(watch.video())
    memory = peak_memory(device)
    rollout = watch.prepare()
    with host_syncs(device) as syncs:
        watch.run(rollout)

    block_frames, num_frames = config.rollout.block_frames, config.video.num_output_frames
    pixel_frames, blocks = 4 * (num_frames - 1) + 1, num_frames // block_frames
    context, _ = context_frames(config.rollout, num_frames)
    # The block before sees a full window too, and the last block's context is never written.
    full = [block for block in range(blocks - 1) if block * block_frames > context]
    passes = [span for spans in rounds for span in spans if span.name in WORK]
    steady = [span for span in passes if span.block in full]
    seconds = [spans[-1].end - spans[-1].start for spans in rounds]
    flops = rollout_flops(watch)
    figures: Figures = {
        f"{name}_pass": Spread.of(span.end - span.start for span in steady or passes if span.name == name)
        for name in dict.fromkeys(span.name for span in steady or passes)
        if not (watch.peer and name == "context")  # it only remembers the block
    }
    figures |= {
        "block": Spread.of(s / blocks for s in seconds),
        "pixel_frame": Spread.of(s / pixel_frames for s in seconds),
        "fps_rollout": Spread.of(pixel_frames / s for s in seconds),
        "fps_steady": None,
        "fps_video": Spread.of(pixel_frames / total for _, total in videos) if videos else None,
        "first_frame": Spread.of(first for first, _ in videos) if videos else None,
        "peak_memory": memory,
        "flops": flops,
        "share_of_peak": flops / Spread.of(seconds).median / peak_flops,
        "host_syncs": len(syncs),
    }
    if full:
        each = [[s.end - s.start for s in spans if s.name in WORK and s.block in full] for spans in rounds]
        figures["fps_steady"] = Spread.of(4 * block_frames * len(full) / sum(times) for times in each)
    return figures


def rollout_flops(watch: Watch) -> int:
    """Return the floating-point operations of all ops."""
    config = watch.config
    frames = config.rollout.block_frames
    context, _ = context_frames(config.rollout, config.video.num_output_frames)
    count = pass_flops(config, watch.pipeline.net, context)

    def of(op: Op) -> int:
        held = min(op.block * frames, context)
        if isinstance(op, WriteThenDenoise):
            return of(op.write) + of(op.denoise)
        if watch.peer:
            return 0 if isinstance(op, WriteContext) else count.bidirectional(held + frames)
        return count.write(held) if isinstance(op, WriteContext) else count.denoise(held)

    return sum(of(op.denoise if isinstance(op, DenoiseAndWrite) else op) for op in watch.ops)


def pass_flops(config: Config, net: CausalWanModel, context: int) -> PassFlops:
    """Return counts of a network's passes next to up to `context` frames."""
    size, text_length = latent_size(config.video), config.model.text_length
    return PassFlops(net.config, size, config.rollout.block_frames, context, text_length)


# ---- The peer: no cache ----


class Past(list[Tensor]):
    """The cache of a denoiser without a cache: the clean blocks so far."""

    reset = list.clear


class WholeWindow:
    """diffusers' own network, which in every pass goes over all of the window bidirectionally, at one noise level: its
    speed can be compared, and of later blocks not what it makes."""

    def __init__(self, net: WanTransformer3DModel, embeddings: Tensor, context: int):
        self.net, self.embeddings, self.context = net, embeddings, context

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: Past, write: bool = False) -> Tensor:
        """As `Denoiser.denoise`."""
        window = torch.cat([*cache, x], dim=1)[:, -(self.context + x.shape[1]) :]
        timestep = torch.full(x.shape[:1], 1000 * sigma, device=x.device)
        clip = window.transpose(1, 2).to(self.net.dtype)
        flow = self.net(clip, timestep, self.embeddings, return_dict=False)[0]
        return flow_to_x0(x, flow.transpose(1, 2)[:, -x.shape[1] :], sigma)

    def write_context(self, x: Tensor, sigma: float, first_frame: int, cache: Past) -> None:
        """Remember the block."""
        cache.append(x)

    def write_then_denoise(
        self, context: Tensor, context_sigma: float, x: Tensor, sigma: float, first_frame: int, cache: Past
    ) -> Tensor:
        """As `Denoiser.write_then_denoise`."""
        self.write_context(context, context_sigma, first_frame, cache)
        return self.denoise(x, sigma, first_frame + context.shape[1], cache)


def plain_network(pipeline: TextToVideo) -> WanTransformer3DModel:
    """diffusers' network with the very weights of the pipeline's."""
    config, own = pipeline.config.model, pipeline.net
    with torch.device("meta"):
        net = WanTransformer3DModel.from_config(own.config)
    net.load_state_dict(own.state_dict(), assign=True)
    # Its tables are no weights.
    sizes = own.config
    net.rope = WanRotaryPosEmbed(sizes.attention_head_dim, sizes.patch_size, sizes.rope_max_seq_len).to(own.device)
    net.eval().requires_grad_(False)
    choose_attention_backend(net, config.attention_backend)
    if config.compile:
        net.compile_repeated_blocks()
    return net


def peer_config(config: Config) -> Config:
    """The schedule that needs no cache: block after block, the past clean."""
    rollout = dataclasses.replace(config.rollout, schedule="block_first", fuse_context=False, leading_blocks=0, sink=0)
    return dataclasses.replace(config, rollout=rollout)


# ---- Single passes ----


def measure_passes(networks: Networks, names: Sequence[str], effort: Effort, peak_flops: float) -> Figures:
    """Passes of one block beside a full window of random keys and values, by inference's executor.

    Operations and share of the peak are those of the first pass.
    """
    config, device = networks.config, networks.device
    reset_peak_memory(device)
    net = networks.transformer()
    embeddings = EmbeddingCache(RandomText(config.model.text_length, net.config.text_dim))
    rollout = TextToVideo(config, net, embeddings, None).rollout([PROMPT], [0])  # type: ignore[arg-type]
    frames = config.rollout.block_frames
    cache = rollout.new_cache()
    fill(cache, net.config.num_layers)
    rollout.new_cache = lambda: cache
    block = -(-cache.context_frames // frames)
    ops: dict[str, Op] = {
        "denoise": Denoise(block, 0, 0),
        "context": WriteContext(block, 0, 0),
        "context+denoise": WriteThenDenoise(WriteContext(block, 0, 0), Denoise(block + 1, 0, 0)),
    }
    full = cache.context_frames
    count = pass_flops(config, net, full)
    counts = {
        "denoise": count.denoise(full),
        "context": count.write(full),
        "context+denoise": count.write_then_denoise(full),
    }
    figures: Figures = {}
    shares = []

    def execute(name: str) -> None:
        rollout.blocks.clear()
        cache.num_frames = block * frames
        for _ in rollout.run(iter([ops[name]]), [0]):
            pass

    for name in names:
        times = Spread.of(durations(partial(execute, name), device, effort))
        figures[f"{name}_pass"] = times
        shares.append(counts[name] / times.median / peak_flops)
    return figures | {
        "flops": counts[names[0]],
        "share_of_peak": shares[0],
        "peak_memory": peak_memory(device),
        "parameters": sum(p.numel() for p in net.parameters()),
        "cache": cache.num_bytes,
    }


def fill(cache: KVCache, num_layers: int) -> None:
    """Fill a cache's window with random keys and values."""
    cache.commit(cache.context_frames)
    for layer in range(num_layers):
        for context in cache.read(layer):  # views: a window filled for the first time lies in one piece
            context.normal_()


# ---- What is around the DiT ----


def measure_decoder(networks: Networks, effort: Effort, peak_flops: float) -> Figures:
    """The streaming decoder, block by block, after a first block."""
    config, device, vae = networks.config, networks.device, networks.vae()
    frames = config.rollout.block_frames
    latents = torch.randn(1, frames, *vae.latent_shape(config.video.height, config.video.width), device=device)
    stream = vae.stream()
    stream.push(latents)  # the first is shorter
    reset_peak_memory(device)
    times = durations(lambda: stream.push(latents), device, effort)
    memory = peak_memory(device)
    # On the meta device: nothing is computed, and the counter knows all of the operations.
    with torch.device("meta"):
        shapes = WanVAE(AutoencoderKLWan.from_config(vae.net.config)).stream()
    shapes.push(latents.to("meta"))
    flops = counted_flops(lambda: shapes.push(latents.to("meta")))
    return {
        "block": Spread.of(times),
        "pixel_frame": Spread.of(t / (frames * vae.temporal_stride) for t in times),
        "fps_decode": Spread.of(frames * vae.temporal_stride / t for t in times),
        "peak_memory": memory,
        "flops": flops,
        "share_of_peak": flops / Spread.of(times).median / peak_flops,
    }


def measure_text_encoder(networks: Networks, effort: Effort, peak_flops: float) -> Figures:
    """The text encoder on one prompt."""
    text_encoder, device = networks.text_encoder(), networks.device
    reset_peak_memory(device)
    times = durations(lambda: text_encoder.encode([PROMPT]), device, effort)
    memory = peak_memory(device)
    flops = counted_flops(lambda: text_encoder.encode([PROMPT]))
    return {
        "prompt": Spread.of(times),
        "peak_memory": memory,
        "flops": flops,
        "share_of_peak": flops / Spread.of(times).median / peak_flops,
    }
