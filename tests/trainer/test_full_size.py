"""HiAR's published configuration at its real size: on the meta device, and for one real iteration at full width."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_model import TEXT_ENCODER, VAE, write_config, write_model_index
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

import train
from model import presets
from model.causal_wan import CausalWanModel
from trainer.datasets.ode_pairs import pair_file, write_ode_pair, write_sigmas
from trainer.networks import export_transformer
from trainer.objectives.score_distillation import ScoreDistillation
from trainer.planner import dit_sizes
from trainer.sharding import full_tensor
from trainer.trainer import Trainer
from utils.config import load_config

ROOT = Path(train.__file__).parent


def test_the_nets_of_the_published_configuration_exist_on_the_meta_device():
    nets = {net.name: net for net in dit_sizes(load_config(str(ROOT / "configs/hiar.yaml")))}
    assert nets["generator"].num_parameters == nets["critic"].num_parameters == 1_418_996_800
    assert nets["teacher"].num_parameters == 14_288_491_584
    with torch.device("meta"):
        net = CausalWanModel(**presets.TRANSFORMERS["wan-1.3b"]).to(torch.bfloat16)
        cache = net.new_cache(1, 60, 104, context_frames=18, block_frames=3)
        assert cache.num_bytes == 2 * 30 * 21 * 1560 * 1536 * 2
        x = torch.empty(1, 16, 3, 60, 104)
        text = torch.empty(1, 512, 4096)
        assert net.denoise_block(x, torch.empty(1, 3), text, cache).shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_one_iteration_at_full_width_in_bfloat16(tmp_path, sharding):
    """Two of thirty layers and small pictures; HiAR's own optimizer, guidance, forward KL and mixed precision."""
    model = tmp_path / "model"
    write_model_index(model)
    torch.manual_seed(0)
    AutoencoderKLWan(**VAE).save_pretrained(model / "vae")
    UMT5EncoderModel(UMT5Config(**TEXT_ENCODER | {"d_model": 64})).save_pretrained(model / "text_encoder")
    ByT5Tokenizer().save_pretrained(model / "tokenizer")
    net = CausalWanModel(**presets.TRANSFORMERS["wan-1.3b"] | {"num_layers": 2, "text_dim": 64})
    export_transformer(net, model / "transformer", net.state_dict())
    (tmp_path / "pairs").mkdir()
    write_ode_pair(pair_file(tmp_path / "pairs", 0), "a red circle", torch.randn(2, 6, 16, 4, 4))
    write_sigmas(tmp_path / "pairs", [1.0, 0.96])

    published = load_config(str(ROOT / "configs/hiar.yaml"))
    sections = {"train": vars(published.train), "distill": vars(published.distill)}
    sections["train"] |= {
        "init": str(model / "transformer"),
        "total_batch_size": 1,
        "max_iterations": 1,
        "wandb": "off",
    }
    sections["train"] |= {"sharding": sharding}
    sections["distill"] |= {"max_rollout_frames": 6, "min_exit_step": 3}
    data = {"path": str(tmp_path / "pairs"), "num_frames": 6}
    config = load_config(str(write_config(tmp_path / "config.yaml", model, data=data, **sections)))
    objective = ScoreDistillation(config, torch.device("cpu"))
    before = {name: full_tensor(p.detach()).clone() for name, p in objective.generator.named_parameters()}
    trainer = Trainer(config, objective, str(tmp_path / "run"))
    metrics = trainer.step()
    assert metrics["dmd_output_gradient"] > 0 and metrics["forward_kl_output_gradient"] > 0 and metrics["critic"] > 0
    moved = [
        name
        for name, p in objective.generator.named_parameters()
        if not torch.equal(full_tensor(p.detach()), before[name])
    ]
    # Steps of 2e-6: float32 masters keep them, which bfloat16 weights would round away.
    assert all(p.dtype == torch.float32 for p in objective.generator.parameters())
    assert len(moved) > 0.9 * len(before)
