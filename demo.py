"""Live video in the browser: type prompts while the video runs, and watch the blocks pass through the schedule.

python demo.py --config_path configs/shapes.yaml --port 7860

Then open http://127.0.0.1:7860. docs/live.md describes the page and the protocol behind it.
"""

import argparse
import sys

from live.settings import Settings, check_packages
from utils.config_loading import load_config
from utils.errors import UserError, command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML under configs/")
    parser.add_argument("--checkpoint_path", help="weights of the generator; default: the config's model.generator")
    parser.add_argument("--use_ema", action="store_true", help="use the checkpoint's generator_ema")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu; default: the config's runtime.device")
    parser.add_argument("--data_path", metavar="FILE", help="example prompts of the page; default: the model's world")
    parser.add_argument("--host", default=Settings.host, help="address; any but 127.0.0.1 needs --token")
    parser.add_argument("--port", type=int, default=Settings.port)
    parser.add_argument("--token", default="", help="secret that clients must send: letters, digits, - and _")
    parser.add_argument("--session_minutes", type=float, default=10.0, help="a session ends then if others wait")
    parser.add_argument("--output_folder", default=Settings.folder, help="folder for videos to download")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration; keys: docs/config.md"
    )
    return parser.parse_intermixed_args()


@command
def main() -> None:
    args = parse_arguments()
    if args.token:  # the metadata of videos holds the command
        sys.argv = [word.replace(args.token, "...") for word in sys.argv]
    seconds = 60 * args.session_minutes
    settings = Settings(args.host, args.port, args.token, seconds, folder=args.output_folder)
    settings.check()
    settings.check_port()
    check_packages()
    flags = {"model.generator": args.checkpoint_path, "runtime.device": args.device, "model.use_ema": args.use_ema}
    overrides = [f"{key}={value}" for key, value in flags.items() if value]
    config = load_config(args.config_path, overrides + args.overrides)
    if config.rollout.schedule == "bidirectional":
        raise UserError("rollout.schedule=bidirectional makes whole videos; live video needs a causal generator")

    # Import heavy modules after the arguments are checked, so that errors appear at once.
    from live.pipeline_engine import PipelineEngine, example_prompts
    from live.server import serve
    from pipeline import TextToVideo
    from utils.files import writable_folder

    writable_folder(settings.folder)
    examples = example_prompts(config.model.base, args.data_path)
    serve(PipelineEngine(TextToVideo.load(config), examples), settings)


if __name__ == "__main__":
    main()
