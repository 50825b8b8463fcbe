"""LoRA weights, fused into a transformer."""

from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from safetensors import SafetensorError
from safetensors.torch import load_file

from model.causal_wan import CausalWanModel
from utils.errors import UserError


def fuse_lora(net: CausalWanModel, path: str, scale: float = 1.0) -> None:
    """Add scale times the low-rank updates in a safetensors file to the weights of `net`.

    The file may have diffusers' names (`transformer.blocks.0.attn1.to_q.lora_A.weight`, with or without the prefix) or
    Wan's (`diffusion_model.blocks.0.self_attn.q.lora_A.weight`, `lora_down`, `lora_unet_...`).

    Raises:
        UserError: if the file is missing or broken, or does not fit the network.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read LoRA weights {path} ({error}); give a .safetensors file") from None
    foreign = any(name.startswith(("diffusion_model.", "lora_unet_")) or ".self_attn." in name for name in state)
    try:
        if foreign:
            state = _convert_non_diffusers_wan_lora_to_diffusers(state)
        state = {f"transformer.{name.removeprefix('transformer.')}": value for name, value in state.items()}
        layers = {name.removeprefix("transformer.").partition(".lora_")[0] for name in state}
        unknown = sorted(layers - dict(net.named_modules()).keys())
        if unknown:
            raise ValueError(f"the generator has no layer {unknown[0]} ({len(unknown)} of {len(layers)} are unknown)")
        net.load_lora_adapter(state, prefix="transformer", adapter_name="fused")
        net.fuse_lora(lora_scale=scale, adapter_names=["fused"])
        net.unload_lora()
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"LoRA {path} does not fit the generator: {str(error).splitlines()[0]}") from None
