"""pipeline/diffusers_pipeline.py: videos equal those of `TextToVideo`; folders, callbacks, LoRA and offload."""

import json
import os

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import ROOT

from model.lora import fuse_lora
from model.vae_stream import decode_piece
from model.weight_files import save_weights
from pipeline import TextToVideo
from pipeline.diffusers_pipeline import HiARPipeline

PROMPT = "a red circle"
SETTINGS = {"video.height": 32, "video.width": 32, "video.num_output_frames": 9, "model.text_length": 24}


def load(world, **settings) -> HiARPipeline:
    """Load the tiny model with its trained generator, and without a progress bar."""
    pipe = HiARPipeline.from_pretrained(
        world.model,
        transformer=world.model / "generator",
        settings=SETTINGS | settings,
        dtype=torch.float32,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: HiARPipeline, prompt: str | list[str] = PROMPT, **arguments) -> torch.Tensor:
    """Return the latents [B, C, F, h, w] of a call with seed 3, unless the arguments determine the noise."""
    noise = {} if "seed" in arguments or "generator" in arguments else {"seed": 3}
    return pipe(prompt, output_type="latent", **noise, **arguments).frames


@pytest.fixture(scope="module")
def pipe(world) -> HiARPipeline:
    """The pipeline that tests share; no test changes it."""
    return load(world)


@pytest.fixture(scope="module")
def latents(pipe):
    return latents_of(pipe)


@pytest.fixture(scope="module")
def text_to_video(world) -> TextToVideo:
    return TextToVideo.load(str(world.config), device="cpu", seed=3)


# ---- The videos ----


def test_a_video_equals_that_of_text_to_video(pipe, latents, text_to_video):
    video = text_to_video.generate(PROMPT)
    assert torch.equal(latents[0].transpose(0, 1), video.latents)
    frames = pipe(f" {PROMPT} ", num_frames=33, seed=3, height=32, width=32, num_inference_steps=4).frames
    assert frames.shape == (1, 33, 32, 32, 3) and frames.dtype == np.float32
    assert np.array_equal((frames[0] * 255).round().astype(np.uint8), video.frames)
    images = pipe(PROMPT, seed=3, output_type="pil").frames[0]
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), video.frames)
    (pixels,) = pipe(PROMPT, seed=3, output_type="pt", return_dict=False)
    assert np.array_equal(pixels[0].permute(0, 2, 3, 1), frames[0])


def test_seed_and_sample_number_are_those_of_inference(pipe, text_to_video):
    batch = latents_of(pipe, [PROMPT, "a blue square"], num_videos_per_prompt=2, num_frames=9)
    expected = [
        text_to_video.generate(prompt, sample=sample, num_frames=3).latents
        for prompt in (PROMPT, "a blue square")
        for sample in (0, 1)
    ]
    torch.testing.assert_close(batch.transpose(1, 2), torch.stack(expected))


@pytest.mark.parametrize(
    ("settings", "arguments", "overrides"),
    [
        (
            {"rollout.num_steps": 5, "rollout.schedule": "block_first"},
            {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "dark"},
            (
                "rollout.num_steps=2",
                "rollout.schedule=block_first",
                "rollout.guidance_scale=3",
                "teacher.negative_prompt=dark",
            ),
        ),
        (
            {"rollout.num_rollouts": 2, "rollout.overlap_frames": 3},
            {},
            ("rollout.num_rollouts=2", "rollout.overlap_frames=3"),
        ),
    ],
    ids=["guidance", "repeated rollouts"],
)
def test_settings_are_those_of_text_to_video(world, settings, arguments, overrides):
    expected = TextToVideo.load(str(world.config), *overrides, device="cpu", seed=3).generate(PROMPT, num_frames=6)
    latents = latents_of(load(world, **settings), num_frames=21, **arguments)
    assert torch.equal(latents[0].transpose(0, 1), expected.latents)


def test_generators_determine_the_noise(pipe):
    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    reused = seeded(1)
    first, second = (latents_of(pipe, generator=reused, num_frames=9) for _ in range(2))
    assert torch.equal(first, latents_of(pipe, generator=seeded(1), num_frames=9)) and not torch.equal(first, second)
    listed = latents_of(pipe, generator=[seeded(2), seeded(1)], num_videos_per_prompt=2, num_frames=9)
    torch.testing.assert_close(listed[1:], first)
    torch.manual_seed(1)
    assert torch.equal(pipe(PROMPT, output_type="latent", num_frames=9).frames, first)


def test_an_image_or_clip_is_continued(tmp_path, pipe, text_to_video):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(frame) for frame in pixels]
    images[0].save(tmp_path / "first.png")
    expected = text_to_video.generate(PROMPT, num_frames=4, image=tmp_path / "first.png").latents
    assert torch.equal(latents_of(pipe, image=tmp_path / "first.png", num_frames=13)[0].transpose(0, 1), expected)
    assert torch.equal(latents_of(pipe, image=pixels[0], num_frames=13)[0].transpose(0, 1), expected)
    two = latents_of(pipe, [PROMPT, PROMPT], image=images[:2], num_frames=13)
    torch.testing.assert_close(two[0].transpose(0, 1), expected)
    assert not torch.equal(two[0, :, :1], two[1, :, :1])
    clip = latents_of(pipe, video=pixels, num_frames=17)
    assert torch.equal(clip, latents_of(pipe, video=images, num_frames=17))
    torch.testing.assert_close(clip[0, :, 0], expected[0])


# ---- Folders ----


def test_a_saved_folder_gives_the_same_bits_here_in_inference_and_as_custom_pipeline(
    tmp_path, world, latents, command, monkeypatch
):
    folder = tmp_path / "saved"
    load(world).save_pretrained(folder)
    reloaded = HiARPipeline.from_pretrained(folder, dtype=torch.float32)
    reloaded.save_pretrained(folder)  # over the files that hold its own weights
    assert torch.equal(latents_of(reloaded), latents)
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
    )
    assert torch.equal(latents_of(HiARPipeline.from_pretrained(folder, dtype=torch.float32)), latents)

    words = ("--config_path", world.config, "--output_folder", tmp_path / "videos", "--seed", 3, "--save_latents")
    result = command(*words, "--prompt", PROMPT, f"model.base={folder}", "model.generator=")
    assert result.code == 0, result.err
    written = load_file(tmp_path / f"videos/{PROMPT}-0.safetensors")["latents"]
    assert torch.equal(latents[0].transpose(0, 1), written)

    teacher = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    assert type(teacher.transformer) is WanTransformer3DModel
    assert torch.equal(latents_of(HiARPipeline.from_pipe(teacher, settings=SETTINGS)), latents)

    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "cache")
    custom = DiffusionPipeline.from_pretrained(
        folder,
        custom_pipeline=str(ROOT / "pipeline/diffusers_pipeline.py"),
        trust_remote_code=True,
        dtype=torch.float32,
    )
    assert type(custom).__module__ == "diffusers_modules.local.diffusers_pipeline"
    assert torch.equal(latents_of(custom), latents)


@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
def test_configurations_and_checkpoints_are_loaded(tmp_path, world, latents):
    assert torch.equal(latents_of(HiARPipeline.from_yaml(str(world.config))), latents)
    weights = load_file(world.model / "generator/diffusion_pytorch_model.safetensors")
    save_weights(tmp_path / "model.pt", {"generator": weights})
    from_file = HiARPipeline.from_pretrained(
        world.model, transformer=tmp_path / "model.pt", settings=SETTINGS, dtype=torch.float32
    )
    assert torch.equal(latents_of(from_file), latents)
    other = HiARPipeline.from_pretrained(world.model, settings=SETTINGS, dtype=torch.float32)
    assert not torch.equal(latents_of(other), latents)  # the folder's own transformer
    assert weights["proj_out.weight"].dtype == torch.bfloat16  # a network without a dtype would have that of the file
    for dtype in (torch.float32, {"transformer": torch.float32, "default": torch.bfloat16}, {"default": torch.float32}):
        pipe = HiARPipeline.from_pretrained(world.model, transformer=tmp_path / "model.pt", torch_dtype=dtype)
        assert pipe.transformer.dtype == torch.float32


def test_the_shipped_model_index_is_read(monkeypatch):
    index = json.loads((ROOT / "data/shapes-wan/model_index.json").read_text())
    pipe = HiARPipeline.from_pretrained(ROOT / "data/shapes-wan", dtype=torch.bfloat16)
    saved = json.loads(pipe.to_json_string())
    assert {name: saved[name] for name in index if not name.startswith("_")} == {
        name: value for name, value in index.items() if not name.startswith("_")
    }
    assert pipe.dtype == pipe.transformer.dtype == torch.bfloat16


# ---- Callbacks ----


@pytest.mark.parametrize("schedule", ["timestep_first", "block_first"])
def test_latents_of_a_callback_replace_those_of_the_block(world, schedule):
    pipe = load(world, **{"rollout.schedule": schedule, "rollout.use_ode_trajectory": True})
    seen: dict[tuple[int, int], torch.Tensor] = {}
    timesteps = []

    def record(pipe, step, timestep, kwargs):
        seen[pipe.current_block, step] = kwargs["latents"].clone()
        timesteps.append(timestep.item())

    result = latents_of(pipe, seed=1, callback_on_step_end=record)
    blocks_and_steps = [(block, step) for block in range(3) for step in range(pipe.num_timesteps)]
    assert sorted(seen) == blocks_and_steps and max(timesteps) == 1000
    by_step = sorted(blocks_and_steps, key=lambda key: key[1])
    assert list(seen) == (by_step if schedule == "timestep_first" else blocks_and_steps)
    assert torch.equal(torch.cat([seen[block, 3] for block in range(3)], dim=2), result)

    # The steps are deterministic. With the latents after step 0 replaced, another seed gives the same video.
    def replace(pipe, step, timestep, kwargs):
        return {"latents": seen[pipe.current_block, 0]} if step == 0 else kwargs

    assert torch.equal(latents_of(pipe, seed=2, callback_on_step_end=replace), result)

    def finish(pipe, step, timestep, kwargs):
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else {}

    assert not latents_of(pipe, seed=1, callback_on_step_end=finish).any()


@pytest.mark.parametrize(("schedule", "frames"), [("timestep_first", 9), ("block_first", 6)])
def test_an_interrupt_returns_the_frames_so_far(world, schedule, frames):
    pipe = load(world, **{"rollout.schedule": schedule})
    calls = []

    def stop(pipe, step, timestep, kwargs):
        calls.append(kwargs["latents"])
        pipe._interrupt = len(calls) == 6

    result = latents_of(pipe, callback_on_step_end=stop)
    assert len(calls) == 6 and result.shape[2] == frames
    assert torch.equal(result[:, :, -3:], calls[5]) and torch.equal(result[:, :, :3], calls[3])
    assert latents_of(pipe).shape[2] == 9  # an interrupt ends one call
    calls.clear()
    image = Image.new("RGB", (32, 32))  # one latent frame; it is not an unfinished block
    continued = latents_of(pipe, image=image, num_frames=25, callback_on_step_end=stop)
    assert continued.shape[2] == 7 and torch.equal(continued[:, :, -3:], calls[5])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda latents: {"prompt_embeds": latents}, r"'latents' only, not \['prompt_embeds'\]"),
        (lambda latents: latents, "'latents' only, not Tensor"),
        (
            lambda latents: {"latents": latents[:, :, :1]},
            r"returned latents \[1, 16, 1, 4, 4\], not \[1, 16, 3, 4, 4\]",
        ),
        (lambda latents: {"latents": None}, "returned latents NoneType"),
        (lambda latents: {"latents": latents / 0}, "NaN or infinity in latent frames 0 to 8"),
    ],
    ids=["name", "tensor", "shape", "none", "nan"],
)
def test_wrong_results_of_a_callback_are_errors(pipe, returned, message):
    def callback(pipe, step, timestep, kwargs):
        return returned(kwargs["latents"])

    with pytest.raises(ValueError, match=message):
        latents_of(pipe, callback_on_step_end=callback)


# ---- LoRA ----


@pytest.fixture
def lora(tmp_path, pipe):
    """A LoRA for one layer, under Wan's own names."""
    weight = pipe.transformer.get_submodule("blocks.0.attn1.to_q").weight
    generator = torch.Generator().manual_seed(0)
    factors = {
        "blocks.0.self_attn.q.lora_A.weight": torch.randn(4, weight.shape[1], generator=generator),
        "blocks.0.self_attn.q.lora_B.weight": torch.randn(weight.shape[0], 4, generator=generator),
    }
    save_file(factors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_a_lora_is_loaded_scaled_fused_and_unloaded(tmp_path, world, latents, lora):
    fused = load(world)
    fuse_lora(fused.transformer, str(lora), scale=0.5)
    expected = latents_of(fused)
    pipe = load(world)
    pipe.load_lora_weights(lora, adapter_name="one")
    assert pipe.get_active_adapters() == ["one"]
    torch.testing.assert_close(latents_of(pipe, attention_kwargs={"scale": 0.5}), expected)
    full = latents_of(pipe)  # the scale of a call ends with it
    assert not torch.allclose(full, expected)
    pipe.set_adapters("one", 0.5)
    torch.testing.assert_close(latents_of(pipe), expected)
    with pytest.raises(ValueError, match=r"a LoRA is loaded: call unload_lora_weights\(\)"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), latents)
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    torch.testing.assert_close(latents_of(pipe), expected)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        latents_of(HiARPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float32)), latents_of(pipe)
    )


def test_other_loras_are_refused(tmp_path, pipe):
    save_file({"blocks.9.self_attn.q.lora_A.weight": torch.ones(1, 1)}, tmp_path / "deep.safetensors")
    for file, message in (("deep.safetensors", r"no layer blocks\.9"), ("none.safetensors", "no such file")):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(tmp_path / file)


# ---- Offload ----


def test_offload_loads_each_network_before_its_use(world, latents, monkeypatch):
    """No test machine needs a GPU: accelerate's hooks move the networks to the CPU, and the test records the calls."""
    pipe = load(world)
    networks = {getattr(pipe, name): name for name in ("text_encoder", "transformer", "vae")}
    events: list[str] = []

    def record(event: str, name: str) -> None:
        if not events or events[-1] != f"{event} {name}":
            events.append(f"{event} {name}")

    pre_forward = CpuOffload.pre_forward

    def recording(hook, module, *args, **kwargs):
        record("load", networks[module])
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", recording)
    pipe.text_encoder.encoder.register_forward_hook(lambda *_: record("use", "text_encoder"))
    pipe.transformer.patch_embedding.register_forward_hook(lambda *_: record("use", "transformer"))
    pipe.vae.encoder.register_forward_hook(lambda *_: record("use", "vae"))

    def decoding(*args):
        record("use", "vae")
        return decode_piece(*args)

    monkeypatch.setattr("model.vae.decode_piece", decoding)
    pipe.enable_model_cpu_offload(device="cpu")
    in_order = [f"{event} {name}" for name in networks.values() for event in ("load", "use")]
    pipe(PROMPT, seed=3, num_frames=9)
    assert events == in_order
    previous = {networks[m]: m._hf_hook.prev_module_hook for m in networks}  # moved away when the network is loaded
    assert networks[previous["transformer"].model] == "text_encoder"
    assert networks[previous["vae"].model] == "transformer"
    events.clear()
    pipe(PROMPT, image=Image.new("RGB", (32, 32)), num_frames=13, seed=3)
    assert events == ["load vae", "use vae", *in_order]
    assert torch.equal(latents_of(pipe), latents)
    for unsupported in (pipe.enable_sequential_cpu_offload, pipe.enable_group_offload):
        with pytest.raises(ValueError, match="call enable_model_cpu_offload"):
            unsupported()


def test_the_progress_bar_counts_the_ops(pipe, text_to_video, capsys):
    pipe.set_progress_bar_config(mininterval=0, ascii=True)
    latents_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    assert f"{text_to_video.num_ops()}/{text_to_video.num_ops()}" in capsys.readouterr().err


# ---- Wrong arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt must be a string or a list"),
        ({"prompt": []}, "prompt must be a string or a list"),
        ({"num_frames": 30}, "num_frames=30 is not 4n.1; the nearest: 29 or 33"),
        ({"num_frames": 0}, "num_frames=0 is not 4n.1; the nearest: 1 or 5"),
        ({"num_frames": 37}, "num_frames=37 does not fill .* the nearest: 33 or 45"),
        ({"num_frames": 5, "video": np.zeros((5, 32, 32, 3), np.uint8)}, "after a prefix of 5 .* nearest: 17 or 29"),
        ({"height": 40}, "height 40 is not a multiple of 16"),
        ({"seed": 1, "generator": torch.Generator()}, "generator or seed, not both"),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 videos"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be at least 1"),
        ({"image": "none.png"}, "none.png: there is no such file"),
        ({"image": np.zeros((4, 4))}, "image must be a path, PIL images or a uint8 array"),
        ({"image": [], "prompt": "x"}, "0 images for 1 prompts"),
        ({"image": "a.png", "video": "b.mp4"}, "image or video, not both"),
        ({"output_type": "mp4"}, "output_type must be one of np, pil, pt, latent"),
        ({"negative_prompt": "blurry"}, "negative_prompt has no effect without guidance"),
        ({"guidance_scale": float("inf")}, "rollout.guidance_scale"),
        ({"num_inference_steps": 50}, "num_inference_steps=50, but the generator is distilled to 4 steps"),
        ({"attention_kwargs": {"scale": 0.5}}, "scale of a LoRA, but none is loaded"),
        ({"attention_kwargs": {"mask": 1}}, r"only 'scale', not \['mask'\]"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"only 'latents', not \['noise'\]"),
        ({"max_sequence_length": 0}, "model.text_length"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_value_errors_of_one_line(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(**{"prompt": PROMPT} | arguments)
    assert "\n" not in str(error.value)


def test_wrong_settings_and_components_are_value_errors(world, pipe):
    components = pipe.components
    for settings, message in (
        ({"rollout.windw": 3}, "no setting 'rollout.windw'"),
        ({"model.base": "x"}, "no setting 'model.base'"),
        ({"video.source": "x.mp4"}, "no video-to-video"),
        ({"rollout.window": "many"}, "rollout.window"),
    ):
        with pytest.raises(ValueError, match=message):
            HiARPipeline(**components, settings=settings)
    with pytest.raises(ValueError, match="must be a CausalWanModel or WanTransformer3DModel, not Linear"):
        HiARPipeline(**components | {"transformer": torch.nn.Linear(1, 1)})
    other = HiARPipeline(**components, settings=SETTINGS)
    other.scheduler = type(other.scheduler)()
    with pytest.raises(ValueError, match="the scheduler has no effect"):
        other(PROMPT)
    folder = os.fspath(world.folder / "none")
    with pytest.raises(ValueError, match="does not exist"):
        HiARPipeline.from_pretrained(folder, transformer=world.model / "generator")
