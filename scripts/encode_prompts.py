"""Encode the prompts of a file ahead of training, so that no GPU has to hold the text encoder.

python scripts/encode_prompts.py --config_path configs/hiar.yaml --data_path prompts.txt model.text_cache=prompt_cache

Training finds the embeddings when it is given the same model.text_cache, or a copy of it on another machine. Those that
are there are kept, so the same command goes on where it stopped; under torchrun the prompts are shared out. Without a
GPU, --dtype bfloat16 makes those that training on GPUs takes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from trainer.datasets.captions import load_caption_cache
from utils.config import load_config
from utils.device import DTYPES, pick_device
from utils.distributed import rank, world_size
from utils.errors import UserError, command
from utils.prompts import read_prompts


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML that names model.base and model.text_cache")
    parser.add_argument("--data_path", required=True, help="prompts, one per line")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: what training takes on this kind of device")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    config = load_config(args.config_path, args.overrides)
    if not config.model.text_cache:
        raise UserError("say where the embeddings go: model.text_cache=FOLDER")
    texts = [prompt.text for prompt in read_prompts(args.data_path)]
    # Guidance needs the negative prompt, training with dropped captions the empty one.
    wanted = list(dict.fromkeys(["", config.teacher.negative_prompt, *texts]))[rank() :: world_size()]
    dtype = DTYPES[args.dtype] if args.dtype else None
    cache = load_caption_cache(config, pick_device(config.runtime.device), dtype)
    for text in tqdm(wanted, unit="prompt", disable=rank() > 0):
        cache.store([text])


if __name__ == "__main__":
    main()
