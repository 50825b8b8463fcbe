"""HiAR's published configuration at its real size: on the meta device, and one real iteration at full width."""

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
from utils.config_loading import load_config

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """A model whose DiT has one of the 1.3B model's 30 layers, at full width; the other parts are tiny."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    write_model_index(folder)
    torch.manual_seed(0)
    AutoencoderKLWan(**VAE).save_pretrained(folder / "vae")
    UMT5EncoderModel(UMT5Config(**TEXT_ENCODER | {"d_model": 64})).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    net = CausalWanModel(**presets.TRANSFORMERS["wan-1.3b"] | {"num_layers": 1, "text_dim": 64})
    export_transformer(net, folder / "transformer", net.state_dict())
    return folder


def test_the_networks_of_the_published_configuration_on_the_meta_device():
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
def test_one_iteration_at_full_width_in_bfloat16(tmp_path, wide_model, sharding):
    """HiAR's optimizer, guidance, forward KL and mixed precision on small pictures."""
    write_ode_pair(pair_file(tmp_path, 0), "a red circle", torch.randn(2, 6, 16, 4, 4))
    write_sigmas(tmp_path, [1.0, 0.96])
    published = load_config(str(ROOT / "configs/hiar.yaml"))
    train = vars(published.train) | {"init": str(wide_model / "transformer"), "total_batch_size": 1, "wandb": "off"}
    train |= {"max_iterations": 1, "sharding": sharding}
    distill = vars(published.distill) | {"max_rollout_frames": 6, "min_exit_step": 3}
    data = {"path": str(tmp_path), "num_frames": 6}
    file = write_config(tmp_path / "config.yaml", wide_model, data=data, train=train, distill=distill)
    config = load_config(str(file))
    objective = ScoreDistillation(config, torch.device("cpu"))
    before = {name: full_tensor(p.detach()).clone() for name, p in objective.generator.named_parameters()}
    metrics = Trainer(config, objective, str(tmp_path / "run")).step()
    assert metrics["dmd_output_gradient"] > 0 and metrics["forward_kl_output_gradient"] > 0 and metrics["critic"] > 0
    after = {name: full_tensor(p.detach()) for name, p in objective.generator.named_parameters()}
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    # The steps are 2e-6: float32 weights keep them, bfloat16 weights would round them away.
    assert all(p.dtype == torch.float32 for p in objective.generator.parameters())
    assert len(changed) > 0.9 * len(before)
