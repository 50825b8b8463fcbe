"""Divides networks, gradients and batches among ranks: replicas with summed gradients, or FSDP2 shards."""

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
from model.weights import build_from_state
from utils.config import TrainConfig
from utils.config_checks import num_micro_batches
from utils.device import DTYPES
from utils.distributed import local_world_size, rank, world_size
from utils.process_group import sum_over_ranks

# ---- Networks ----


def shard_transformer(net: CausalWanModel, config: TrainConfig, device: torch.device) -> None:
    """Shard a DiT over the ranks by `train.sharding`, with computation in `train.dtype`; "replicate" changes nothing.

    The float32 weights are gathered layer by layer in `train.dtype`, and gradients are reduced in float32. FSDP2
    gathers weights only in `forward`, so other methods that use weights are registered.
    """
    if config.sharding == "replicate":
        return
    # FSDP2 warns because in-place changes of a layer's output would be lost. The model makes none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.dtype], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = device_mesh(config, device)
    for layer in net.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        for method in ("kv", "text_kv"):
            register_fsdp_forward_method(layer, method)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    for method in ("denoise_block", "write_block", "write_then_denoise", "encode_text"):
        register_fsdp_forward_method(net, method)


def shard_text_encoder(encoder: UMT5EncoderModel, config: TrainConfig, device: torch.device) -> None:
    """Shard a frozen text encoder over the ranks. Its weights keep their dtype and are gathered for each pass."""
    mesh = device_mesh(config, device)
    for block in encoder.requires_grad_(False).encoder.block:
        fully_shard(block, mesh=mesh)
    fully_shard(encoder, mesh=mesh, reshard_after_forward=True)


def device_mesh(config: TrainConfig, device: torch.device) -> DeviceMesh:
    """Return the mesh of `train.sharding`: all ranks (shard), or machines x ranks per machine (hybrid)."""
    if config.sharding == "shard":
        return init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    machines = world_size() // local_world_size()
    return init_device_mesh(device.type, (machines, local_world_size()), mesh_dim_names=("replicate", "shard"))


def reshard(net: nn.Module) -> None:
    """Free the gathered weights of a sharded network, so that its parameters are shards again.

    After a forward pass without a backward pass, the outermost parameters stay gathered, in the compute dtype.
    """
    if isinstance(net, FSDPModule):
        net.reshard()


def unsharded_copy(net: CausalWanModel, dtype: torch.dtype) -> CausalWanModel:
    """Return a full copy of a sharded DiT on each rank, in `dtype`. All ranks must call it at the same time.

    Each rank may then use its copy independently of the others.
    """
    state = {name: full_tensor(tensor.to(dtype)) for name, tensor in net.state_dict().items()}
    return build_from_state(lambda: CausalWanModel.from_config(net.config), state, "a copy", dtype).to(net.device)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor, gathered from the ranks if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- Gradients ----


def sync_gradients(net: nn.Module, enabled: bool) -> None:
    """Set whether the next backward passes of a sharded network reduce its gradients, or only accumulate them."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(enabled)


def loss_scale(net: nn.Module, num_micro_batches: int) -> float:
    """Return the factor for each micro-batch's loss, so that the accumulated gradient is that of the batch mean."""
    # FSDP2 averages gradients over the ranks, replicas sum them.
    return (world_size() if isinstance(net, FSDPModule) else 1) / num_micro_batches


def sum_gradients(net: nn.Module, metrics: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sum the gradients of replicas over the ranks, in place, and return the summed metrics.

    FSDP2 has already reduced the gradients of a sharded network, so only its metrics are summed.
    """
    values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=device)
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    sum_over_ranks([values, *(() if isinstance(net, FSDPModule) else gradients)])
    return dict(zip(metrics, values.tolist(), strict=True))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Clip the gradients to a total norm of `max_norm` (0: no limit) and return the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return full_tensor(norm).item()


# ---- Batches ----


def local_micro_batches(config: TrainConfig) -> range:
    """Return the indices of this rank's micro-batches in every batch.

    Raises:
        UserError: if the batch does not divide evenly.
    """
    share = num_micro_batches(config, world_size()) // world_size()
    return range(rank() * share, (rank() + 1) * share)
