"""The schema of the configuration: every key with its unit and default.

The string after each field documents it; `scripts/write_config_docs.py` turns these strings into docs/config.md.
`load_config` in utils/config_loading.py reads a YAML file that states only what differs.
"""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import OmegaConf

from utils.prompts import NEGATIVE_PROMPT

DType = Literal["float32", "bfloat16", "float16"]
ObjectiveName = Literal[
    "", "text_attributes", "vae_reconstruction", "tiny_decoder", "flow_matching", "ode_regression", "score_distillation"
]
Offload = Literal["none", "text", "all"]
Compile = Literal["auto", "on", "off"]
DIT_OBJECTIVES = ("flow_matching", "ode_regression", "score_distillation")
"""Objectives that train a DiT. The others train the miniature's text encoder, VAE and tiny decoder."""


@dataclass
class ModelConfig:
    """The networks: where their weights are, and how they run."""

    base: str = "wan_models/Wan2.1-T2V-1.3B"
    """Model directory in the diffusers or native Wan layout, with DiT, VAE, text encoder and tokenizer."""
    generator: str = ""
    """Weights of the causal generator: a checkpoint file or a diffusers folder. Empty: the transformer of `base`."""
    use_ema: bool = False
    """Load `generator_ema` from a checkpoint that holds both `generator` and `generator_ema`."""
    dtype: DType = "bfloat16"
    """Type of the weights and of the computation. Latents are always float32."""
    attention_backend: str = "native"
    """Attention backend: native (PyTorch's SDPA, runs on every device), auto (the fastest one of the GPU that does not
    round to 8 bits), or one of diffusers', such as _native_cudnn, _flash_3 and sage. See docs/benchmarks.md."""
    text_length: int = 512
    """Text tokens in cross-attention. Shorter prompts are padded with zero embeddings."""
    text_cache: str = ""
    """Folder that stores prompt embeddings between runs. Empty: embeddings are not stored."""
    lora: str = ""
    """LoRA weights to merge into the generator: safetensors in the diffusers or PEFT layout, or a .pt file as LongLive
    writes. Empty: no LoRA."""
    lora_scale: float = 1.0
    """Factor on the LoRA's weights."""
    quantization: Literal["none", "int8", "int8_dynamic", "fp8"] = "none"
    """8-bit weights of the generator's layers, by torchao (docs/memory.md). int8 quantizes the weights only;
    int8_dynamic and fp8 also quantize each token's activations. fp8 needs a GPU with FP8."""
    compile: Compile = "auto"
    """Compile the generator's layers with torch.compile, and on CUDA the VAE's decoder. auto: on CUDA only. Older
    files may have true or false."""
    cuda_graphs: bool = False
    """On CUDA, launch the layers over a full window as CUDA graphs. This has never run on a GPU."""
    decoder: Literal["wan", "tiny"] = "wan"
    """Decoder of the latents: the one of the VAE, or a tiny one, which is faster and less exact. The VAE encodes."""
    tiny_decoder: str = ""
    """Weights of the tiny decoder: a .pth or .safetensors file in TAEHV's layout (taew2_1 for Wan2.1), or a folder."""
    decode_frames: int = 0
    """Latent frames that the decoder decodes at once. 0: a whole block, which is fastest. 1 needs the least memory."""
    offload: Offload = "text"
    """Weights that stay in CPU memory to free the GPU's. text: those of the text encoder, except while it encodes. all:
    also those of the DiT's layers; every pass copies them. Older files may have true (text) or false (none)."""


@dataclass
class RolloutConfig:
    """The schedule: the order of the denoising passes, and the context that each block attends to."""

    schedule: Literal["timestep_first", "block_first", "bidirectional"] = "timestep_first"
    """timestep_first (HiAR) runs one step over all blocks before the next step. block_first (Self-Forcing) runs all
    steps of one block before the next block. bidirectional (CausVid's teacher and bidirectional student) denoises the
    whole video as one block, without a cache, and ignores the keys of blocks and windows."""
    leading_blocks: int = 0
    """Number of leading blocks that timestep_first denoises block-first. They are clean context for later blocks."""
    leading_steps: int = 0
    """Number of leading steps that timestep_first runs block by block, before it runs the other steps."""
    context: Literal["output", "input", "clean"] = "output"
    """Noise level of the context under timestep_first: the level after the step (output, HiAR), the level before the
    step (input), or zero (clean)."""
    context_noise: float = 0.0
    """Sigma of fresh noise in the context of finished blocks, where it would be clean. A prefix stays clean."""
    order: Literal["step_major", "diagonal", "batched"] = "step_major"
    """Order of the passes under timestep_first. diagonal finishes blocks early and uses constant memory. batched runs
    each diagonal in one pass, which is faster for small networks and frames. All orders give the same latents, batched
    up to rounding. Sessions and pipelines of several ranks run diagonal instead of batched."""
    fuse_context: bool = True
    """Write the context of one block and denoise the next block in one pass. This needs fewer passes and gives equal
    latents up to rounding."""
    block_frames: int = 3
    """Latent frames per block."""
    independent_first_frame: bool = False
    """Make the first latent frame a block of its own, before the blocks of `block_frames`. An image prefix fills it."""
    denoising_step_list: list[float] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])
    """Timestep (1000 sigma) at the input of each step, before warping. A trailing 0 means clean and is optional."""
    warp_denoising_step: bool = True
    """Apply `timestep_shift` to denoising_step_list. false uses the listed timesteps unchanged."""
    timestep_shift: float = 5.0
    """Shift s of the noise levels: sigma = s u / (1 + (s - 1) u), where u is the unshifted level."""
    num_steps: int = 0
    """Number of steps at evenly spaced levels, shifted by `timestep_shift`, as teachers use. 0: denoising_step_list."""
    guidance_scale: float = 1.0
    """Scale s of classifier-free guidance: unconditional + s (conditional - unconditional), with
    `teacher.negative_prompt`. Networks that are not distilled need it. 1: no guidance, and half the passes."""
    strength: float = 1.0
    """Video-to-video: factor on all noise levels, above 0 and at most 1. Blocks start from `video.source`, noised to
    the first level: a small value keeps the clip, 1 follows the prompt."""
    use_ode_trajectory: bool = False
    """true takes an Euler step along the flow between steps (deterministic). false adds fresh noise to predicted x0."""
    window: int = 21
    """Latent frames in the attention window, including the current block and the sink. 0: the whole video."""
    sink: int = 0
    """Latent frames at the start of the video that always stay in the window."""
    write_window: int = 0
    """Newest frames of context that context writes attend to, without the sink (Commit Forcing). 0: all."""
    moving_sink: bool = False
    """Move the sink with the window: rotate its keys so that it directly precedes the window (Deep Forcing)."""
    cache_dtype: Literal["auto", "float8_e4m3fn", "int8"] = "auto"
    """Type of cached keys and values. auto: `model.dtype`. float8_e4m3fn and int8 need half the memory of bfloat16,
    with one scale per token and head, and change the video (docs/memory.md)."""
    prompt_switch: Literal["keep", "recache", "flush"] = "keep"
    """Context when a prompt track changes the prompt. keep leaves it; recache writes the window's blocks again under
    the new prompt (LongLive); flush keeps the sink and the newest two frames (Infinity-RoPE)."""
    num_rollouts: int = 1
    """Rollouts per video, for long videos as CausVid makes them. Each has `video.num_output_frames` frames, and the
    next one continues the last `overlap_frames` of it."""
    overlap_frames: int = 3
    """Latent frames that two rollouts of a video share. The video contains them once."""


@dataclass
class TeacherConfig:
    """The bidirectional teacher, and how it generates videos."""

    base: str = ""
    """Model directory of the teacher, if its size differs from `model.base`. Empty: `model.base`."""
    path: str = ""
    """Weights of the teacher: a folder or a checkpoint file. Empty: the transformer of its base."""
    guidance_scale: float = 6.0
    """Scale s of classifier-free guidance: unconditional + s (conditional - unconditional)."""
    num_inference_steps: int = 48
    """Euler steps per video."""
    timestep_shift: float = 8.0
    """Shift of the noise levels of these steps."""
    negative_prompt: str = NEGATIVE_PROMPT
    """Prompt of the unconditional prediction. The default is Wan2.1's negative prompt."""


@dataclass
class VideoConfig:
    """Size and length of the generated videos."""

    height: int = 480
    """Height in pixels."""
    width: int = 832
    """Width in pixels."""
    fps: int = 16
    """Pixel frames per second of the video file."""
    crf: int = 10
    """Quality of the mp4 file: x264's crf, from 0 (lossless) to 51. HiAR writes 10."""
    num_output_frames: int = 21
    """Length in latent frames F, including the prefix. The video has 4 (F - 1) + 1 pixel frames. With
    `rollout.num_rollouts` above 1: the length of one rollout."""
    source: str = ""
    """Clip or saved latents that video-to-video changes, see `rollout.strength`. The video is at most as long as the
    clip. Empty: text-to-video."""


@dataclass
class DataConfig:
    """The training data."""

    path: str = ""
    """Folder or LMDB: encoded clips for flow_matching and for distill.backward_simulation=false, ODE pairs for
    ode_regression and for the forward KL loss."""
    prompts: str = ""
    """File with one prompt per line for the rollouts of score_distillation. Empty: the prompts of the ODE pairs."""
    num_frames: int = 21
    """Latent frames per training clip."""
    frame_size: int = 64
    """Height and width in pixels of the miniature's training clips: 64, or 96 for clips with unnamed attributes."""
    sigmas: list[float] = field(default_factory=list)
    """Noise levels of the points of an ODE pair, noisy to clean. Only for folders without a sigmas.json."""


@dataclass
class TrainConfig:
    """A training run: the objective, the optimizer and the training loop."""

    objective: ObjectiveName = ""
    """Objective of the run. Empty: this configuration is for inference only."""
    network: str = ""
    """Preset of model/presets.py for a network that starts from random weights. Empty: that of `model.base`."""
    init: str = ""
    """Initial weights: a folder or a checkpoint file. Empty: random weights of `network`, else of `model.base`."""
    output: str = ""
    """Folder for the finished EMA weights, in the diffusers layout."""
    max_iterations: int = 1000
    """Iterations (optimizer updates) of the whole run."""
    batch_size: int = 8
    """Clips per micro-batch, at the shortest length in clip_frames. Micro-batches of longer clips hold fewer."""
    total_batch_size: int = 0
    """Clips per iteration over all ranks; gradients accumulate over micro-batches. 0: batch_size per rank."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon uses Muon for the matrices inside the layers and AdamW for all other parameters."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 5e-3
    """Peak learning rate of Muon."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay of both optimizers."""
    warmup: int = 100
    """Iterations of linear warm-up of the learning rate."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: a cosine down to 1/20 of the peak, or constant."""
    grad_clip: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it. 0: no clipping."""
    stop_grad_norm: float = 1.0e4
    """Gradient norm above which the run stops before the update. .inf: never."""
    stop_loss_growth: float = 1000.0
    """The run stops if a loss exceeds this multiple of its median over the last 100 iterations. .inf: never."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average (EMA) of the weights. It is smaller early in a run with ema_start 0."""
    ema_start: int = 0
    """First iteration of the EMA. Before it, the EMA weights equal the trained weights."""
    text_dropout: float = 0.1
    """Fraction of the clips that are trained without their caption, for classifier-free guidance."""
    timestep_shift: float = 5.0
    """Shift of the noise levels that are drawn in training."""
    forcing: Literal["none", "diffusion", "teacher"] = "none"
    """Flow matching: none trains a bidirectional network with one noise level per clip. diffusion and teacher train a
    causal network with one level per block. Earlier blocks are noisy (diffusion forcing) or clean (teacher forcing)."""
    first_frame_weight: float = 1.0
    """Flow matching: weight of the first latent frame in the loss. This frame decodes to one pixel frame, not four."""
    kl_weight: float = 1e-6
    """Weight of the VAE's KL loss."""
    clip_frames: list[int] = field(default_factory=list)
    """Lengths of training clips in pixel frames (4n+1), for the VAE and for flow matching. Each iteration draws one
    length. Empty (flow matching only): whole clips."""
    decoder_only: bool = False
    """Train only the VAE's decoder. Existing latents stay valid because the encoder does not change."""
    compile: bool = False
    """Compile the layers of the trained network with torch.compile."""
    activation_checkpointing: bool = False
    """Recompute the activations inside each layer in the backward pass instead of storing them."""
    dtype: DType = "float32"
    """Type of the computation. Weights, gradients and EMA weights are float32."""
    sharding: Literal["replicate", "shard", "hybrid"] = "replicate"
    """replicate: each rank holds all weights. shard: the weights are split over all ranks (FSDP2). hybrid: they are
    split within each machine and replicated across machines."""
    save: bool = True
    """Write checkpoints."""
    sample_every: int = 0
    """Iterations between sample videos of the EMA weights, in samples/ of the run's folder. 0: no samples."""
    sample_prompts: str = ""
    """File of prompts for the sample videos. Empty: the first training prompts."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep."""
    snapshot_every: int = 0
    """Iterations between snapshots: the EMA weights in bfloat16, in LOGDIR/snapshots/ITERATION. They are never deleted,
    and model.generator reads them. 0: none."""
    log_every: int = 20
    """Iterations between log lines."""
    checkpoint_every: int = 200
    """Iterations between checkpoints."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases mode. Credentials come from the environment variables of W&B."""
    wandb_dir: str = ""
    """Folder for W&B files. Empty: the run's folder."""
    project: str = "hiar"
    """Weights & Biases project."""


@dataclass
class DistillConfig:
    """Score distillation: a DMD loss against the teacher, and a forward KL loss on ODE pairs."""

    generator_every: int = 5
    """Iterations between updates of the generator. The critic is updated in every iteration."""
    critic_warmup: int = 0
    """Iterations at the start that update the critic only."""
    critic_learning_rate: float = 3e-7
    """Peak learning rate of the critic."""
    guidance_scale: float = 4.0
    """Scale s of the teacher's guidance: unconditional + s (conditional - unconditional)."""
    timestep_shift: float = 5.0
    """Shift of the noise levels of the DMD loss and of the critic's loss."""
    min_timestep: float = 20.0
    """Smallest timestep (1000 sigma) of these noise levels."""
    max_timestep: float = 980.0
    """Largest timestep of these noise levels."""
    backward_simulation: bool = True
    """Source of the generator's clips. true: its own rollouts. false (CausVid): it denoises clips of data.path, noised
    to the levels of denoising_step_list, in one step. A trailing 0 in that list adds clean blocks."""
    min_exit_step: int = 0
    """Smallest exit step. The exit step is drawn uniformly from this step to the last step."""
    max_rollout_frames: int = 21
    """Longest rollout in latent frames. The length is drawn uniformly from data.num_frames to this number. The losses
    use the last data.num_frames frames."""
    history_gradient: Literal["none", "context", "released"] = "none"
    """Gradient through the context of later blocks: none (Self-Forcing's paper), context (all of it; SGF), or released
    (that of the released code of Self-Forcing and HiAR: context keys have the gradient of the exit step's keys)."""
    block_backward: bool = True
    """Run the backward pass block by block, with the activations of one block in memory. false: all blocks at once."""
    forward_kl_weight: float = 0.1
    """Weight of the forward KL loss. 0: no forward KL, and data.path is not read."""
    forward_kl_mode: Literal["bidirectional", "block_causal", "rollout"] = "bidirectional"
    """Attention of the generator in the forward KL loss: one bidirectional pass (HiAR's paper), one block-causal pass,
    or a rollout."""
    forward_kl_form: Literal["x0", "flow", "endpoint"] = "x0"
    """Quantity that the forward KL loss compares: x0, the flow, or the end point of the Euler step."""
    forward_kl_steps: int = 1
    """Number of leading steps with a forward KL loss."""


@dataclass
class RuntimeConfig:
    """Device, threads and seed."""

    device: str = "auto"
    """auto selects CUDA, else Apple's GPU, else the CPU. A name selects one device: cuda, cuda:1, mps, cpu."""
    threads: int = 0
    """CPU threads of torch. 0: torch's default, which is all cores, or one thread under torchrun."""
    seed: int = 0
    """Seed of all random numbers."""


@dataclass
class Config:
    """All sections of a configuration file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def to_yaml(self) -> str:
        """Return the configuration as YAML that `load_config` can read."""
        return OmegaConf.to_yaml(OmegaConf.structured(self))
