"""Videos made by several ranks at once: each runs its stage of the one schedule through the one executor.

A rank loads only what its duties need. The rank that encodes text decides which video comes next and sends its
embedding to the stages; blocks go from stage to stage as soon as they are re-noised; the last stage hands finished
blocks to the decoder, which writes frames while later blocks are still being denoised.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from model.causal_wan import CausalWanModel
from pipeline.build import (
    build_rollout,
    build_schedule,
    latent_size,
    load_network,
    load_text_encoder,
    load_vae,
)
from pipeline.generate import VideoJob, VideoOutput, read_condition
from pipeline.parallel.profile import RecordedDenoiser, Recorder
from pipeline.parallel.stages import Pipeline
from pipeline.parallel.transport import Mail, Neighbours, edge_groups
from pipeline.rollout import BlockLayout, Rollout
from pipeline.schedule import Op, Schedule, for_stage
from pipeline.text_to_video import PromptEmbeddings
from utils.config import Config
from utils.device import DTYPES


class PipelineRank:
    """One rank of a pipeline, with the networks of its duties."""

    def __init__(
        self,
        config: Config,
        pipelines: Sequence[Pipeline],
        rank: int,
        store: dist.Store,
        device: torch.device,
        condition: str = "",
        save_latents: bool = False,
        late: bool = False,
        record: Recorder | None = None,
    ):
        """All ranks of the default process group have to make theirs at the same time.

        Args:
            store: shared by all ranks; for what is not worth a message.
            late: send blocks only after their context has been written.
            record: where op times go.

        Raises:
            UserError: for missing or broken files.
        """
        self.config, self.rank, self.store, self.device = config, rank, store, device
        self.condition, self.save_latents, self.late = condition, save_latents, late
        self.record = record or Recorder(device, enabled=False)
        self.number = next(i for i, p in enumerate(pipelines) if rank in p.ranks)
        self.pipeline = pipelines[self.number]
        self.only_one = len(pipelines) == 1
        self.caches = self.pipeline.caches(rank)
        self.output: VideoOutput | None = None
        self._kept: list[Path] = []
        self.edges = edge_groups()
        self.net = load_network(config, device) if self.caches else None
        self.vae = load_vae(config, device) if rank == self.pipeline.decoder else None
        self.embeddings = None
        if rank == self.pipeline.text:
            # Offloaded for the sake of this rank's other networks, if there are any.
            offload = config.model.offload and not (self.net is None and self.vae is None)
            text_encoder = load_text_encoder(config, device)
            self.embeddings = PromptEmbeddings(text_encoder, config.model.text_length, device, offload)

    def make_videos(self, videos: Sequence[VideoJob]) -> None:
        """Do this rank's part of all videos that its pipeline makes."""
        prefix = self._share_condition()
        schedule = build_schedule(
            self.config.rollout, self.config.video.num_output_frames, 0 if prefix is None else prefix.shape[1]
        )
        if self.embeddings is not None and self.embeddings.offload:
            with self.record("text"):  # of all videos: whose turn comes here is not known yet
                self.embeddings.encode([video.prompt.text for video in videos])
        texts, blocks = Mail(self.device), Mail(self.device, self.edges)
        for video in self._turns(videos):
            text = self._share_text(video, texts)
            if self.net is not None and text is not None:
                self._run_stage(video, self.net, text, schedule, prefix, blocks)
            elif self.vae is not None:
                self._decode(video, schedule, prefix, blocks)
        texts.finish()
        blocks.finish()

    def kept(self) -> str:
        """For a run that fails: end the video under way where it is; says where that is."""
        if self.output is not None:
            self._kept += self.output.keep_unfinished()
        return "".join(f"the frames so far are in {path}" for path in self._kept)

    # ---- What comes before blocks ----

    def _turns(self, videos: Sequence[VideoJob]) -> Iterator[VideoJob]:
        """The videos that this pipeline makes, in its order: whichever pipeline is free takes the next."""
        for turn in range(len(videos) + 1):
            key = f"pipeline {self.number} turn {turn}"
            if self.rank == self.pipeline.text:
                chosen = turn if self.only_one else self.store.add("taken", 1) - 1
                self.store.set(key, str(chosen))
            else:
                while not self.store.check([key]):  # a wait would keep this process's other threads from the store
                    time.sleep(0.005)
                chosen = int(self.store.get(key))
            if chosen >= len(videos):
                return
            yield videos[chosen]

    def _share_condition(self) -> Tensor | None:
        """The latents that videos start with, encoded by the decoder's rank."""
        if not self.condition:
            return None
        key, ranks = f"pipeline {self.number} condition", [rank for rank, _ in self.pipeline.stages]
        if self.vae is not None:
            prefix = read_condition(self.condition, self.config, self.vae).to(self.device)
            self.store.set(key, json.dumps(list(prefix.shape)))
            for rank in ranks:
                if rank != self.rank:
                    dist.send(prefix, rank)
            return prefix
        while not self.store.check([key]):
            time.sleep(0.01)
        prefix = torch.empty(json.loads(self.store.get(key)), device=self.device)
        if self.rank in ranks:
            dist.recv(prefix, self.pipeline.decoder)
        return prefix

    def _share_text(self, video: VideoJob, mail: Mail) -> Tensor | None:
        """The prompt's embedding [1, L, text_dim], from the rank that encodes; None for ranks without a use for it."""
        stages = [rank for rank, _ in self.pipeline.stages]
        if self.embeddings is not None:
            with self.record("text"):
                embedding = self.embeddings.of([video.prompt.text]).to(self.device)
            for rank in stages:
                if rank != self.rank:
                    mail.send(embedding, rank)
            return embedding if self.rank in stages else None
        if self.net is None:
            return None
        shape = (1, self.config.model.text_length, self.net.config.text_dim)
        mail.expect([(self.pipeline.text, shape, DTYPES[self.config.model.dtype])])
        return mail.receive()

    # ---- Blocks ----

    def _run_stage(
        self, video: VideoJob, net: CausalWanModel, text: Tensor, schedule: Schedule, prefix: Tensor | None, mail: Mail
    ) -> None:
        """This rank's ops of a video; on the last stage its blocks go to the decoder, or are decoded here."""
        config = self.config
        layout = BlockLayout(config.rollout.block_frames, 0 if prefix is None else prefix.shape[1])
        height, width = latent_size(config.video)
        frame = (net.config.in_channels, height, width)
        before, after = self.pipeline.neighbours(self.rank)
        is_last = self.caches[-1] == schedule.caches[-1]
        transport = Neighbours(
            schedule, self.caches, layout, frame, before, None if is_last else after, mail, self.record, self.late
        )

        def observe(op: Op) -> None:
            transport.after_op(op)

        with torch.no_grad():
            encoded = net.encode_text(text)
        rollout = build_rollout(config, net, encoded, [video.sample], prefix, transport, observe)
        self._profile(rollout)
        ops = for_stage(schedule.ops("diagonal", config.rollout.fuse_context), self.caches)
        blocks = rollout.run(list(ops), self.caches)
        if self.vae is not None:
            self._write(video, schedule, prefix, (latents for _, latents in blocks))
            return
        for _, latents in blocks:
            assert after is not None
            mail.send(latents, after)
        transport.finish()

    def _profile(self, rollout: Rollout) -> None:
        if not self.record.enabled:
            return
        noise = rollout.noise

        def recorded_noise(block: int, step: int) -> Tensor:
            with self.record("add-noise", block):
                return noise(block, step)

        rollout.noise = recorded_noise
        rollout.denoiser = RecordedDenoiser(rollout.denoiser, rollout.layout, self.record)

    def _decode(self, video: VideoJob, schedule: Schedule, prefix: Tensor | None, mail: Mail) -> None:
        """Decode the blocks that come from the last stage."""
        assert self.vae is not None and schedule.num_blocks is not None
        layout = BlockLayout(self.config.rollout.block_frames, 0 if prefix is None else prefix.shape[1])
        frame = self.vae.latent_shape(self.config.video.height, self.config.video.width)
        last_stage = self.pipeline.stages[-1][0]
        blocks = range(schedule.prefix_blocks, schedule.num_blocks)
        mail.expect((last_stage, (1, layout.frames(block), *frame), torch.float32) for block in blocks)

        def receive() -> Iterator[Tensor]:
            for block in blocks:
                with self.record("receive wait", block):
                    latents = mail.receive()
                yield latents

        self._write(video, schedule, prefix, receive())

    def _write(self, video: VideoJob, schedule: Schedule, prefix: Tensor | None, blocks: Iterator[Tensor]) -> None:
        assert self.vae is not None
        total = self.config.video.num_output_frames
        interval = 0.5 if sys.stderr.isatty() else 15
        bar = tqdm(total=total, desc=video.files.stem[:40], unit="latent frame", mininterval=interval)
        with bar, VideoOutput(self.config, self.vae, [video], self.condition, self.save_latents) as self.output:
            try:
                if prefix is not None:
                    self.output.emit(prefix)
                    bar.update(prefix.shape[1])
                for block, latents in enumerate(blocks, start=schedule.prefix_blocks):
                    with self.record("decode", block):
                        self.output.emit(latents)
                    bar.update(latents.shape[1])
            except BaseException:  # another rank's end, as a rule
                self._kept += self.output.keep_unfinished()
                self.output = None
                raise
        self.output = None
