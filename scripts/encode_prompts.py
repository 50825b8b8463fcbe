"""Encode the prompts of a file before training, so that no GPU needs to hold the text encoder.

python scripts/encode_prompts.py --config_path configs/hiar.yaml --data_path prompts.txt model.text_cache=prompt_cache

Train with the same model.text_cache, or with a copy of it on another machine. Existing embeddings are kept, so the same
command resumes. Under torchrun the ranks divide the prompts among themselves. On a machine without a GPU,
--dtype bfloat16 writes the embeddings that training on GPUs reads.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from trainer.datasets.captions import load_caption_cache
from utils.config_loading import load_config
from utils.device import DTYPES, pick_device
from utils.distributed import rank, world_size
from utils.errors import UserError, command
from utils.files import writable_folder
from utils.locks import lock_output
from utils.prompts import read_prompts


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML that sets model.base")
    parser.add_argument("--data_path", required=True, help="prompts, one per line")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: the dtype of training on this device")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    config = load_config(args.config_path, args.overrides)
    if not config.model.text_cache:
        raise UserError("choose a folder for the embeddings: model.text_cache=FOLDER")
    texts = [prompt.text for prompt in read_prompts(args.data_path)]
    # Guidance needs the negative prompt, and training with text dropout needs the empty prompt.
    own_texts = list(dict.fromkeys(["", config.teacher.negative_prompt, *texts]))[rank() :: world_size()]
    dtype = DTYPES[args.dtype] if args.dtype else None
    with lock_output(writable_folder(config.model.text_cache), "encoding prompts in"):
        cache = load_caption_cache(config, pick_device(config.runtime.device, config.runtime.threads), dtype)
        for text in tqdm(own_texts, unit="prompt", disable=rank() > 0):
            cache.store([text])


if __name__ == "__main__":
    main()
