"""model/vae.py: the Wan VAE on whole videos, on streams, and in one differentiable pass.

Claims: `encode_clip` and `decode_clip` equal diffusers' chunked encode and decode, and give every parameter a gradient.
Decoding block by block equals decoding at once, bit for bit, whatever fits into one call, and streams are independent.
Decoding equals diffusers' decode, in bfloat16 within 1 of 255, and compiled. Encoding normalises latents and decoding
denormalises them. Sizes that cannot be encoded are refused.
"""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from model import decoder as decoder_module
from model import presets, vae_stream
from model.vae import WanVAE, decode_clip, denormalise, encode_clip, normalise, use_channels_last_
from utils.errors import UserError

MEAN, STD = [0.1, -0.2, 0.3, 0.4], [1.5, 0.5, 2.0, 1.0]
PLAIN: dict[str, Any] = dict(
    base_dim=8,
    z_dim=4,
    dim_mult=[1, 2, 4],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    latents_mean=MEAN,
    latents_std=STD,
)
VARIANTS: dict[str, dict[str, Any]] = {
    # "plain": both stages halve time as well as space. "three stages": Wan's layout; the first stage halves only space.
    "plain": PLAIN | dict(scale_factor_spatial=4),
    "three stages": PLAIN
    | dict(dim_mult=[1, 1, 2, 2], temperal_downsample=[False, True, True], scale_factor_spatial=8, attn_scales=[]),
    # A smaller presets.VAES["shapes"].
    "patches": presets.VAES["shapes"] | PLAIN | dict(decoder_base_dim=12, in_channels=12, out_channels=12),
}
CLOSE = dict(atol=1e-5, rtol=1e-5)


def tiny_vae(variant: str) -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VARIANTS[variant])
    for name, parameter in vae.named_parameters():
        if "gamma" not in name and parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)  # biases start at zero, which would hide padding
    return vae


@pytest.fixture(scope="module", params=VARIANTS)
def vae(request) -> WanVAE:
    return WanVAE(tiny_vae(request.param))


@pytest.fixture
def plain() -> WanVAE:
    return WanVAE(tiny_vae("plain"))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_tensor(MEAN).view(1, 1, 4, 1, 1), like.new_tensor(STD).view(1, 1, 4, 1, 1)


# ---- one differentiable pass ----


@pytest.mark.parametrize("frames", [1, 9])
@torch.no_grad()
def test_encode_clip_equals_diffusers_encode(vae, frames):
    pixels = randn(2, 3, frames, 8, 16)
    mean, log_variance = encode_clip(vae.net, pixels)
    expected = vae.net.encode(pixels).latent_dist
    assert mean.shape[2] == (frames - 1) // 4 + 1 and mean.std() > 1e-3
    torch.testing.assert_close(mean, expected.mean, **CLOSE)
    torch.testing.assert_close(log_variance, expected.logvar, **CLOSE)


@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_decode_clip_equals_diffusers_decode(vae, frames):
    latents = randn(2, 4, frames, 2, 3)
    pixels = decode_clip(vae.net, latents)
    assert pixels.shape[2] == vae.num_pixel_frames(frames) and pixels.std() > 1e-3
    torch.testing.assert_close(pixels.clamp(-1, 1), vae.net.decode(latents).sample, **CLOSE)


def test_every_parameter_gets_a_gradient():
    vae = tiny_vae("patches")
    mean, log_variance = encode_clip(vae, randn(1, 3, 5, 16, 16))
    decoded = decode_clip(vae, mean)
    (decoded.square().mean() + log_variance.mean()).backward()
    without = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_the_log_variance_is_bounded():
    vae = tiny_vae("plain")
    with torch.no_grad():
        vae.quant_conv.bias[4:] = torch.tensor([-1000.0, 1000, 0, 0])
        log_variance = encode_clip(vae, randn(1, 3, 1, 16, 16))[1]
    assert log_variance.min() == -30 and log_variance.max() == 20


# ---- streaming ----


def test_streaming_equals_decoding_whole(vae):
    latents = randn(1, 4, 4, 2, 2)
    whole = vae.decode(latents)
    for cuts in ([2, 2], [1, 3], [1] * 4):
        stream = vae.stream()
        pieces = [stream.push(piece) for piece in latents.split(cuts, dim=1)]
        assert [piece.shape[1] for piece in pieces] == [4 * n - (3 if i == 0 else 0) for i, n in enumerate(cuts)]
        assert torch.equal(torch.cat(pieces, dim=1), whole), cuts


def test_streaming_equals_encoding_whole(vae):
    stride = vae.temporal_stride
    pixels = randn(1, 1 + 3 * stride, 3, 16, 16)
    whole = vae.encode(pixels)
    for cuts in ([1 + 3 * stride], [1, 3 * stride], [1 + stride, 2 * stride], [1, *[stride] * 3]):
        encoder, other = vae.stream_encoder(), vae.stream_encoder()
        pieces = []
        for piece in pixels.split(cuts, dim=1):
            pieces.append(encoder.push(piece))
            other.push(piece.flip(1))  # streams are independent
        assert torch.equal(torch.cat(pieces, dim=1), whole), cuts


def test_a_stream_of_pixels_consists_of_whole_latent_frames(plain):
    with pytest.raises(AssertionError, match="5 pixel frames"):
        encoder = plain.stream_encoder()
        encoder.push(randn(1, 1, 3, 16, 16))
        encoder.push(randn(1, 5, 3, 16, 16))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_equals_diffusers_decode_of_denormalised_latents(variant, batch):
    """The reference network runs diffusers' own convolutions and norms."""
    latents = randn(batch, 3, 4, 2, 2)
    mean, std = statistics(latents)
    with torch.no_grad():
        expected = tiny_vae(variant).decode((latents * std + mean).transpose(1, 2)).sample.transpose(1, 2)
    pixels = WanVAE(tiny_vae(variant)).decode(latents)
    assert pixels.shape[1] == 9 and pixels.dtype == torch.float32 and pixels.abs().max() <= 1
    torch.testing.assert_close(pixels, expected, **CLOSE)


def test_decoding_wan22s_residual_network_equals_diffusers_decode():
    torch.manual_seed(0)
    sizes = PLAIN | dict(is_residual=True, dim_mult=[1, 1, 1], decoder_base_dim=8, scale_factor_spatial=4)
    reference, latents = AutoencoderKLWan(**sizes), randn(1, 3, 4, 2, 2)
    mean, std = statistics(latents)
    with torch.no_grad():
        expected = reference.decode((latents * std + mean).transpose(1, 2)).sample.transpose(1, 2)
    stream = WanVAE(reference).stream()
    pixels = torch.cat([stream.push(latents[:, :1]), stream.push(latents[:, 1:])], dim=1)
    torch.testing.assert_close(pixels, expected, **CLOSE)


def test_a_call_decodes_few_latents_at_once(plain, monkeypatch):
    """Memory is bounded: a long video runs in several calls, with the same result."""
    latents, counts = randn(2, 5, 4, 2, 3), []
    whole, decode_piece = plain.decode(latents), plain.decode_piece

    def counted(piece, state):
        counts.append(piece.shape[1])
        return decode_piece(piece, state)

    plain.decode_piece = counted
    monkeypatch.setattr(decoder_module, "LATENTS_PER_CALL", 24)  # two frames of two videos
    assert torch.equal(plain.decode(latents), whole) and counts == [2, 2, 1]
    monkeypatch.setattr(plain, "max_frames", 1)
    assert torch.equal(plain.decode(latents), whole) and counts[3:] == [1] * 5


def test_decoding_in_bfloat16_equals_diffusers_decode_within_1_of_255():
    latents = randn(1, 5, 4, 4, 4).bfloat16().float()
    mean, std = statistics(latents)
    with torch.no_grad():
        raw = (latents * std + mean).bfloat16().transpose(1, 2)
        expected = tiny_vae("patches").bfloat16().decode(raw).sample.float().transpose(1, 2)
        exact = WanVAE(tiny_vae("patches")).decode(latents)
    pixels = WanVAE(tiny_vae("patches").bfloat16()).decode(latents)
    assert pixels.dtype == torch.float32 and exact.std() > 0.05
    difference, ours, theirs = pixels - expected, pixels - exact, expected - exact
    assert 127.5 * difference.square().mean().sqrt() < 1 and ours.square().mean() < theirs.square().mean()


@pytest.mark.slow
def test_the_compiled_decoder_has_no_graph_break_and_equals_the_decoder(plain):
    latents = randn(1, 3, 4, 2, 3)
    compiled = WanVAE(plain.net)
    compiled._decode_piece = torch.compile(vae_stream.decode_piece, backend="aot_eager", fullgraph=True)
    stream, expected = compiled.stream(), plain.stream()
    for piece in latents.split([2, 1], dim=1):
        torch.testing.assert_close(stream.push(piece), expected.push(piece), **CLOSE)


def test_a_later_push_copies_nothing_from_the_host(plain, monkeypatch):
    """On a GPU, a copy from the host would make the host wait for all queued work."""
    stream, piece = plain.stream(), randn(1, 1, 4, 2, 3)
    stream.push(piece)

    def refuse(*_, **__):
        raise AssertionError("a tensor was created on the host")

    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
        monkeypatch.setattr(owner, name, refuse)
    stream.push(piece)


def test_statistics_have_the_dtype_of_the_latents(plain):
    raw = randn(1, 4, 1, 2, 3)
    expected = normalise(plain.net, raw)
    assert normalise(plain.net, raw.double()).dtype == torch.float64
    assert denormalise(plain.net, raw.to("meta")).device.type == "meta"
    assert torch.equal(normalise(plain.net, raw), expected)


def test_streams_are_independent(plain):
    videos = [randn(1, 4, 4, 2, 3, seed=seed) for seed in (1, 2)]
    alone = [plain.decode(video) for video in videos]
    streams = [plain.stream(), plain.stream()]
    pieces: list[list[Tensor]] = [[], []]
    for half in range(2):
        for number in range(2):
            pieces[number].append(streams[number].push(videos[number][:, 2 * half : 2 * half + 2]))
        plain.encode(randn(1, 5, 3, 16, 16))  # uses the state that diffusers keeps on the network
        plain.net.decode(randn(1, 4, 2, 2, 3))
    for number in range(2):
        assert torch.equal(torch.cat(pieces[number], dim=1), alone[number])


def test_a_later_frame_depends_on_an_earlier_one(plain):
    """Without this dependence, the tests of streaming would prove nothing."""
    latents = randn(1, 2, 4, 2, 3)
    changed = torch.cat([-latents[:, :1], latents[:, 1:]], dim=1)
    assert not torch.allclose(plain.decode(latents)[:, 1:], plain.decode(changed)[:, 1:], atol=1e-3)


# ---- normalisation ----


def test_denormalise_undoes_normalise(plain):
    raw = randn(2, 4, 3, 2, 3)
    torch.testing.assert_close(denormalise(plain.net, normalise(plain.net, raw)), raw)
    assert not torch.allclose(normalise(plain.net, raw), raw, atol=0.1)


def test_encoding_normalises_the_mean(vae):
    pixels = randn(1, 5, 3, 16, 24).clamp(-1, 1)
    raw = vae.net.encode(pixels.transpose(1, 2)).latent_dist.mean.transpose(1, 2)
    mean, std = statistics(raw)
    latents = vae.encode(pixels)
    assert latents.dtype == torch.float32 and not latents.requires_grad
    torch.testing.assert_close(latents, (raw - mean) / std, **CLOSE)
    stride = vae.spatial_stride
    assert latents.shape == (1, 2, vae.channels, 16 // stride, 24 // stride)


@pytest.mark.parametrize(("frames", "height", "width"), [(4, 16, 16), (0, 16, 16), (5, 18, 16), (5, 16, 18)])
def test_sizes_that_cannot_be_encoded_are_refused(plain, frames, height, width):
    with pytest.raises(UserError, match=f"{frames} frames of {height}x{width}.*4n\\+1.*multiples of 4"):
        plain.encode(torch.zeros(1, frames, 3, height, width))


def test_the_wrapper_is_for_inference(plain):
    assert not plain.net.training and not any(p.requires_grad for p in plain.net.parameters())
    assert plain.temporal_stride == 4 and plain.num_pixel_frames(21) == 81
    assert plain.to("cpu") is plain


def test_channels_last_changes_the_layout_of_convolutions_and_no_value():
    net = nn.Sequential(nn.Conv3d(3, 4, 2), nn.Conv2d(3, 4, 2), nn.Linear(3, 4))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    use_channels_last_(net)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert net[1].weight.is_contiguous(memory_format=torch.channels_last)
