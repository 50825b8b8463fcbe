"""How processes share networks, gradients and batches: copies that are summed, or FSDP2 shards."""

import math
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import UMT5EncoderModel

from model.causal_wan import CausalWanModel
from model.weights import build
from utils.config import TrainConfig, num_micro_batches
from utils.device import DTYPES
from utils.distributed import local_world_size, rank, world_size
from utils.process_group import sum_over_processes


def shard(net: CausalWanModel, config: TrainConfig, device: torch.device) -> None:
    """Share a DiT's weights out among the processes as `train.sharding` says, and have it compute in `train.dtype`.

    Weights keep their type: float32 masters are gathered, layer by layer, as `train.dtype`, and gradients are reduced
    in float32. Forward methods other than `forward` are registered, so that they gather weights as well.
    """
    if config.sharding == "replicate":
        return
    # Nobody changes what a layer returns in place, which is what it warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.dtype], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = device_mesh(config, device)
    for layer in net.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        for method in ("kv", "text_kv"):  # called from outside of `forward`
            register_fsdp_forward_method(layer, method)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(net, "encode_text")


def shard_text_encoder(encoder: UMT5EncoderModel, config: TrainConfig, device: torch.device) -> None:
    """Share a text encoder's weights out as a DiT's, to be gathered for each pass; all in the type that they have."""
    mesh = device_mesh(config, device)
    for block in encoder.requires_grad_(False).encoder.block:
        fully_shard(block, mesh=mesh)
    fully_shard(encoder, mesh=mesh, reshard_after_forward=True)


def device_mesh(config: TrainConfig, device: torch.device) -> DeviceMesh:
    """All processes in a row, or machines times the processes of each."""
    if config.sharding == "shard":
        return init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    machines = world_size() // local_world_size()
    return init_device_mesh(device.type, (machines, local_world_size()), mesh_dim_names=("replicate", "shard"))


def sync_gradients(net: nn.Module, wanted: bool) -> None:
    """Whether the coming backward passes of a sharded net end in a reduction; without it they only add up."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(wanted)


def settle(net: nn.Module) -> None:
    """Let a sharded net's parameters be its shards again: after a forward without a backward its outermost are whole,
    and in the type that it computes in."""
    if isinstance(net, FSDPModule):
        net.reshard()


def loss_scale(net: nn.Module, num_micro_batches: int) -> float:
    """What a part's loss is multiplied by, so that the gradient of all parts together is that of their mean."""
    # FSDP2 averages over processes what we want summed.
    return (world_size() if isinstance(net, FSDPModule) else 1) / num_micro_batches


def sum_gradients(net: nn.Module, metrics: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sum the gradients of copies over the processes, and metrics of either kind of net; returns the latter."""
    values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=device)
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    sum_over_processes([values, *(() if isinstance(net, FSDPModule) else gradients)])
    return dict(zip(metrics, values.tolist(), strict=True))


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> float:
    """Scale gradients down to a norm of `largest` (0: any) over all processes; returns the norm that they had."""
    norm = nn.utils.clip_grad_norm_(parameters, largest or math.inf)
    return whole(norm).item()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, whichever part of it this process holds."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_copy(net: CausalWanModel, dtype: torch.dtype) -> CausalWanModel:
    """A sharded net's copy that is no common work: all processes make it at once, and each does with it what it likes.

    It takes the memory of the whole net in `dtype`.
    """
    state = {name: whole(tensor.to(dtype)) for name, tensor in net.state_dict().items()}
    return build(lambda: CausalWanModel.from_config(net.config), state, "a copy", dtype).to(net.device)


def local_micro_batches(config: TrainConfig) -> range:
    """Which parts of every iteration's batch this process computes."""
    share = num_micro_batches(config, world_size()) // world_size()
    return range(rank() * share, (rank() + 1) * share)
