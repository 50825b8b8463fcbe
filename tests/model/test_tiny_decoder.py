"""model/tiny_decoder.py: a decoder with TAEHV's architecture and names.

Claims: the network computes TAEHV's layers, written out here frame by frame; decoding block by block equals decoding at
once; files with TAEHV's names load, as .pth and .safetensors, with an encoder and unused rows; other files are refused.
`model.decoder` selects the decoder, and the VAE still encodes.
"""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from model.tiny_decoder import TinyDecoder, TinyNetwork, load_tiny_decoder
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.build import load_vae
from shapes import world
from tests.tiny_model import VAE
from utils.config_loading import load_config
from utils.errors import UserError

WIDTHS = [12, 8, 8, 4]


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(AutoencoderKLWan(**VAE))


@pytest.fixture(scope="module")
def network() -> TinyNetwork:
    torch.manual_seed(1)
    return TinyNetwork(16, WIDTHS)


def contiguous(network: TinyNetwork) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in network.state_dict().items()}


def latents(frames: int, batch: int = 1) -> Tensor:
    return 2 * torch.randn(batch, frames, 16, 4, 4, generator=torch.Generator().manual_seed(2))


def taehv_frames(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Run TAEHV's decoder on one video [F, C, h, w], layer by layer and frame by frame, from its state dict."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = state[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, state.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    frames = [conv((frame[None] / 3).tanh() * 3, "1").relu() for frame in x]
    for start, factor in (3, 1), (9, 2), (15, 2):
        for block in range(start, start + 3):
            before = [torch.zeros_like(frames[0]), *frames[:-1]]
            for i, (y, past) in enumerate(zip(frames, before, strict=True)):
                inner = conv(conv(torch.cat([y, past], 1), f"{block}.conv.0").relu(), f"{block}.conv.2").relu()
                frames[i] = (conv(inner, f"{block}.conv.4") + y).relu()
        frames = [y.repeat_interleave(2, 2).repeat_interleave(2, 3) for y in frames]
        frames = [part for y in frames for part in conv(y, f"{start + 4}.conv").chunk(factor, 1)]
        frames = [conv(y, f"{start + 5}") for y in frames]
    return [conv(y.relu(), "22").clamp(0, 1) for y in frames]


@torch.no_grad()
def test_the_network_equals_taehvs_layers(network):
    x = latents(3)
    expected = torch.cat(taehv_frames(network.state_dict(), x[0]))[3:]  # TAEHV trims the first three frames
    pixels = TinyDecoder(network).decode(x)[0]
    assert pixels.shape == (9, 3, 32, 32) and expected.std() > 0.01
    torch.testing.assert_close(pixels, 2 * expected - 1, atol=1e-5, rtol=1e-5)


def test_streaming_equals_decoding_whole_and_streams_are_independent(network):
    decoder, x = TinyDecoder(network), latents(4, batch=2)
    whole, stream, other = decoder.decode(x), decoder.stream(keep=5), decoder.stream()
    pieces = []
    for piece in x.split([1, 2, 1], dim=1):
        pieces.append(stream.push(piece))
        other.push(-piece)
    assert torch.equal(torch.cat(pieces, dim=1), whole) and torch.equal(stream.latest, whole[:, -5:])


def test_patches_enlarge_the_pixels():
    decoder = TinyDecoder(TinyNetwork(4, WIDTHS, patch=2))
    assert decoder.spatial_stride == 16 and decoder.decode(torch.zeros(1, 2, 4, 2, 3)).shape == (1, 5, 3, 32, 48)


def test_files_in_taehvs_layout_load(network, vae, tmp_path):
    state = contiguous(network)
    state["decoder.7.conv.weight"] = torch.cat([torch.full((12, 12, 1, 1), 9.0), state["decoder.7.conv.weight"]])
    state["encoder.0.weight"] = torch.zeros(4, 3, 3, 3)
    torch.save(OrderedDict(state), tmp_path / "taew2_1.pth")
    save_file(dict(state), tmp_path / "taew2_1.safetensors")
    x = latents(2)
    for name in "taew2_1.pth", "taew2_1.safetensors":
        assert torch.equal(load_tiny_decoder(tmp_path / name, vae).decode(x), TinyDecoder(network).decode(x))
    half = load_tiny_decoder(tmp_path / "taew2_1.pth", vae, torch.bfloat16)
    assert half.net.decoder[1].weight.dtype == torch.bfloat16 and half.decode(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.8.weight"), "no tiny decoder .decoder.8.weight is missing.; choose"),
        (lambda s: s.pop("decoder.4.conv.2.bias"), "1 missing .decoder.4.conv.2.bias"),
        (lambda s: s.update({"decoder.1.weight": torch.zeros(3)}), r"decoder.1.weight is \[3\]"),
        (lambda s: s["decoder.22.bias"].fill_(float("nan")), "decoder.22.bias holds NaN"),
        (
            lambda s: s.update({"decoder.1.weight": torch.zeros(12, 48, 3, 3)}),
            "48 latent channels, but the model has 16",
        ),
    ],
)
def test_other_weights_are_refused(network, vae, tmp_path, change, message):
    state = {name: value.clone() for name, value in network.state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as refused:
        load_tiny_decoder(tmp_path / "weights.pth", vae)
    assert "\n" not in str(refused.value)


def test_files_that_hold_no_weights_are_refused(vae, tmp_path):
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    torch.save(print, tmp_path / "code.pth")
    for name, message in (
        ("no.pth", "do not exist"),
        ("cut.pth", "cut off or not"),
        ("code.pth", "is refused|not a check"),
    ):
        with pytest.raises(UserError, match=message):
            load_tiny_decoder(tmp_path / name, vae)


def test_model_decoder_selects_the_decoder_and_the_vae_still_encodes(network, vae, tmp_path):
    save_file(contiguous(network), tmp_path / "tiny.safetensors")
    keys = ["model.base=data/shapes-wan", "model.dtype=float32", "model.decoder=tiny"]
    config = load_config("configs/shapes.yaml", [*keys, f"model.tiny_decoder={tmp_path / 'tiny.safetensors'}"])
    loaded, x = load_vae(config, torch.device("cpu")), latents(2)
    assert torch.equal(loaded.decode(x), TinyDecoder(network).decode(x))
    assert torch.equal(loaded.stream().push(x), loaded.decode(x)) and loaded.encode(loaded.decode(x)).shape == x.shape


def test_the_tiny_decoder_needs_weights():
    with pytest.raises(UserError, match=r"model\.decoder=tiny needs its weights: set model.tiny_decoder"):
        load_config("configs/shapes.yaml", ["model.decoder=tiny"])


def test_the_shipped_tiny_decoder_decodes_the_miniatures_latents():
    vae = WanVAE(ModelDirectory.open("data/shapes-wan").load_vae(torch.float32))
    clip = world.to_pixels(world.render(world.sample_clip(9, 0, held_out=True), 9)).transpose(0, 1)[None]
    latents = vae.encode(clip)
    decoded = load_tiny_decoder("data/shapes-wan/tiny_decoder", vae, torch.float32).decode(latents)
    error, spread = (decoded - vae.decode(latents)).square().mean(), clip.var()
    assert error < 0.15 * spread
