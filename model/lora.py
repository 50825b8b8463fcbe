"""LoRA weights: read from the files of all public layouts, and fused into a transformer."""

from pathlib import Path

from diffusers.loaders import WanLoraLoaderMixin

from model.causal_wan import CausalWanModel
from model.weight_checks import check_weights
from model.weight_files import read_lora
from model.weight_names import State
from utils.errors import UserError


def fuse_lora(net: CausalWanModel, path: str, scale: float = 1.0) -> None:
    """Add `scale` times the low-rank updates in a file to the weights of `net`; `read_adapter` names the layouts.

    Raises:
        UserError: if the file is missing or broken, holds NaN, or does not fit the network.
    """
    state = read_adapter(net, path)
    try:
        net.load_lora_adapter(state, prefix="transformer", adapter_name="fused")
        net.fuse_lora(lora_scale=scale, adapter_names=["fused"])
        net.unload_lora()
    except (ValueError, KeyError, RuntimeError) as error:
        raise _misfit(path, error) from None


def read_adapter(net: CausalWanModel, path: str) -> State:
    """Read the low-rank factors in a safetensors or torch file, as `transformer.LAYER.lora_A.weight` and `lora_B`.

    In the file, layers may have diffusers' names (`transformer.blocks.0.attn1.to_q.lora_A.weight`) or Wan's
    (`diffusion_model.blocks.0.self_attn.q.lora_A.weight`), both with or without the prefix. Wan's names may also be
    `...lora_down...` and `lora_unet_...`. A torch file of LongLive holds them under the key `generator_lora`.

    Args:
        net: the network that must have the layers.

    Raises:
        UserError: if the file is missing or broken, holds NaN, or names layers that the network lacks.
    """
    state = read_lora(Path(path))
    check_weights({name: value for name, value in state.items() if not name.endswith(".alpha")}, path)
    if any(name.startswith("blocks.") and ".self_attn." in name for name in state):
        state = {f"diffusion_model.{name}": value for name, value in state.items()}
    try:
        state = WanLoraLoaderMixin.lora_state_dict(state)  # to diffusers' names
    except (ValueError, KeyError, RuntimeError) as error:
        raise _misfit(path, error) from None
    state = {f"transformer.{name.removeprefix('transformer.')}": value for name, value in state.items()}
    layers = {name.removeprefix("transformer.").partition(".lora_")[0] for name in state}
    if unknown := sorted(layers - dict(net.named_modules()).keys()):
        cause = f"the generator has no layer {unknown[0]} ({len(unknown)} of {len(layers)} are unknown)"
        raise _misfit(path, cause)
    return state


def _misfit(path: str, error: object) -> UserError:
    return UserError(f"LoRA {path} does not fit the generator: {str(error).splitlines()[0]}")
