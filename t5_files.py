"""T5's published files -> settings, weights by our names, and a tokenizer's file.

They are `config.json`, `model.safetensors` and `spiece.model`, in a local folder or on
the Hub. Needs strict.py beside it; hub.py is needed to fetch them, and to see at once
that there is no network, limits.py to `load`, and outputs.py to print what
`python t5.py` does.

    settings, weights, spiece = read("google-t5/t5-base")
"""

import argparse
import json
import os
import sys
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open
from sentencepiece import SentencePieceProcessor

from strict import in_a_line, misfit, one_line, small_text

FILES = ("config.json", "model.safetensors", "spiece.model")

Weights = dict[str, mx.array]


@in_a_line
def read(path_or_repo: str | Path) -> tuple[dict, Weights, Path]:
    """A T5's settings, its encoder's weights in float32, and where its tokenizer lies.

    Raises ValueError or OSError naming the file and what is wrong with it.
    """
    config, path, spiece = locate(path_or_repo)
    try:
        settings = read_config(config)
        with safe_open(path, "numpy"):  # checks the header as mx.load does not
            return settings, sanitize(mx.load(str(path))), spiece
    except (RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"T5 in {path.parent} does not load: {error!s:.250}"
        ) from error


def load(t5: type, config_type: type, tokenizer_type: type, path_or_repo) -> tuple:
    """A `t5.T5` and a `t5.Tokenizer` of such files, which is what these types are.

    Raises as `read`, and ValueError naming a tensor that does not fit.
    """
    from limits import check_t5

    settings, weights, spiece = read(path_or_repo)
    tokenizer = tokenizer_type(spiece)
    try:
        config = config_type.from_dict(settings)
        check_t5(config)
        tokenizer.check(config)
        model = t5(config)
        model.load_weights(list(weights.items()))
        mx.eval(model.state)
    except (RuntimeError, TypeError, ValueError) as error:
        why = f"T5 in {spiece.parent} does not load: {misfit(error)}"
        raise ValueError(one_line(why)) from error
    return model, tokenizer


@in_a_line
def find_spiece(folder: Path, repo: str) -> Path:
    """The `spiece.model` of a whole model's folder. Where only `tokenizer.json` is
    there, as transformers 5 saves it, that of T5's `repo` serves: from the folder of
    that name in it, such as `t5-base/`, else from the Hub.

    Raises ValueError where the two have not the same pieces, OSError for none.
    """
    path, other = folder / "spiece.model", folder / "tokenizer.json"
    if path.is_file():
        return path
    if not other.is_file():
        raise FileNotFoundError(
            f"{folder} must hold spiece.model; take that of {repo}."
        )
    path = folder / repo.split("/")[-1] / "spiece.model"
    if not path.is_file():
        try:
            path = fetch(repo, path.name)[0]
        except OSError as error:
            raise OSError(
                f"{folder} has tokenizer.json alone, and the Hub did not give "
                f"spiece.model of {repo}: {error}. To work offline, put it into {path}."
            ) from error
    check_pieces(path, other)
    return path


def check_pieces(path: Path, other: Path) -> None:
    """Raise ValueError unless `tokenizer.json`, the `other`, begins with the pieces of a
    `spiece.model`."""
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} must be a SentencePiece model: {error}") from error
    try:
        vocabulary = json.loads(small_text(other))["model"]["vocab"]
        theirs = [piece for piece, _ in vocabulary[: pieces.vocab_size()]]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{other} is no tokenizer of T5's: {error!r:.80}") from error
    if theirs != [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]:
        raise ValueError(
            f"{other} has other pieces than {path}: put the spiece.model that it was "
            f"made from into {other.parent}."
        )


@in_a_line
def locate(path_or_repo: str | Path) -> list[Path]:
    """The three FILES: in a local folder, or from the Hub through its cache."""
    folder = Path(os.path.expanduser(path_or_repo))
    if not folder.is_dir():
        repo = str(path_or_repo)
        try:
            return fetch(repo, *FILES)
        except OSError as error:
            raise OSError(
                f"The Hub did not give T5, {repo}, and there is no such folder: {error}. "
                f"To work offline, name a folder with {', '.join(FILES)}."
            ) from error
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} must hold {', '.join(FILES)}, but {name} is missing."
            )
    return [folder / name for name in FILES]


def fetch(repo: str, *files: str) -> list[Path]:
    """Files of a repository, from the Hub through its cache. Raises OSError with the
    reason, which has no full stop."""
    from huggingface_hub import hf_hub_download

    reason = no_network(repo)
    options = dict(local_files_only=bool(reason))
    try:
        return [Path(hf_hub_download(repo, name, **options)) for name in files]
    except (OSError, ValueError) as error:
        why = str(isinstance(error, OSError) and reason or error)
        if Path(__file__).with_name("hub.py").is_file():
            from hub import explain

            why = explain(error, repo, reason, files)
        raise OSError(why.rstrip(". \n")) from error


def no_network(repo: str) -> str:
    """Why only the Hub's cache can be read, as a sentence; "" where the Hub is asked.

    Without hub.py it is asked for one file, once: to fetch one, huggingface_hub tries
    for half a minute.
    """
    if Path(__file__).with_name("hub.py").is_file():
        import hub

        return hub.no_network()

    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repo, FILES[0]))
    except errors.HfHubHTTPError:  # the Hub has answered
        return ""
    except Exception as error:  # of the library that huggingface_hub asks with
        return f"{error!s:.120}, and it is not in the cache."
    return ""


def read_config(path: Path) -> dict:
    """The settings in a `config.json`. Raises ValueError when it holds none."""
    try:
        config = json.loads(small_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} must hold an object, got {config!r:.40}")
    return config


def sanitize(weights: Weights) -> Weights:
    """Keep the encoder of a whole T5, in float32 (float16 overflows).

    Raises ValueError for a tensor that does not hold floats.
    """
    kept = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith(("decoder.", "lm_head."))
        and name != "encoder.embed_tokens.weight"  # the same as shared
    }
    for name, weight in kept.items():
        if not mx.issubdtype(weight.dtype, mx.floating):
            raise ValueError(f"{name:.150} must hold floats, but holds {weight.dtype}")
    return {name: weight.astype(mx.float32) for name, weight in kept.items()}


def main(encoder: type) -> None:
    """Print the ids of texts and the size of their states. `encoder`: the class."""
    from outputs import print_result

    parser = argparse.ArgumentParser(description="Encode texts with T5.")
    parser.add_argument("text", nargs="*", default=["happy rock", "calm piano"])
    parser.add_argument(
        "--model",
        default="google-t5/t5-base",
        help="a Hub id or a folder (default: %(default)s)",
    )
    args = parser.parse_args()
    try:
        model, tokenizer = encoder.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"t5.py: error: {one_line(error)}")
    ids = [tokenizer.encode(text) for text in args.text]
    states, _ = model.encode(ids)
    for text, row, state in zip(args.text, ids, states):
        print_result(f"{text!r}: {len(row)} tokens, states {state[: len(row)].shape}")
        print_result(f"  ids {row}")
