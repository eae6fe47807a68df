"""Convert published MusicGen checkpoints to a folder of this project's own.

    python convert.py --hf-path facebook/musicgen-stereo-large --mlx-path DIR

The folder holds `config.json`, `model.safetensors` and `spiece.model`: decoder, T5
encoder and codec together, in our names and layouts, ready to be loaded by
`magnet.load(DIR)` or uploaded. Needs musicgen.py, magnet.py and what these need,
published.py and what that needs, hub.py, outputs.py, messages.py, quantize.py,
strict.py, and engine.py to quantize, adapters.py for adapters.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import os
import re
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

import magnet
from hub import BESIDE, MODELS, check_name
from messages import Forgiving, one_line
from musicgen import MusicGen
from outputs import is_there, leave_nothing, named_path, reason_in, whole_folder
from quantize import add_flags, complete, quantize_model
from strict import small_text

FILES = ("config.json", "model.safetensors", "spiece.model")
CARD = """---
library_name: mlx
license: {license}
pipeline_tag: text-to-audio
{base_model}tags:
- mlx
- musicgen
---

# {name}

{source} converted to MLX, decoder in {dtype}.

```
python generate.py --model {name} --prompt "happy rock"
```

{rights}
"""


def convert(
    source: str,
    target: Path,
    dtype: mx.Dtype,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    adapter: str | Path | list[str | Path] | None = None,
    adapter_scale: float | list[float] = 1.0,
    q_mode: str | None = None,
) -> None:
    """Write the model `source` (short name, Hub id or folder) to `target`.

    `q_bits` or `q_mode` quantizes the decoder's layers, with a scale for `q_group_size`
    weights; what is None is the mode's own, see quantize.py. An `adapter` of `train.py
    lora` or PEFT is worked in, `adapter_scale` times, or several are.

    Raises FileExistsError when `target` is there already. What is written
    appears under its name only when it is whole.
    """
    target = Path(os.path.expanduser(target))
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists already; choose another folder.")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"The folder {target.parent} must exist.")
    with whole_folder(target) as folder:
        options = dict(lazy=True, adapter=adapter, adapter_scale=adapter_scale)
        if adapter is None:
            options |= dict(q_bits=q_bits, q_group_size=q_group_size, q_mode=q_mode)
        model = magnet.load(source, dtype, **options)
        if adapter is not None and model.config.quantization:
            raise ValueError(
                f"An adapter cannot be worked into {source}, which is quantized; take "
                "the model that it was made from."
            )
        if adapter is not None:
            quantize_model(model, q_bits, q_group_size, q_mode)  # with the change in it
        try:
            save(model, folder)
        except (OSError, RuntimeError) as error:
            why = reason_in(folder, error)
            raise OSError(f"{target} could not be written: {why}") from error


def save(model: MusicGen, folder: Path) -> None:
    """Write a MusicGen into `folder`: weights, config.json, spiece.model."""
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(
        str(folder / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    dtype = str(model.decoder.dtype).removeprefix("mlx.core.")
    config = {"model_type": "musicgen", "decoder_dtype": dtype} | asdict(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if model.tokenizer is not None:
        (folder / "spiece.model").write_bytes(model.tokenizer.serialized())


def save_model(model: MusicGen, folder: Path) -> None:
    """Write a model that was trained here in float16, as `save` does. Each file replaces
    an older one only when it is whole."""
    half = type(model)(model.config, model.tokenizer)
    half.update(model.parameters())
    half.set_dtype(mx.float16)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        save(half, Path(part))
        for path in Path(part).iterdir():
            path.replace(folder / path.name)


def is_converted(folder: Path) -> bool:
    """Whether `folder` is one that `convert` wrote."""
    try:
        folder = Path(os.path.expanduser(folder))
        config = json.loads(small_text(folder / "config.json"))
    except (OSError, RecursionError, ValueError):
        return False
    return isinstance(config, dict) and "decoder_dtype" in config


def model_card(folder: Path, repo: str, source: str) -> str:
    """The README of `repo`, for a folder converted from `source`."""
    dtype = json.loads((folder / "config.json").read_text())["decoder_dtype"]
    source = MODELS.get(source, source)
    if os.path.exists(
        os.path.expanduser(source)
    ):  # a folder of this machine means nothing elsewhere
        base, link = "", "MusicGen"
    else:
        base = f"base_model: {source}\n"
        link = f"[{source}](https://huggingface.co/{source})"
    license, rights = "cc-by-nc-4.0", "The weights are Meta's, under CC-BY-NC 4.0."
    if source in [MODELS[name] for name in BESIDE]:
        license, rights = "mit", "A toy, trained from nothing by this project."
    told = dict(base_model=base, source=link, name=repo, dtype=dtype)
    return CARD.format(**told, license=license, rights=rights)


def upload(folder: Path, repo: str, source: str) -> None:
    """Publish a converted folder on the Hub, with a model card: its README.md, which is
    made where none is there.

    Raises OSError when the Hub does not take it.
    """
    from huggingface_hub import HfApi

    folder = Path(os.path.expanduser(folder))
    card = folder / "README.md"
    if is_there(card):
        print(f"{card} is there already and is uploaded as it is")
    else:
        card.write_text(model_card(folder, repo, source))
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # the network's, the Hub's or the disk's
        why = str(error).rstrip(". \n")
        raise OSError(
            f"The Hub did not take {repo}: {why}. {folder} is whole: the same "
            "command uploads it."
        ) from error
    print(f"Uploaded to https://huggingface.co/{repo}")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Convert MusicGen to MLX.")
    add = parser.add_argument
    add("--hf-path", required=True, help="Hub id, short name or folder to convert")
    folder = "folder to write; must not exist"
    add("--mlx-path", required=True, type=named_path, help=folder)
    add(
        "--dtype",
        default="float16",
        choices=["float16", "bfloat16", "float32"],
        help="of the decoder; T5 and codec stay float32 (default: %(default)s)",
    )
    add("-q", "--quantize", action="store_true", help="quantize the decoder's layers")
    add_flags(add)
    adapter = "file of train.py lora, PEFT's folder or Hub id to work in, or several"
    add("--adapter", type=named_path, action="append", help=adapter)
    scale = "how much (default: 1); of several once, or for each in turn"
    add("--adapter-scale", type=float, action="append", help=scale)
    add(
        "--upload-repo",
        help="Hub repository to publish to, such as mlx-community/NAME; where "
        "--mlx-path is converted already, it is uploaded as it is",
    )
    args = parser.parse_args()
    repo = args.upload_repo
    if repo is not None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        parser.error(f"--upload-repo must be OWNER/NAME, got '{repo}'")
    if (args.q_bits or args.q_group_size or args.q_mode) and not args.quantize:
        parser.error("--q-bits, --q-group-size and --q-mode need --quantize")
    if args.adapter_scale and not args.adapter:
        parser.error("--adapter-scale needs an --adapter")
    try:
        complete(args.q_bits, args.q_group_size, args.q_mode)
        check_name(args.hf_path)
    except ValueError as error:
        parser.error(str(error))
    return args


def run(args: argparse.Namespace) -> None:
    if args.upload_repo and is_converted(args.mlx_path):
        print(f"{args.mlx_path} is there already and is uploaded as it is")
    else:
        q_mode = (args.q_mode or "affine") if args.quantize else None
        sizes = (getattr(mx, args.dtype), args.q_bits, args.q_group_size)
        adapter = (args.adapter, args.adapter_scale or 1.0)
        convert(args.hf_path, args.mlx_path, *sizes, *adapter, q_mode)
        print(f"Wrote {args.mlx_path}")
    if args.upload_repo:
        upload(args.mlx_path, args.upload_repo, args.hf_path)


def warn(message: Warning | str, *_) -> None:
    print(f"convert.py: warning: {one_line(message)}", file=sys.stderr)


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leave_nothing()
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    args = parse_arguments()
    warnings.showwarning = warn
    os.environ["HF_HUB_VERBOSITY"] = "error"  # no retries; the end result is reported
    try:
        run(args)
    except (OSError, ValueError) as error:
        told = str(error).replace("as --model,", "as --hf-path,")  # of the loader
        sys.exit(f"convert.py: error: {one_line(told)}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
