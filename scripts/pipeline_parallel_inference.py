"""Make videos with a pipeline of processes, whose steps work on different blocks at the same time.

torchrun --nproc_per_node=4 scripts/pipeline_parallel_inference.py --config_path configs/hiar.yaml \\
    --checkpoint_path ckpts/hiar.pt --prompt "a cat on a skateboard" --output_path outputs/ --num_output_frames 81

Any number of processes will do, and the videos are the same: --plan prints who would do what. Videos that exist are
skipped, so the same command goes on where it stopped. How it works: docs/pipeline.md.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command_line import check_arguments, resolve_config, shared_arguments, work_items
from utils.config import Config, read_metadata
from utils.distributed import rank, world_size
from utils.errors import UserError, command
from utils.prompts import Prompt

if TYPE_CHECKING:
    from torch.distributed import Store

    from pipeline.parallel.profile import Recorder
    from pipeline.parallel.stages import Pipeline


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[shared_arguments()]
    )
    parser.add_argument("--prompt", help="one prompt, instead of a file of them")
    parser.add_argument("--output_path", help="folder of the videos; or FILE.mp4, for one")
    parser.add_argument("--noise_seed", help="default: --seed")
    parser.add_argument("--no_dac", action="store_true", help="send blocks only after their context write: slower")
    parser.add_argument("--profile", action="store_true", help="measure every op of every rank")
    parser.add_argument("--profile_output", default="profile", metavar="PREFIX", help="of the profile's files")
    parser.add_argument("--plan", action="store_true", help="print who does what, and exit")
    args = parser.parse_intermixed_args()
    check_arguments(args)
    if args.prompt is not None and (args.data_path or not args.prompt.strip()):
        raise UserError("give --prompt TEXT or --data_path FILE")
    args.seed = args.noise_seed or args.seed
    return args


def outputs(args: argparse.Namespace, record: dict | None) -> tuple[str, list[tuple[Prompt, int, str]]]:
    """Folder, and (prompt, sample, file stem) of every video."""
    if args.prompt is not None:
        record = {"prompt": args.prompt.strip(), "name": args.prompt.strip(), "sample": 0}
        items = [item for n in range(args.num_samples) for item in work_items(args, record | {"sample": n})]
    else:
        items = work_items(args, record)
    if not args.output_path:
        raise UserError("say where videos go: --output_path FOLDER, or FILE.mp4")
    path = Path(args.output_path)
    if path.suffix != ".mp4":
        return str(path), items
    if len(items) > 1:
        raise UserError(f"--output_path {path} is one file, but there are {len(items)} videos; name a folder")
    prompt, sample, _ = items[0]
    return str(path.parent), [(prompt, sample, path.stem)]


@command
def main() -> None:
    try:
        args = parse_arguments()
        config = resolve_config(args)
        if args.dry_run:
            print(config.to_yaml() if rank() == 0 else "", end="")
            return
        run(args, config)
    except UserError:
        if rank() == 0:  # all ranks have been told the same
            raise
        sys.exit(2)


def run(args: argparse.Namespace, config: Config) -> None:
    """Everything after the configuration is known to be good."""
    from pipeline.build import build_schedule
    from pipeline.parallel.stages import describe, plan_pipelines

    record = read_metadata(args.config_path)
    condition = args.image or args.video or (record or {}).get("condition") or ""
    # Given frames do not change who does what.
    frames = config.video.num_output_frames
    schedule = build_schedule(config.rollout, frames if not condition else config.rollout.block_frames)
    pipelines = plan_pipelines(world_size(), schedule)
    if args.plan:
        print(describe(pipelines, schedule) + "\n" if rank() == 0 else "", end="")
        return
    folder, items = outputs(args, record)
    if len(pipelines) > len(items):
        largest = len(pipelines[0].ranks) * len(items)
        raise UserError(
            f"{world_size()} processes are {len(pipelines)} pipelines, but there is work for {len(items)}: start at "
            f"most {largest}, or ask for more videos"
        )
    from pipeline.generate import check_request, missing_videos

    check_request(config, condition)
    duties = {r: p.duties(r, schedule) for p in pipelines for r in p.ranks}
    todo = missing_videos(config, items, folder, condition, args.save_latents, args.overwrite) if rank() == 0 else []
    missing = [item.files.stem for item in todo]
    run_together(Request(args, config, condition, pipelines, duties, folder, items), missing)


@dataclass(frozen=True)
class Request:
    """What is to be made, and by whom; the same on all ranks."""

    args: argparse.Namespace
    config: Config
    condition: str
    pipelines: "list[Pipeline]"
    duties: dict[int, str]  # of every rank, in words
    folder: str
    items: list[tuple[Prompt, int, str]]  # prompt, sample and file stem of every video


def run_together(request: Request, missing: list[str]) -> None:
    """Join the other ranks and make the videos whose stems are `missing`, which rank 0 knows."""
    import torch.distributed as dist

    from pipeline.generate import Files, VideoJob
    from pipeline.parallel.peers import Peers, connect
    from pipeline.parallel.profile import Recorder
    from pipeline.parallel.runner import PipelineRank
    from pipeline.parallel.transport import PATIENCE
    from utils.device import pick_own_device
    from utils.process_group import die_with_launcher

    args, config = request.args, request.config
    if world_size() > 1:
        die_with_launcher()
    stage: PipelineRank | None = None
    try:
        store = connect(rank(), world_size()) if world_size() > 1 else dist.HashStore()
        peers = Peers(store, rank(), request.duties, at_end=lambda: stage.kept() if stage is not None else "")
        peers.gather()
    except TimeoutError as error:
        sys.exit(f"error: {error}; start all {world_size()} processes")
    try:
        if rank() == 0:
            store.set("missing", json.dumps(missing))
        while not store.check(["missing"]):
            time.sleep(0.05)
        wanted = json.loads(store.get("missing"))
        folder = Path(request.folder)
        videos = [VideoJob(p, sample, Files(folder, stem)) for p, sample, stem in request.items if stem in wanted]
        if videos:
            device = pick_own_device(config.runtime.device)  # now that whoever has none can tell the others
            # NCCL's warning that a group's messages are done in one order: `edge_groups` sees to it.
            os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", store),
                rank=rank(),
                world_size=world_size(),
                timeout=PATIENCE,
                device_id=device if device.type == "cuda" else None,
            )
            recorder = Recorder(device, enabled=args.profile)
            stage = PipelineRank(
                config,
                request.pipelines,
                rank(),
                store,
                device,
                request.condition,
                args.save_latents,
                args.no_dac,
                recorder,
            )
            dist.barrier()
            recorder.restart()
            stage.make_videos(videos)
            if args.profile:
                report(request, recorder, store)
        peers.leave()
    except UserError as error:
        peers.fail(str(error))
    except BaseException as error:
        peers.blame(error)
    if dist.is_initialized():
        dist.destroy_process_group()


def report(request: Request, recorder: "Recorder", store: "Store") -> None:
    """Write this rank's profile; rank 0 sums all of them up and draws them."""
    from evaluation.plots import save_timeline_plot
    from pipeline.parallel.profile import Span, summary, write_profile

    prefix, spans = Path(request.args.profile_output), recorder.spans()
    prefix.parent.mkdir(parents=True, exist_ok=True)
    write_profile(Path(f"{prefix}_rank{rank()}.json"), rank(), request.duties[rank()], spans)
    store.set(f"profile/{rank()}", json.dumps([[s.name, s.block, s.start, s.end] for s in spans]))
    if rank() > 0:
        return
    profiles = []
    for other, duties in request.duties.items():
        while not store.check([f"profile/{other}"]):
            time.sleep(0.05)
        profiles.append((other, duties, [Span(*values) for values in json.loads(store.get(f"profile/{other}"))]))
    print(summary(profiles))
    rows = [(f"rank {r}: {duties}", [(s.name, s.start, s.end) for s in own]) for r, duties, own in profiles]
    save_timeline_plot(Path(f"{prefix}.png"), rows)
    print(f"wrote {prefix}.png and {prefix}_rank*.json")


if __name__ == "__main__":
    main()
