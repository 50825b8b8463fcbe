"""Run pipelines: start all ranks, distribute the missing videos, collect profiles, and end cleanly after failures."""

import json
import os
import sys
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.build import build_schedule, num_pixel_frames
from pipeline.build_track import build_lag
from pipeline.generate import RunSummary, check_request, missing_videos
from pipeline.output import VideoFiles, VideoJob
from pipeline.parallel.peers import PeerMonitor, connect_store
from pipeline.parallel.profile import RankProfile, Recorder
from pipeline.parallel.rank import PipelineRank
from pipeline.parallel.stages import Pipeline, describe_assignment, plan_pipelines
from pipeline.parallel.transport import GROUP_TIMEOUT
from pipeline.parallel.work import decode_passes
from pipeline.schedule import Schedule
from pipeline.source import fit_to_source
from utils.config import Config
from utils.config_loading import override_config
from utils.device import pick_own_device
from utils.distributed import rank, world_size
from utils.errors import UserError
from utils.files import output_file
from utils.process_group import die_with_launcher
from utils.prompts import Prompt


@dataclass(frozen=True)
class PipelineRequest:
    """Videos to make, and options. All ranks pass the same request."""

    config: Config
    folder: str
    items: Sequence[tuple[Prompt, int, str]]
    """Prompt, sample and file stem of every video."""
    prefix_path: str = ""
    """Path of the image, clip or latents that every video starts with; empty for none."""
    save_latents: bool = False
    overwrite: bool = False
    send_after_write: bool = False
    """Send blocks only after their context write: slower, for comparison."""
    profile_prefix: str = ""
    """Path prefix of profile files; empty for no profile."""


def check_pipeline_keys(config: Config) -> None:
    """Check the keys that a pipeline of ranks cannot honour.

    Raises:
        UserError: if a video needs guidance or several rollouts.
    """
    if config.rollout.num_rollouts > 1:
        raise UserError("ranks of a pipeline make one rollout per video: use inference.py for rollout.num_rollouts")
    if config.rollout.guidance_scale != 1:
        raise UserError(
            "ranks of a pipeline run without guidance: set rollout.guidance_scale=1, or use inference.py, where the "
            "ranks share the videos"
        )


def plan_ranks(config: Config, has_prefix: bool) -> tuple[list[Pipeline], Schedule]:
    """Return the pipelines of all ranks of this run, and the schedule that they share.

    Raises:
        UserError: if the video does not consist of whole blocks, or as in `check_pipeline_keys`.
    """
    check_pipeline_keys(config)
    # The assignment depends on the steps only. The prefix is not read yet, so use any length that has all caches.
    frames, rollout = config.video.num_output_frames, config.rollout
    if has_prefix:
        frames = rollout.independent_first_frame + (rollout.leading_blocks + 1) * rollout.block_frames
    schedule = build_schedule(rollout, frames, short_last_block=bool(config.video.source))
    return plan_pipelines(world_size(), schedule, decode_passes(config)), schedule


def describe_plan(config: Config, has_prefix: bool) -> str:
    """Return the roles of each rank, and the lag of a live video on one device, as lines of text."""
    pipelines, schedule = plan_ranks(config, has_prefix)
    lines = describe_assignment(pipelines, schedule)
    if config.rollout.schedule != "bidirectional":
        lines += f"\nlive video on one device: {build_lag(config, schedule)}"
    return lines


def run_pipelines(request: PipelineRequest) -> tuple[RunSummary, list[RankProfile]]:
    """Make the missing videos of a request; call this on all ranks.

    If a rank fails or dies, all ranks exit and one of them prints the reason.

    Returns:
        The summary of the run, and on rank 0 of a run with `profile_prefix` the profiles of all ranks.

    Raises:
        UserError: for a request that cannot be fulfilled, before any weights are loaded.
    """
    config = fit_to_source(request.config)
    if config.rollout.order == "batched":  # ranks run ops one by one, in diagonal order; the metadata says so
        config = override_config(config, ["rollout.order=diagonal"])
    request = replace(request, config=config)
    has_prefix = bool(request.prefix_path or any(prompt.image for prompt, _, _ in request.items))
    pipelines, schedule = plan_ranks(request.config, has_prefix)
    if len(pipelines) > len(request.items):
        most = len(pipelines[0].ranks) * len(request.items)
        raise UserError(
            f"{world_size()} processes form {len(pipelines)} pipelines, but there are only {len(request.items)} "
            f"videos: start at most {most} processes"
        )
    for path in dict.fromkeys(prompt.image or request.prefix_path for prompt, _, _ in request.items):
        check_request(request.config, path, request.items[0][0].track)
    if request.profile_prefix:
        check_profile_files(request)
    missing = _missing_stems(request) if rank() == 0 else []
    if world_size() > 1:
        die_with_launcher()
    roles = {r: p.roles(r, schedule) for p in pipelines for r in p.ranks}
    worker: PipelineRank | None = None
    store, monitor = _join(roles, on_failure=lambda: "" if worker is None else worker.keep_unfinished())
    profiles: list[RankProfile] = []
    started = time.perf_counter()
    try:
        if jobs := _share_jobs(request, missing, store):
            runtime = request.config.runtime
            device = pick_own_device(runtime.device, runtime.threads)  # after joining, so that all ranks see a failure
            _init_process_group(store, device)
            recorder = Recorder(device, enabled=bool(request.profile_prefix))
            options = request.prefix_path, request.save_latents, request.send_after_write
            worker = PipelineRank(request.config, pipelines, rank(), store, device, *options, recorder)
            dist.barrier()
            recorder.restart()
            started = time.perf_counter()
            worker.make_videos(jobs)
            if recorder.enabled:
                profiles = _collect_profiles(request.profile_prefix, roles, recorder, store)
        monitor.finish()
        seconds = time.perf_counter() - started
    except UserError as error:
        monitor.fail(str(error))
    except BaseException as error:
        monitor.fail_after(error)
    if dist.is_initialized():
        dist.destroy_process_group()
    return _summary(request, len(jobs), seconds), profiles


def _summary(request: PipelineRequest, written: int, seconds: float) -> RunSummary:
    pixel_frames = written * num_pixel_frames(request.config.video.num_output_frames)
    return RunSummary(written, len(request.items) - written, request.folder, seconds, pixel_frames)


def check_profile_files(request: PipelineRequest) -> None:
    """Check that the profile overwrites no file of a video, and that its files can be written.

    Raises:
        UserError: naming the file.
    """
    videos = {Path(request.folder, f"{stem}.mp4").resolve() for _, _, stem in request.items}
    plot = Path(f"{request.profile_prefix}.png")
    profiles = [profile_file(request.profile_prefix, r) for r in range(world_size())]
    for file in map(output_file, [plot, *profiles]):
        video = file.with_suffix(".mp4").resolve()
        if video in videos or video.exists():
            raise UserError(f"--profile_output would replace {file}, a file of {video.name}; choose another prefix")


def profile_file(prefix: str, number: int) -> Path:
    """Return the path of the profile of a rank."""
    return Path(f"{prefix}_rank{number}.json")


def _missing_stems(request: PipelineRequest) -> list[str]:
    jobs = missing_videos(
        request.config, request.items, request.folder, request.prefix_path, request.save_latents, request.overwrite
    )
    return [job.files.stem for job in jobs]


def _join(roles: dict[int, str], on_failure: Callable[[], str]) -> tuple[dist.Store, PeerMonitor]:
    """Connect to the store and wait for all ranks; exit with one line if some of them do not start."""
    try:
        store = connect_store(rank(), world_size()) if world_size() > 1 else dist.HashStore()
        monitor = PeerMonitor(store, rank(), roles, on_failure)
        monitor.start()
    except TimeoutError as error:
        sys.exit(f"error: {error}; start all {world_size()} processes")
    return store, monitor


def _share_jobs(request: PipelineRequest, missing: list[str], store: dist.Store) -> list[VideoJob]:
    """Return the jobs whose file stems rank 0 lists in `missing`."""
    if rank() == 0:
        store.set("missing", json.dumps(missing))
    while not store.check(["missing"]):
        time.sleep(0.05)
    stems, folder = set(json.loads(store.get("missing"))), Path(request.folder)
    return [
        VideoJob(prompt, sample, VideoFiles(folder, stem)) for prompt, sample, stem in request.items if stem in stems
    ]


def _init_process_group(store: dist.Store, device: torch.device) -> None:
    # A copy of the store has its own connection. Groups block their connection while they wait for other ranks, so the
    # monitor needs another one to detect dead ranks meanwhile.
    group_store = dist.PrefixStore("group", store.clone())  # type: ignore[attr-defined]
    # NCCL warns that the messages of a group run in order. `handoff_groups` avoids the delays of that order.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    on_gpu = device.type == "cuda"
    use_one_nccl_channel(os.environ)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=group_store,
        rank=rank(),
        world_size=world_size(),
        timeout=GROUP_TIMEOUT,
        device_id=device if on_gpu else None,
    )


def use_one_nccl_channel(environment: MutableMapping[str, str]) -> None:
    """Limit NCCL to one channel, unless the user has set a number of channels.

    Each channel of a message occupies a multiprocessor of the GPU, which then denoises more slowly. A block is about
    1 MB, and one channel moves it in less than 0.1 ms.
    """
    if not any(name.startswith("NCCL_") and name.endswith(("NCHANNELS", "CTAS")) for name in environment):
        environment.update(NCCL_MIN_NCHANNELS="1", NCCL_MAX_NCHANNELS="1", NCCL_MAX_P2P_NCHANNELS="1")


def _collect_profiles(prefix: str, roles: dict[int, str], recorder: Recorder, store: dist.Store) -> list[RankProfile]:
    """Write this rank's profile to PREFIX_rankN.json; on rank 0, return the profiles of all ranks."""
    own = RankProfile(rank(), roles[rank()], recorder.spans())
    own.save(profile_file(prefix, rank()))
    store.set(f"profile/{rank()}", own.to_json())
    if rank() > 0:
        return []
    keys = [f"profile/{other}" for other in sorted(roles)]
    while not store.check(keys):
        time.sleep(0.05)
    return [RankProfile.from_json(store.get(key).decode()) for key in keys]
