"""Time one Denoise of a full-size network with random weights beside a full window, by inference's own executor.

python scripts/measure_block.py --preset wan-1.3b --height 480 --width 832 --window 21 --dtype bfloat16 --device cpu

Needs no weights. Prints the size of the network and of one lane, seconds per pass and peak memory.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model.causal_wan import CausalWanModel
from model.denoiser import Denoiser
from model.kv_cache import KVCache
from model.presets import TRANSFORMERS, random_transformer
from pipeline.rollout import BlockLayout, Rollout
from pipeline.schedule import Denoise, WriteContext
from pipeline.text_to_video import VAE_STRIDE
from utils.device import DTYPES, pick_device
from utils.errors import UserError, command
from utils.rng import keyed_noise

BLOCK = 3  # frames


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(TRANSFORMERS), default="wan-1.3b")
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--width", type=int, default=832, help="pixels")
    parser.add_argument("--window", type=int, default=21, help="latent frames, the current block included")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--context", action="store_true", help="also time the block's context pass")
    parser.add_argument("--repeat", type=int, default=1, help="passes; the fastest counts")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.height % 16 or args.width % 16 or args.window <= BLOCK or args.repeat < 1:
        raise UserError("height and width must be multiples of 16, --window more than 3, --repeat at least 1")
    device = pick_device(args.device)
    net = random_transformer(CausalWanModel, TRANSFORMERS[args.preset], DTYPES[args.dtype], device)
    height, width = args.height // VAE_STRIDE, args.width // VAE_STRIDE
    lane = full_lane(net, height, width, args.window - BLOCK)
    print(f"{args.preset}: {sum(p.numel() for p in net.parameters()) / 1e9:.2f}e9 parameters in {args.dtype}")
    print(f"lane of {lane.context_frames} frames and a block: {lane.num_bytes / 1e9:.2f} GB")

    block = (args.window - BLOCK) // BLOCK
    with torch.no_grad():
        text = net.encode_text(torch.randn(1, 512, net.config.text_dim, device=device))
    rollout = Rollout(
        Denoiser(net, text),
        sigmas=[1.0, 0.0],
        noise=lambda block, step: keyed_noise(0, 0, block, step, (1, BLOCK, 16, height, width)).to(device),
        new_lane=lambda: lane,
        layout=BlockLayout(BLOCK),
    )
    ops: list[Denoise | WriteContext] = [Denoise(block, 0, 0) for _ in range(args.repeat)]
    times = []
    for op in ops:
        rollout.blocks.clear()
        times.append(timed(lambda op=op: list(rollout.run(iter([op]), [0])), device))
    print(f"denoise pass: {min(times):.2f} s")
    if args.context:
        print(f"context pass: {timed(lambda: rollout.execute(WriteContext(block, 1, 0)), device):.2f} s")
    print(f"peak memory: {peak_bytes(device) / 1e9:.2f} GB")


def full_lane(net: CausalWanModel, height: int, width: int, context_frames: int) -> KVCache:
    """A lane whose window is full of random keys and values."""
    lane = net.new_cache(1, height, width, context_frames, BLOCK)
    tokens = context_frames * lane.tokens_per_frame
    heads, head_dim = net.config.num_attention_heads, net.config.attention_head_dim
    for layer in range(len(net.blocks)):
        k, v = (torch.randn(1, tokens, heads, head_dim, device=net.device, dtype=net.dtype) for _ in range(2))
        lane.append(layer, k, v)
    lane.commit(context_frames)
    return lane


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work()` takes, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: of the process on a CPU, of torch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
