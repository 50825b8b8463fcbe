"""HiAR as a pipeline of diffusers: the components and conventions of `WanPipeline`, the generation of `TextToVideo`.

    pipe = HiARPipeline.from_pretrained("data/shapes-wan", transformer="data/shapes-wan/hiar", settings=SETTINGS)
    frames = pipe("a red circle moving right fast on a blue background", num_frames=33).frames[0]

docs/api.md describes the arguments and lists the differences to `WanPipeline`.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from model.causal_wan import CausalWanModel
from model.embeddings import EmbeddingCache
from model.lora import read_adapter
from model.text_encoder import TextEncoder
from model.vae import WanVAE
from model.weight_checks import is_finite
from model.weights import ModelDirectory, align_weights_, build_from_state
from pipeline.build import check_size, rollout_sigmas
from pipeline.decoding import frame_range, not_finite
from pipeline.diffusers_arguments import (
    Frames,
    apply_settings,
    check_choices,
    check_length,
    check_prompts,
    latent_frames,
    lora_scale,
    read_prefixes,
    sample_numbers,
    settings_of,
    step_settings,
)
from pipeline.rollout import Rollout
from pipeline.schedule import Denoise, DenoiseAndWrite, Op, WriteThenDenoise
from pipeline.text_to_video import TextToVideo, find_file
from utils.config import Config
from utils.device import DTYPES
from utils.files import atomic_path, read_json, writable_folder, write_json

Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class _Interrupt(Exception):
    """Ends a rollout after a callback has set `_interrupt`."""


class _ObservableTextToVideo(TextToVideo):
    """Keeps the current rollout, for callbacks."""

    current_rollout: Rollout

    def rollout(self, *args: Any, **kwargs: Any) -> Rollout:
        """See `TextToVideo.rollout`."""
        self.current_rollout = super().rollout(*args, **kwargs)
        return self.current_rollout


class HiARPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Generates videos with a causal Wan DiT through `TextToVideo`.

    The components are those of `WanPipeline`. Any Wan2.1 text-to-video transformer becomes a `CausalWanModel` with the
    same weights. The scheduler is saved and loaded for `WanPipeline` only: `settings` determine the noise levels.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012
    _lora_loadable_modules = ["transformer"]  # noqa: RUF012

    # ---- Loading and saving ----

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        transformer: CausalWanModel | WanTransformer3DModel,
        vae: AutoencoderKLWan,
        scheduler: UniPCMultistepScheduler,
        settings: dict[str, Any] | None = None,
    ):
        """
        Args:
            settings: configuration keys and values, such as `{"rollout.schedule": "block_first"}`. docs/config.md lists
                the keys; a pipeline has those of `rollout` and `video`, and `model.text_length`.
        """
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self._loaded_scheduler = scheduler
        self._settings = apply_settings(Config(), settings or {})
        self.register_to_config(settings=settings_of(self._settings))
        self.video_processor = VideoProcessor(vae_scale_factor=vae.config.scale_factor_spatial)
        self._interrupt = False
        self._current_timestep: Tensor | None = None
        self._current_block: int | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "transformer":
            value = _as_causal(value)
        if isinstance(value, nn.Module):
            align_weights_(value)  # as TextToVideo loads them, so that both make the same bits
        super().__setattr__(name, value)
        if name == "transformer":  # the class that other programs can load; the weights have its names
            self.register_to_config(transformer=("diffusers", "WanTransformer3DModel"))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> "HiARPipeline":
        """Load a folder in diffusers' layout, as every pipeline of diffusers does.

        Relative paths are looked up in the current directory, then in this repository.

        Args:
            kwargs: those of `DiffusionPipeline.from_pretrained`. `transformer` may also be the path of a checkpoint
                (.pt, .safetensors) or of an exported folder.

        Raises:
            ValueError: for settings that do not exist, or weights that do not fit.
        """
        folder, weights = find_file(os.fspath(folder)), kwargs.get("transformer")
        if isinstance(weights, (str, os.PathLike)):
            dtype = kwargs.get("torch_dtype", kwargs.get("dtype"))
            dtype = dtype.get("transformer", dtype.get("default")) if isinstance(dtype, dict) else dtype
            directory = ModelDirectory.open(folder)
            weights = find_file(os.fspath(weights))
            kwargs["transformer"] = directory.load_transformer(CausalWanModel, dtype, weights=weights)
        return super().from_pretrained(folder, **kwargs)

    @classmethod
    def from_yaml(cls, config: str | os.PathLike[str] | Config, *overrides: str) -> "HiARPipeline":
        """Load the networks and settings of a configuration, as `TextToVideo.load` does; they stay on the CPU."""
        loaded = TextToVideo.load(config, *overrides, device="cpu")
        text_encoder, tokenizer = loaded.embeddings.cache.encoder.networks()
        networks = dict(tokenizer=tokenizer, text_encoder=text_encoder, transformer=loaded.net, vae=loaded.vae.net)
        networks["settings"] = settings_of(loaded.config)
        base = loaded.config.model.base
        if ModelDirectory.open(base).layout == "diffusers":
            return super().from_pretrained(base, **networks)
        flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        return cls(**networks, scheduler=UniPCMultistepScheduler(**flow))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write all components and settings; `from_pretrained`, `WanPipeline` and inference.py read the folder.

        Every component replaces its predecessor when it is complete, and model_index.json comes last.

        Raises:
            ValueError: if a LoRA is loaded, or the folder is not writable.
        """
        if getattr(self.transformer, "peft_config", None):
            raise ValueError("a LoRA is loaded: call unload_lora_weights(), after fuse_lora() to keep its effect")
        folder = writable_folder(save_directory)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as temporary:
            super().save_pretrained(temporary, **{"repo_id": folder.name} | kwargs)
            config = Path(temporary) / "transformer/config.json"
            write_json(config, read_json(config) | {"_class_name": "WanTransformer3DModel"})
            for item in sorted(Path(temporary).iterdir(), key=lambda item: item.name == self.config_name):
                with atomic_path(folder / item.name) as path:
                    item.rename(path)
                    if path.is_dir() and (folder / item.name).exists():
                        (folder / item.name).rename(Path(temporary) / f"old-{item.name}")

    # ---- LoRA and offload ----

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA as diffusers does; `set_adapters`, `fuse_lora` and `attention_kwargs` set its scale.

        Args:
            pretrained_model_name_or_path_or_dict: a file in a layout of `model.lora.read_adapter`, or what
                `WanPipeline.load_lora_weights` accepts: a dictionary, or a folder or repository and `weight_name`.

        Raises:
            ValueError: for files that are missing or broken, or do not fit.
        """
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, dict):
            path = Path(source, kwargs.get("weight_name") or "")
            if path.is_file() or path.suffix:
                source = read_adapter(self.transformer, str(path))
        super().load_lora_weights(source, adapter_name=adapter_name, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: the causal passes do not run layer by layer through accelerate's hooks."""
        raise ValueError("sequential offload is not supported; call enable_model_cpu_offload()")

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: the causal passes do not run through the hooks of group offloading."""
        raise ValueError("group offload is not supported; call enable_model_cpu_offload()")

    # ---- Generation ----

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt` to end the current call."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps S of each block."""
        return len(rollout_sigmas(self._settings.rollout)) - 1

    @property
    def current_timestep(self) -> Tensor | None:
        """Timestep (1000 sigma) at the input of the block's last step; None outside a call."""
        return self._current_timestep

    @property
    def current_block(self) -> int | None:
        """Index of the block that was denoised last; None outside a call."""
        return self._current_block

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | None = None,
        image: Frames | list[Frames] | None = None,
        video: Frames | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate videos. docs/api.md describes the arguments, the callback and the result.

        Raises:
            ValueError: for wrong arguments, a prefix that cannot be read, or a video with NaN.
        """
        if self.scheduler is not self._loaded_scheduler:
            raise ValueError("the scheduler has no effect: change the setting rollout.denoising_step_list instead")
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        prompts = check_prompts(prompt)
        check_choices(output_type, callback_on_step_end_tensor_inputs, num_videos_per_prompt)
        scale = lora_scale(attention_kwargs, bool(getattr(self.transformer, "peft_config", None)))
        seed, samples = sample_numbers(len(prompts), num_videos_per_prompt, generator, seed)
        changes = step_settings(self._settings, num_inference_steps, guidance_scale, negative_prompt)
        config = self._call_config(changes, height, width, num_frames, max_sequence_length, seed)
        on_step = None
        if callback_on_step_end is not None:
            on_step = partial(self._call_back, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._interrupt = False
        scale_lora_layers(self.transformer, scale)
        try:
            latents = self._generate(config, prompts, samples, (image, video), on_step)
            frames = self._decode(latents, output_type)
        finally:
            unscale_lora_layers(self.transformer, scale)
            self._current_timestep = self._current_block = None
            self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    def _generate(
        self,
        config: Config,
        prompts: list[str],
        samples: list[int],
        prefixes: tuple[Any, Any],
        on_step: Callable[[Rollout, Op], None] | None,
    ) -> Tensor:
        """Return the latents [B, F, C, h, w] of all videos, prefix included; fewer frames after an interrupt.

        Args:
            samples: the sample numbers of all videos of the first prompt, then of the second one, and so on.
            prefixes: the arguments `image` and `video` of the call.
            on_step: called after every Denoise.
        """
        vae, encoder = WanVAE(self.vae), TextEncoder(self.text_encoder, self.tokenizer, config.model.text_length)
        if any(source is not None for source in prefixes):
            self._load(self.vae)
        prefix = read_prefixes(*prefixes, len(prompts), config, vae)
        prefix_frames = 0 if prefix is None else prefix.shape[1]
        check_length(config, prefix_frames)
        repeats = len(samples) // len(prompts)
        prompts = [prompt for prompt in prompts for _ in range(repeats)]
        if prefix is not None:
            prefix = prefix.repeat_interleave(repeats, dim=0)
        self._load(self.text_encoder)
        generator = _ObservableTextToVideo(config, self.transformer, EmbeddingCache(encoder, capacity=None), vae)
        generator.encode_prompts(prompts)
        self._load(self.transformer)
        self.transformer.prepare_inference()
        blocks = [] if prefix is None else [prefix.to(self.transformer.device)]
        with self.progress_bar(total=generator.num_ops(prefix_frames)) as bar:

            def on_op(op: Op) -> None:
                bar.update()
                if on_step is not None and isinstance(op, Denoise | DenoiseAndWrite | WriteThenDenoise):
                    on_step(generator.current_rollout, op)
                if self._interrupt:
                    raise _Interrupt

            try:
                blocks.extend(generator.generate_blocks(prompts, samples, prefix, on_op))
            except _Interrupt:
                blocks.extend(generator.current_rollout.unfinished_blocks())
        return torch.cat(blocks, dim=1)

    def _call_back(self, callback: Callback, tensor_inputs: Sequence[str], rollout: Rollout, op: Op) -> None:
        """Call the user's callback after a Denoise; put the latents that it returns into the rollout."""
        assert isinstance(op, Denoise | DenoiseAndWrite | WriteThenDenoise)
        step = op.step if isinstance(op, Denoise) else op.denoise.step
        latents = rollout.blocks[op.block].x.transpose(1, 2)
        self._current_block, self._current_timestep = op.block, torch.tensor(1000 * rollout.sigmas[step])
        returned = callback(self, step, self._current_timestep, {name: latents for name in tensor_inputs})
        if returned is None:
            return
        if not isinstance(returned, dict) or returned.keys() - {"latents"}:
            found = sorted(returned) if isinstance(returned, dict) else type(returned).__name__
            raise ValueError(f"callback_on_step_end may return a dictionary with 'latents' only, not {found}")
        changed = returned.get("latents", latents)
        if not isinstance(changed, Tensor) or changed.shape != latents.shape:
            kind = str(list(changed.shape)) if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(f"callback_on_step_end returned latents {kind}, not {list(latents.shape)}")
        rollout.replace_latents(op.block, changed.transpose(1, 2))

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Return latents [B, F, C, h, w] as frames of an output type."""
        if not is_finite(latents):
            raise ValueError(not_finite(frame_range(0, latents.shape[1])))
        if output_type == "latent":
            return latents.transpose(1, 2)
        self._load(self.vae)
        pixels = WanVAE(self.vae, max_frames=self._settings.model.decode_frames).decode(latents)
        if not is_finite(pixels):
            raise ValueError(not_finite(frame_range(0, latents.shape[1]), decoded=True))
        return self.video_processor.postprocess_video(pixels.transpose(1, 2), output_type=output_type)

    # ---- Arguments ----

    def _call_config(
        self,
        changes: dict[str, Any],
        height: int | None,
        width: int | None,
        num_frames: int | None,
        text_length: int | None,
        seed: int,
    ) -> Config:
        """Return the configuration of one call: the settings with changes, and these arguments."""
        sizes = {"video.height": height, "video.width": width, "model.text_length": text_length}
        sizes["video.num_output_frames"] = None if num_frames is None else latent_frames(num_frames)
        changes = changes | {key: value for key, value in sizes.items() if value is not None}
        config = apply_settings(self._settings, changes)
        names = {dtype: name for name, dtype in DTYPES.items()}
        if self.transformer.dtype not in names:
            raise ValueError(f"the transformer is {self.transformer.dtype}; use one of {', '.join(DTYPES)}")
        config.model.dtype = names[self.transformer.dtype]  # type: ignore[assignment]
        config.model.offload = "none"  # accelerate's hooks move the networks
        config.runtime.seed = seed
        if config.rollout.num_rollouts > 1 and hasattr(self.vae, "_hf_hook"):
            raise ValueError("model offload is not supported with rollout.num_rollouts above 1")
        check_size(config, self.transformer.config)
        return config

    def _load(self, network: nn.Module) -> None:
        """Move a network to its device if model offload is on; accelerate's hook moves the previous one away."""
        hook = getattr(network, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(network)


def _as_causal(net: Any) -> CausalWanModel:
    """Return a `CausalWanModel` that shares the weights of a Wan transformer."""
    if isinstance(net, CausalWanModel):
        return net
    if not isinstance(net, WanTransformer3DModel):
        raise ValueError(f"the transformer must be a CausalWanModel or WanTransformer3DModel, not {type(net).__name__}")
    build = partial(CausalWanModel.from_config, net.config)
    return build_from_state(build, net.state_dict(), "the transformer", dtype=None)
