"""The configuration schema: every key, its unit and its default, and the only place where they are read.

A YAML file states what differs from these defaults; `key=value` words on the command line differ from the YAML. What
comes back is plain dataclasses: a typo or a wrong type never gets past `load_config`.
"""

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import UserError

DType = Literal["float32", "bfloat16", "float16"]
ObjectiveName = Literal[
    "", "text_attributes", "vae_reconstruction", "flow_matching", "ode_regression", "score_distillation"
]
DIT_OBJECTIVES = ("flow_matching", "ode_regression", "score_distillation")
"""Those that train a DiT; the others make what surrounds it."""


@dataclass
class ModelConfig:
    """Which networks, from where, and how they run."""

    base: str = "wan_models/Wan2.1-T2V-1.3B"
    """Model directory, diffusers or native Wan layout: DiT, VAE, text encoder, tokenizer."""
    generator: str = ""
    """Weights of the causal generator: a checkpoint file or diffusers folder. Empty: the base's transformer."""
    use_ema: bool = False
    """Take `generator_ema` from a checkpoint that holds both."""
    dtype: DType = "bfloat16"
    """Type of the networks' weights and arithmetic. Latents are float32 throughout."""
    attention_backend: str = "native"
    """A diffusers attention backend: native (SDPA, every device), flash, _flash_3, sage, ..."""
    text_length: int = 512
    """Text tokens that cross-attention sees; shorter prompts are padded with zero embeddings."""
    text_cache: str = ""
    """Folder in which prompt embeddings are kept between runs. Empty: none."""
    lora: str = ""
    """LoRA weights (diffusers or PEFT safetensors) that are fused into the generator. Empty: none."""
    lora_scale: float = 1.0
    """Strength of the LoRA."""
    compile: bool = False
    """torch.compile the generator's layers."""
    offload: bool = True
    """Move the text encoder to the CPU once the prompts are encoded."""


@dataclass
class RolloutConfig:
    """The order of denoising, and what a block sees of its past. See pipeline/schedule.py."""

    schedule: Literal["timestep_first", "block_first"] = "timestep_first"
    """timestep_first: one step over all blocks before the next (HiAR). block_first: all steps of a block first."""
    leading_blocks: int = 0
    """Hybrid: so many leading blocks are denoised block-first, and every step sees them clean."""
    leading_steps: int = 0
    """Hybrid: so many leading steps are done block by block before the rest goes timestep-first."""
    context: Literal["output", "input", "clean"] = "output"
    """Level of a timestep-first context: the step's output (HiAR), its input (fully matched noise), or clean."""
    order: Literal["step_major", "diagonal"] = "step_major"
    """Order of the same ops. diagonal: blocks finish early and memory stays constant. Same latents either way."""
    fuse_context: bool = True
    """One pass writes a block's context and denoises the next block: fewer passes, the same latents up to rounding."""
    block_frames: int = 3
    """Latent frames that are denoised together."""
    denoising_step_list: list[float] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])
    """Timesteps of the steps' inputs, 1000 sigma (before warping); a trailing 0 means clean and may be left out."""
    warp_denoising_step: bool = True
    """Whether the list is positions on the unshifted grid, to be warped by the shift, or timesteps as they are."""
    timestep_shift: float = 5.0
    """Shift of the noise levels: sigma = s u / (1 + (s-1) u)."""
    use_ode_trajectory: bool = False
    """Between steps: false re-noises the predicted x0 with fresh noise, true takes the Euler step along the flow."""
    window: int = 21
    """Latent frames that attention spans, the current block and the sink included. 0: the whole video."""
    sink: int = 0
    """Latent frames at the start of the video that never leave the window."""


NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)  # Wan2.1's own; its weights expect this very string


@dataclass
class TeacherConfig:
    """The bidirectional network, and how it is sampled."""

    base: str = ""
    """Score distillation's teacher, where it is of another size than the base: a model directory. Empty: model.base."""
    path: str = ""
    """Its weights: folder or checkpoint. Empty: the transformer of its base."""
    guidance_scale: float = 6.0
    """Classifier-free guidance: unconditional + scale (conditional - unconditional)."""
    num_inference_steps: int = 48
    """Euler steps of an ODE trajectory."""
    timestep_shift: float = 8.0
    """Shift of the solver's noise levels."""
    negative_prompt: str = NEGATIVE_PROMPT
    """What guidance leads away from."""


@dataclass
class VideoConfig:
    """Size and length of the videos."""

    height: int = 480
    """Pixels."""
    width: int = 832
    """Pixels."""
    fps: int = 16
    """Pixel frames per second in the written file."""
    num_output_frames: int = 21
    """Latent frames, given first frames included."""


@dataclass
class DataConfig:
    """What a training run learns from."""

    path: str = ""
    """What the objective reads: encoded clips (flow matching) or ODE pairs (ODE regression, forward KL)."""
    prompts: str = ""
    """File of prompts, one per line, that score distillation rolls out. Empty: those of the ODE pairs."""
    num_frames: int = 21
    """Latent frames of a training clip."""
    sigmas: list[float] = field(default_factory=list)
    """Noise levels of the ODE pairs' points, noisy to clean, for folders without a sigmas.json."""


@dataclass
class TrainConfig:
    """One training run: an objective and the loop around it."""

    objective: ObjectiveName = ""
    """What is learned. Empty: this configuration does not train."""
    network: str = ""
    """Preset of the network that is trained from nothing (model/presets.py)."""
    init: str = ""
    """Folder or checkpoint of weights to start from. Empty: random."""
    output: str = ""
    """Folder that receives the finished (EMA) weights, in the diffusers layout."""
    max_iterations: int = 1000
    """Optimizer updates of the whole run."""
    batch_size: int = 8
    """Clips that go through the network at once, if of the shortest length in clip_frames (fewer of longer ones)."""
    total_batch_size: int = 0
    """Clips per iteration, over all processes; accumulated where it takes several passes. 0: batch_size each."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for matrices inside the layers, AdamW for everything else."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW."""
    muon_learning_rate: float = 5e-3
    """Peak rate of Muon's matrices."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates."""
    weight_decay: float = 0.01
    """Decoupled weight decay of both optimizers."""
    warmup: int = 100
    """Iterations of linear warm-up."""
    decay: Literal["cosine", "constant"] = "cosine"
    """What rates do after it: fall to a twentieth along a cosine, or stay."""
    grad_clip: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it. 0: none is."""
    stop_grad_norm: float = 1.0e4
    """Gradient norm beyond which a run stops instead of taking the step."""
    stop_loss_growth: float = 1000.0
    """A loss so many times its median over the last hundred iterations stops a run as well."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights; shortened early in a run that averages from the start."""
    ema_start: int = 0
    """Iteration from which on the average is taken; before it, it is the weights."""
    text_dropout: float = 0.1
    """Share of clips trained without their caption, for classifier-free guidance."""
    timestep_shift: float = 5.0
    """Shift of the noise levels that are trained on."""
    forcing: Literal["none", "diffusion", "teacher"] = "none"
    """Flow matching: none trains a bidirectional net, at one noise level per clip; the others a causal one, at a level
    per block, which sees the blocks before it as noisy as they come (diffusion forcing) or clean (teacher forcing)."""
    first_frame_weight: float = 1.0
    """Flow matching: how much the first latent frame counts. It holds one pixel frame, not four, and learns last."""
    kl_weight: float = 1e-6
    """Weight of the VAE's KL term."""
    clip_frames: list[int] = field(default_factory=list)
    """Pixel frames (4n+1) of the training clips of the VAE and of flow matching; one of these lengths is drawn per
    iteration. Flow matching with none takes clips as they are."""
    decoder_only: bool = False
    """Train the VAE's decoder beside a fixed encoder, so that latents made before stay valid."""
    compile: bool = False
    """torch.compile the layers of the trained network."""
    activation_checkpointing: bool = False
    """Keep no activations inside of layers; compute them again in the backward pass."""
    dtype: DType = "float32"
    """Type that networks compute in while they are trained. Their weights, gradients and averages stay in float32."""
    sharding: Literal["replicate", "shard", "hybrid"] = "replicate"
    """How processes share the weights: each has all; each a part (FSDP2); or parts within a machine, copies across."""
    save: bool = True
    """Write checkpoints."""
    sample_every: int = 0
    """Iterations between sample videos of the average weights, in logdir/samples. 0: none."""
    sample_prompts: str = ""
    """File of their prompts. Empty: the first of those that are trained on."""
    keep_checkpoints: int = 2
    """So many of the latest checkpoints are kept."""
    log_every: int = 20
    """Iterations between log lines."""
    checkpoint_every: int = 200
    """Iterations between checkpoints."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases mode; credentials come from its own environment variables."""
    wandb_dir: str = ""
    """Folder of its files. Empty: the run's own."""
    project: str = "hiar"
    """Weights & Biases project."""


@dataclass
class DistillConfig:
    """Score distillation by self-rollout: DMD against the teacher, and forward KL onto its trajectories."""

    generator_every: int = 5
    """The generator is updated in every so many iterations, the critic in each."""
    critic_learning_rate: float = 3e-7
    """Peak rate of the critic's optimizer."""
    guidance_scale: float = 4.0
    """Guidance of the teacher's score: unconditional + scale (conditional - unconditional)."""
    timestep_shift: float = 5.0
    """Shift of the noise levels at which teacher and critic are compared and the critic is trained."""
    min_timestep: float = 20.0
    """Smallest timestep (1000 sigma) of those."""
    max_timestep: float = 980.0
    """Largest timestep of those."""
    min_exit_step: int = 0
    """First step at which a rollout may end; the step is drawn evenly from there to the last."""
    max_rollout_frames: int = 21
    """Longest rollout in latent frames; its length is drawn evenly from data.num_frames up. Losses see its end."""
    block_backward: bool = True
    """Backward block by block, with one block's activations at a time, instead of through the whole rollout at once."""
    forward_kl_weight: float = 0.1
    """Weight of the forward KL; 0 leaves it out, and data.path with it."""
    forward_kl_mode: Literal["bidirectional", "block_causal", "rollout"] = "bidirectional"
    """How the generator sees a clip for it: all at once (HiAR's paper), causally at once, or by its own rollout."""
    forward_kl_form: Literal["x0", "flow", "endpoint"] = "x0"
    """What is compared: x0, the flow, or the end of the Euler step."""
    forward_kl_steps: int = 1
    """It is applied to the first so many steps."""


@dataclass
class RuntimeConfig:
    """Where it runs."""

    device: str = "auto"
    """auto takes CUDA when there is one; or cuda, cuda:1, mps, cpu."""
    seed: int = 0
    """All randomness is a pure function of it."""


@dataclass
class Config:
    """Everything that a YAML file may say."""

    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def to_yaml(self) -> str:
        """This configuration as YAML that `load_config` reads back."""
        return OmegaConf.to_yaml(OmegaConf.structured(self))


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file over the schema's defaults, then `section.key=value` overrides.

    A file that says `inherit: other.yaml` (beside it) states what differs from that one.

    Raises:
        UserError: for a missing or malformed file, an unknown key, a wrong type or a bad choice, naming the key.
    """
    if not os.path.isfile(path):
        raise UserError(f"no config file {path}; see configs/ for those that exist")
    record = read_metadata(path)
    files = _read_yaml(path) if record is None else [OmegaConf.create(record["config"])]
    for word in overrides:
        if "=" not in word or word.startswith("-"):
            raise UserError(f"cannot read {word!r}: options are --name value, config overrides are section.key=value")
    try:
        # Nothing behind the sign is the empty word; YAML takes it for null.
        changes = OmegaConf.from_dotlist([f"{word}''" if word.endswith("=") else word for word in overrides])
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read a value in {' '.join(overrides)}: it is not valid YAML ({reason})") from None
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), *map(_off_is_a_word, [*files, changes]))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError) as error:
        name = getattr(error, "full_key", "")
        key = f" (key {name})" if name else ""
        raise UserError(f"in {path} or the overrides: {str(error).splitlines()[0]}{key}") from None
    assert isinstance(config, Config)
    check_config(config)
    return config


def _off_is_a_word(given: Any) -> Any:
    """W&B's mode as it was written: YAML takes an unquoted off for false."""
    train = OmegaConf.select(given, "train")
    if isinstance(train, DictConfig) and train.get("wandb") is False:
        train.wandb = "off"
    return given


def _read_yaml(path: str, heirs: tuple[str, ...] = ()) -> list[DictConfig]:
    """A YAML file after those that it inherits from; `heirs` inherit from it."""
    path = os.path.normpath(path)
    if path in heirs:
        raise UserError(f"{heirs[-1]} inherits from {path}, which inherits from it")
    try:
        loaded = OmegaConf.load(path)
    except OSError:
        raise UserError(f"{heirs[-1]} inherits from {path}, which cannot be read") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold a mapping of sections, see utils/config.py")
    parent = loaded.pop("inherit", None)
    if parent is None:
        return [loaded]
    return [*_read_yaml(os.path.join(os.path.dirname(path), str(parent)), (*heirs, path)), loaded]


def read_metadata(path: str) -> dict[str, Any] | None:
    """The record beside a video, if `path` is one (.json): what was generated, and under "config" how; else None.

    Raises:
        UserError: if it is a JSON file of another kind.
    """
    if not path.endswith(".json"):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    known = isinstance(record, dict) and {"config", "prompt", "name", "sample"} <= record.keys()
    if not known or not isinstance(record["config"], dict):
        raise UserError(f"{path} is not the record of a video: it lacks config, prompt, name or sample")
    return record


_POSITIVE = (
    *("rollout.block_frames", "rollout.timestep_shift", "video.height", "video.width", "video.fps"),
    *("video.num_output_frames", "model.text_length", "teacher.num_inference_steps", "teacher.timestep_shift"),
    *("data.num_frames", "train.timestep_shift", "train.max_iterations", "train.batch_size", "train.log_every"),
    *("train.checkpoint_every", "train.keep_checkpoints", "distill.generator_every", "distill.timestep_shift"),
    *("distill.forward_kl_steps", "distill.max_rollout_frames"),
)
_NOT_NEGATIVE = (
    *("rollout.leading_blocks", "rollout.leading_steps", "rollout.window", "rollout.sink", "runtime.seed"),
    *("train.learning_rate", "train.muon_learning_rate", "train.weight_decay", "train.grad_clip", "train.warmup"),
    *("train.ema_start", "train.total_batch_size", "train.first_frame_weight", "train.kl_weight"),
    *("train.sample_every", "distill.critic_learning_rate", "distill.forward_kl_weight"),
)
_FINITE = ("model.lora_scale", "teacher.guidance_scale", "distill.guidance_scale")


def check_config(config: Config) -> None:
    """Check what types cannot say.

    Raises:
        UserError: naming the key and the values that would do.
    """
    for keys, fits, word in (
        (_POSITIVE, lambda value: 0 < value < math.inf, "positive"),
        (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more"),
        (_FINITE, math.isfinite, "a finite number"),
    ):
        for key in keys:
            section, name = key.split(".")
            value = getattr(getattr(config, section), name)
            if not fits(value):  # NaN included
                raise UserError(f"{key} must be {word}, not {value}")
    _check_rollout(config.rollout)
    _check_train(config.train)
    _check_distill(config)
    sigmas = config.data.sigmas
    if sigmas and not are_noise_levels(sigmas):
        raise UserError(f"data.sigmas must fall from at most 1 to at least 0, not {sigmas}")


def are_noise_levels(sigmas: Sequence[float]) -> bool:
    """Whether these fall from at most 1 to at least 0."""
    return _falls(sigmas) and sigmas[0] <= 1 and sigmas[-1] >= 0


def _falls(levels: Sequence[float]) -> bool:
    """Whether every one of these is smaller than the one before; false with a NaN."""
    return all(a > b for a, b in itertools.pairwise(levels)) and all(map(math.isfinite, levels))


def _steps(rollout: RolloutConfig) -> list[float]:
    steps = rollout.denoising_step_list
    return steps[:-1] if steps and steps[-1] == 0 else steps


def _check_rollout(rollout: RolloutConfig) -> None:
    steps = _steps(rollout)
    if not steps or not _falls([*steps, 0]) or not steps[0] <= 1000:
        raise UserError(
            f"rollout.denoising_step_list must fall from at most 1000 towards 0, not {rollout.denoising_step_list}"
        )
    if rollout.leading_steps > len(steps):
        raise UserError(f"rollout.leading_steps is {rollout.leading_steps}, but there are only {len(steps)} steps")
    if rollout.window and rollout.window < rollout.block_frames + rollout.sink:
        raise UserError(
            f"rollout.window {rollout.window} must hold a block ({rollout.block_frames}) and the sink "
            f"({rollout.sink}), or be 0 for the whole video"
        )


def _check_train(train: TrainConfig) -> None:
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"train.betas must be two numbers from 0 to below 1, not {train.betas}")
    if not 0 <= train.ema_decay < 1:
        raise UserError(f"train.ema_decay must be from 0 to below 1, not {train.ema_decay}")
    if not 0 <= train.text_dropout <= 1:
        raise UserError(f"train.text_dropout must be from 0 to 1, not {train.text_dropout}")
    for key, limit in ("stop_grad_norm", train.stop_grad_norm), ("stop_loss_growth", train.stop_loss_growth):
        if not limit > 0:
            raise UserError(f"train.{key} must be positive, not {limit}; .inf never stops")
    needs_lengths = train.objective == "vae_reconstruction" and not train.clip_frames
    if needs_lengths or any(frames < 1 or frames % 4 != 1 for frames in train.clip_frames):
        raise UserError(f"train.clip_frames must be numbers of the form 4n+1, not {train.clip_frames}")
    if train.dtype == "float16":
        raise UserError("train.dtype=float16 would lose these losses' gradients; take bfloat16 or float32")


def _check_distill(config: Config) -> None:
    distill, steps = config.distill, _steps(config.rollout)
    if not 0 <= distill.min_exit_step < len(steps):
        raise UserError(f"distill.min_exit_step must be 0 to {len(steps) - 1}, not {distill.min_exit_step}")
    if distill.forward_kl_steps > len(steps):
        raise UserError(f"distill.forward_kl_steps must be 1 to {len(steps)}, not {distill.forward_kl_steps}")
    if not 0 < distill.min_timestep < distill.max_timestep <= 1000:
        raise UserError(
            "distill.min_timestep and distill.max_timestep must rise within 0 and 1000, not "
            f"{distill.min_timestep} and {distill.max_timestep}"
        )
    if config.train.objective == "score_distillation" and distill.max_rollout_frames < config.data.num_frames:
        raise UserError(
            f"distill.max_rollout_frames {distill.max_rollout_frames} must be at least "
            f"data.num_frames {config.data.num_frames}"
        )


def num_micro_batches(train: TrainConfig, processes: int) -> int:
    """In how many parts of `batch_size` an iteration's batch is computed, over all processes.

    Raises:
        UserError: if it does not divide into the same number of parts for each process.
    """
    total = train.total_batch_size or train.batch_size * processes
    if total % (train.batch_size * processes):
        raise UserError(
            f"train.total_batch_size={total} must be a multiple of train.batch_size={train.batch_size} times the "
            f"number of processes, {processes}"
        )
    return total // train.batch_size
