"""One rank of a pipeline: load the networks for its roles, run its stage, and exchange messages with other ranks.

- The text rank picks the next video and sends its prompt embedding to the stages.
- A stage hands each block on as soon as it is re-noised.
- The decoder rank writes frames while later blocks are still being denoised.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from model.causal_wan import CausalWanModel
from model.denoiser import Denoiser
from pipeline.build import (
    block_layout,
    build_rollout,
    build_schedule,
    latent_size,
    load_embeddings,
    load_network,
    load_vae,
)
from pipeline.build_track import build_switch_ops, build_track
from pipeline.output import VideoJob, VideoOutput
from pipeline.parallel.profile import RecordedDenoiser, Recorder
from pipeline.parallel.stage_rollout import StageRollout
from pipeline.parallel.stages import Pipeline
from pipeline.parallel.transport import MessageChannel, StageTransport, handoff_groups
from pipeline.prefix import read_prefix
from pipeline.prompt_embeddings import PromptEmbeddings
from pipeline.prompt_track import PromptTrack
from pipeline.rollout import BlockLayout, Rollout
from pipeline.schedule import Schedule, for_stage
from pipeline.source import source_frames
from utils.config import Config
from utils.device import DTYPES


class PipelineRank:
    """One rank of a pipeline, with the networks that its roles need."""

    def __init__(
        self,
        config: Config,
        pipelines: Sequence[Pipeline],
        rank: int,
        store: dist.Store,
        device: torch.device,
        prefix_path: str = "",
        save_latents: bool = False,
        send_after_write: bool = False,
        recorder: Recorder | None = None,
    ):
        """Load the networks. All ranks of the default process group must call this at the same time.

        Args:
            store: key-value store of all ranks, for small values.
            prefix_path: path of the image, clip or latents that videos start with; empty for none.
            save_latents: also write X.safetensors.
            send_after_write: send blocks only after their context write.
            recorder: records spans for a profile.

        Raises:
            UserError: for missing or broken files.
        """
        self.config, self.rank, self.store, self.device = config, rank, store, device
        self.prefix_path, self.save_latents, self.send_after_write = prefix_path, save_latents, send_after_write
        self.recorder = recorder or Recorder(device, enabled=False)
        self.pipeline_number = next(number for number, p in enumerate(pipelines) if rank in p.ranks)
        self.pipeline = pipelines[self.pipeline_number]
        self.is_only_pipeline = len(pipelines) == 1
        self.caches = self.pipeline.caches(rank)
        self.output: VideoOutput | None = None
        self._unfinished: list[Path] = []
        self._handoff_groups = handoff_groups()
        self.net = load_network(config, device) if self.caches else None
        self.vae = load_vae(config, device) if rank == self.pipeline.decoder_rank else None
        self.source_vae = None  # encodes the source where blocks start
        if config.video.source and rank == self.pipeline.stage_ranks[0]:
            self.source_vae = self.vae or load_vae(config, device)
        self.embeddings = None
        if rank == self.pipeline.text_rank:
            # Offloading makes room for other networks, so a rank without any keeps its text encoder on the device.
            offload = "none" if self.net is None and self.vae is None else config.model.offload
            home = device if offload == "none" else torch.device("cpu")
            self.embeddings = PromptEmbeddings(load_embeddings(config, home), device, offload)

    def make_videos(self, jobs: Sequence[VideoJob]) -> None:
        """Do the work of this rank for the videos of its pipeline. `jobs` are those of all pipelines."""
        prefixes = self._share_prefixes(jobs)
        if self.embeddings is not None and self.embeddings.offload != "none":
            with self.recorder("text"):  # all prompts at once: the jobs of this pipeline are not assigned yet
                self.embeddings.encode([text for job in jobs for text in job.prompt.texts])
        texts, blocks = MessageChannel(self.device), MessageChannel(self.device, self._handoff_groups)
        for job in self._assigned_jobs(jobs):
            prefix = prefixes.get(self._prefix_path(job))
            prefix_frames = 0 if prefix is None else prefix.shape[1]
            track = build_track(self.config, job.prompt.track, job.prompt.text, prefix_frames)
            embeddings = self._share_embeddings(track.prompts, texts)
            schedule = self._schedule(prefix)
            if self.net is not None and embeddings is not None:
                self._run_stage(job, self.net, embeddings, track, schedule, prefix, blocks)
            elif self.vae is not None:
                self._decode(job, schedule, prefix, blocks)
        texts.wait_for_sends()
        blocks.wait_for_sends()

    def keep_unfinished(self) -> str:
        """Close the current video after a failure, and return a message with its path; empty if there is none."""
        if self.output is not None:
            self._unfinished += self.output.keep_unfinished()
        return "".join(f"the frames so far are in {path}" for path in self._unfinished)

    # ---- Inputs of a video ----

    def _assigned_jobs(self, jobs: Sequence[VideoJob]) -> Iterator[VideoJob]:
        """Yield the jobs of this pipeline. All pipelines share one job queue; a free pipeline gets the next job."""
        for count in range(len(jobs) + 1):
            key = f"pipeline {self.pipeline_number} job {count}"
            if self.rank == self.pipeline.text_rank:
                index = count if self.is_only_pipeline else self.store.add("jobs taken", 1) - 1
                self.store.set(key, str(index))
            else:
                while not self.store.check([key]):  # `wait` would block the monitor's access to the store
                    time.sleep(0.005)
                index = int(self.store.get(key))
            if index >= len(jobs):
                return
            yield jobs[index]

    def _prefix_path(self, job: VideoJob) -> str:
        return job.prompt.image or self.prefix_path

    def _share_prefixes(self, jobs: Sequence[VideoJob]) -> dict[str, Tensor]:
        """Return the latents [1, F, C, h, w] that videos start with, by path. The decoder rank encodes and sends them.

        Other ranks than stages and the decoder get tensors of undefined values.
        """
        prefixes = {}
        for number, path in enumerate(dict.fromkeys(map(self._prefix_path, jobs))):
            if path:
                prefixes[path] = self._share_prefix(path, f"pipeline {self.pipeline_number} prefix {number} shape")
        return prefixes

    def _share_prefix(self, path: str, key: str) -> Tensor:
        stages = self.pipeline.stage_ranks
        if self.vae is not None:
            prefix = read_prefix(path, self.config, self.vae)
            self.store.set(key, json.dumps(list(prefix.shape)))
            for rank in stages:
                if rank != self.rank:
                    dist.send(prefix.to(self.device), rank)
            return prefix
        while not self.store.check([key]):
            time.sleep(0.01)
        prefix = torch.empty(json.loads(self.store.get(key)), device=self.device)
        if self.rank in stages:
            dist.recv(prefix, self.pipeline.decoder_rank)
        return prefix.cpu()  # one per image of --i2v; a rollout moves its own to the device

    def _share_embeddings(self, prompts: Sequence[str], channel: MessageChannel) -> Tensor | None:
        """Return the embeddings [prompts, L, text_dim] on stages, None on other ranks. The text rank sends them."""
        stages = self.pipeline.stage_ranks
        if self.embeddings is not None:
            with self.recorder("text"):
                embeddings = self.embeddings.of(prompts).to(self.device)
            for rank in stages:
                if rank != self.rank:
                    channel.send(embeddings, rank)
            return embeddings if self.rank in stages else None
        if self.net is None:
            return None
        shape = (len(prompts), self.config.model.text_length, self.net.config.text_dim)
        channel.expect([(self.pipeline.text_rank, shape, DTYPES[self.config.model.dtype])])
        return channel.receive()

    # ---- Blocks ----

    def _run_stage(
        self,
        job: VideoJob,
        net: CausalWanModel,
        embeddings: Tensor,
        track: PromptTrack,
        schedule: Schedule,
        prefix: Tensor | None,
        channel: MessageChannel,
    ) -> None:
        """Run the ops of this stage. The last stage decodes finished blocks, or sends them to the decoder rank."""
        layout = self._layout(prefix)
        frame_shape = (net.config.in_channels, *latent_size(self.config.video))
        upstream, downstream = self.pipeline.upstream(self.rank), self.pipeline.downstream(self.rank)
        is_last = self.caches[-1] == schedule.caches[-1]
        transport = StageTransport(
            schedule,
            self.caches,
            layout,
            frame_shape,
            upstream,
            None if is_last else downstream,
            channel,
            self.recorder,
            self.send_after_write,
        )
        with torch.no_grad():
            denoisers = {
                prompt: Denoiser(net, net.encode_text(embedding))
                for prompt, embedding in zip(track.prompts, embeddings.split(1), strict=True)
            }
        rollout = build_rollout(
            self.config,
            denoisers[track.prompt_at(0)],
            [job.sample],
            prefix=prefix,
            source=source_frames(self.config, self.source_vae) if self.source_vae else None,
            rollout_class=StageRollout,
            transport=transport,
            on_op=transport.after_op,
            denoiser_at=(lambda block: denoisers[track.prompt_at(block)]) if job.prompt.track else None,
        )
        self._record_spans(rollout)
        stage_ops = for_stage(schedule.ops("diagonal", self.config.rollout.fuse_context), self.caches)
        ops = build_switch_ops(self.config, stage_ops, track, 0 if prefix is None else prefix.shape[1])
        blocks = rollout.run(list(ops), self.caches)
        if self.vae is not None:
            self._write(job, schedule, prefix, (latents for _, latents in blocks))
            return
        for _, latents in blocks:
            assert downstream is not None
            channel.send(latents, downstream)
        transport.flush()

    def _record_spans(self, rollout: Rollout) -> None:
        """Record the rollout's forward passes and noise, if profiling is on."""
        if not self.recorder.enabled:
            return
        noise = rollout.noise

        def recorded_noise(block: int, step: int) -> Tensor:
            with self.recorder("add-noise", block):
                return noise(block, step)

        rollout.noise = recorded_noise
        rollout.denoiser = RecordedDenoiser(rollout.denoiser, rollout.layout, self.recorder)
        if (denoiser_at := rollout.denoiser_at) is not None:
            layout = rollout.layout
            rollout.denoiser_at = lambda block: RecordedDenoiser(denoiser_at(block), layout, self.recorder)

    def _decode(self, job: VideoJob, schedule: Schedule, prefix: Tensor | None, channel: MessageChannel) -> None:
        """Receive finished blocks from the last stage, decode and write them."""
        assert self.vae is not None and schedule.num_blocks is not None
        layout = self._layout(prefix)
        frame_shape = self.vae.latent_shape(self.config.video.height, self.config.video.width)
        last_stage = self.pipeline.stage_ranks[-1]
        blocks = range(schedule.prefix_blocks, schedule.num_blocks)
        channel.expect((last_stage, (1, layout.frames(block), *frame_shape), torch.float32) for block in blocks)

        def receive() -> Iterator[Tensor]:
            for block in blocks:
                with self.recorder("receive wait", block):
                    latents = channel.receive()
                yield latents

        self._write(job, schedule, prefix, receive())

    def _write(self, job: VideoJob, schedule: Schedule, prefix: Tensor | None, blocks: Iterator[Tensor]) -> None:
        """Decode blocks and write the video's files."""
        assert self.vae is not None
        total = self.config.video.num_output_frames
        interval = 0.5 if sys.stderr.isatty() else 15
        bar = tqdm(total=total, desc=job.files.stem[:40], unit="latent frame", mininterval=interval)
        output = VideoOutput.for_jobs(
            self.config,
            self.vae,
            [job],
            self.prefix_path,
            self.save_latents,
            span=lambda block: nullcontext() if block is None else self.recorder("decode", block),
        )
        with bar, output as self.output:
            try:
                if prefix is not None:
                    output.emit(prefix.to(self.device))
                    bar.update(prefix.shape[1])
                for block, latents in enumerate(blocks, start=schedule.prefix_blocks):
                    output.emit(latents, block)
                    bar.update(latents.shape[1])
                output.decoder.wait()
            except BaseException:  # usually because another rank died
                self._unfinished += output.keep_unfinished()
                self.output = None
                raise
        self.output = None

    def _schedule(self, prefix: Tensor | None) -> Schedule:
        rollout, video = self.config.rollout, self.config.video
        prefix_frames = 0 if prefix is None else prefix.shape[1]
        return build_schedule(rollout, video.num_output_frames, prefix_frames, bool(video.source))

    def _layout(self, prefix: Tensor | None) -> BlockLayout:
        prefix_frames = 0 if prefix is None else prefix.shape[1]
        return block_layout(self.config.rollout, self.config.video.num_output_frames, prefix_frames)
