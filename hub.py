"""The Hugging Face Hub: short names of the released models, and fetching what they
need.

    folder = fetch("stereo-small")  # the Hub's cache of two files

A short name comes before a folder of that name, which is `./small`. Of a short name
exactly audiocraft's two files are fetched; of another repository these, or where it has
none transformers' layout. Stands alone.
"""

import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

AUDIOCRAFT_FILES = ("state_dict.bin", "compression_state_dict.bin")
MODELS = {
    name: f"facebook/musicgen-{name}"
    for name in (
        "small",
        "medium",
        "large",
        "stereo-small",
        "stereo-medium",
        "stereo-large",
        "melody",
        "melody-large",
        "stereo-melody",
        "stereo-melody-large",
        "style",
    )
} | {"tiny": str(Path(__file__).with_name("tiny"))}


def check_name(name: str) -> None:
    """Raise ValueError for what is no short name, Hub id or local folder."""
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not os.path.exists(name)
    if not (name in MODELS or local(name) or hub_id):
        raise ValueError(
            f"model must be one of {', '.join(MODELS)}, a Hub id or a local folder, "
            f"got '{name:.200}'."
        )


def local(name: str) -> Path | None:
    """The folder that a name means here; None for one of the Hub. `tiny` is the folder
    beside this file, never one of the current directory: that is `./tiny`."""
    if name == "tiny":
        return Path(MODELS[name])
    is_folder = name not in MODELS and name != "" and os.path.isdir(name)
    return Path(name) if is_folder else None


def follows(name: str) -> str | None:
    """What a released model follows besides the text, "melody" or "style"; "" for
    nothing; None where it is not known without its files."""
    names = [n for n, repo in MODELS.items() if name in (n, repo)]
    if not names or local(name) and name != "tiny":
        return None
    return next((kind for kind in ("melody", "style") if kind in names[0]), "")


def same_model(name: str, other: str) -> bool:
    """Whether both are one model: a short name and its Hub id, or spellings of one
    folder."""
    folders = [local(n) for n in (name, other)]
    if all(folders):
        return folders[0].resolve() == folders[1].resolve()
    return MODELS.get(name, name) == MODELS.get(other, other)


def fetch(name: str) -> Path:
    """The Hub's cache of what a model needs, by short name or Hub id. Raises ValueError
    for what is neither, OSError where the Hub does not give it."""
    check_name(name)
    repo = MODELS.get(name, name)
    try:
        try:
            paths = [hf_hub_download(repo, file) for file in AUDIOCRAFT_FILES]
            return Path(paths[0]).parent
        except EntryNotFoundError:
            if name in MODELS:
                raise
            return fetch_transformers(repo)
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise OSError(
            f"The Hub did not give {repo}: {error} To work offline, take --model tiny "
            f"or a local folder with {' and '.join(AUDIOCRAFT_FILES)}, T5 in t5-base/ "
            "and, for stereo, the codec in encodec_32khz/; or one that convert.py wrote."
        ) from error


def fetch_transformers(repo: str) -> Path:
    common = ["config.json", "spiece.model", "preprocessor_config.json"]
    files = ["model*.safetensors", "model.safetensors.index.json"]
    folder = Path(snapshot_download(repo, allow_patterns=common + files))
    if not any(folder.glob("model*.safetensors")):
        snapshot_download(repo, allow_patterns=common + ["pytorch_model*"])
    return folder
