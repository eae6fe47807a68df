"""The Hugging Face Hub: short names of the released models, and fetching what they
need.

    folder = fetch("stereo-small")  # the Hub's cache of two files

A short name comes before a folder of that name, which is `./small`. Of a short name
exactly audiocraft's two files are fetched; of another repository these, or what its
training left, or where it has none transformers' layout. Without a network the cache is
read at once, for huggingface_hub tries for half a minute. Stands alone. Only what asks
the Hub or its cache imports that library: a model in a folder need not wait for it.
"""

import difflib
import json
import os
import re
import socket
import time
from errno import ENOENT
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.parse import urlsplit

AUDIOCRAFT_FILES = ("state_dict.bin", "compression_state_dict.bin")
TRAINING_FILE = "checkpoint.th"  # of audiocraft, in place of the first
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
}
MAGNETS = [f"magnet-{size}-{s}secs" for s in (10, 30) for size in ("small", "medium")]
MAGNETS += ["audio-magnet-small", "audio-magnet-medium"]
MODELS |= {name: f"facebook/{name}" for name in ("audiogen-medium", *MAGNETS)}
BESIDE = ("tiny", "tiny-magnet")  # folders beside this file
MODELS |= {name: str(Path(__file__).with_name(name)) for name in BESIDE}
SIZES = {"small": (24, 1024), "medium": (48, 1536), "large": (48, 2048)}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LOOK = 2.5  # seconds that the Hub's server has to answer


def check_name(name: str) -> None:
    """Raise ValueError for what is no short name, Hub id or local folder."""
    if re.match(r"[.~/]|.*/(.*/|$)", name) and not local(name):
        if os.path.exists(os.path.expanduser(name)):
            raise ValueError(f"{name:.200} is no folder.")
        raise ValueError(f"There is no folder {name:.200}.")
    hub_id = HUB_ID.fullmatch(name) and not os.path.exists(name)
    if not (name in MODELS or local(name) or hub_id):
        raise ValueError(
            f"model must be one of {', '.join(MODELS)}, a Hub id or a local folder, "
            f"got '{name:.200}'.{suggestion(name)}"
        )


def suggestion(name: str) -> str:
    """A question for a short name that is misspelt; else ""."""
    word = name.lower().rpartition("/")[2].removeprefix("musicgen-")[:40]
    near = difflib.get_close_matches(word, MODELS, 1)
    return f" Did you mean {near[0]}?" if near else ""


def local(name: str) -> Path | None:
    """The folder that a name means here; None for one of the Hub. `tiny` is the folder
    beside this file, never one of the current directory: that is `./tiny`."""
    if name in BESIDE:
        return Path(MODELS[name])
    path = os.path.expanduser(name)
    is_folder = name not in MODELS and name != "" and os.path.isdir(path)
    return Path(path) if is_folder else None


def follows(name: str) -> str | None:
    """What a released model follows besides the text, "melody" or "style"; "" for
    nothing; None where it is not known without its files."""
    names = [n for n, repo in MODELS.items() if name in (n, repo)]
    if not names or local(name) and name not in BESIDE:
        return None
    return next((kind for kind in ("melody", "style") if kind in names[0]), "")


def shape_of(name: str) -> dict[str, int | str] | None:
    """Sizes of a released model, and what it follows; None of another one."""
    names = [n for n, repo in MODELS.items() if name in (n, repo)]
    if not names or names[0] in BESIDE:
        return None
    stereo = "stereo" in names[0]
    size = next((word for word in SIZES if word in names[0]), "medium")
    layers, width = SIZES[size]
    return {
        "layers": layers,
        "width": width,
        "codebooks": 8 if stereo else 4,
        "channels": 2 if stereo else 1,
        "sampling_rate": 16000 if "audio" in names[0] else 32000,
        "follows": follows(names[0]),
    }


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
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    check_name(name)
    repo, reason = MODELS.get(name, name), no_network()
    options = dict(local_files_only=bool(reason))
    try:
        try:
            paths = [hf_hub_download(repo, f, **options) for f in AUDIOCRAFT_FILES]
            return Path(paths[0]).parent
        except EntryNotFoundError as error:
            if name in MODELS or failed(error, reason):
                raise
        if folder := fetch_training(repo, reason, **options):
            return folder
        return fetch_transformers(repo, **options)
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        why = explain(error, repo, reason, AUDIOCRAFT_FILES)
        here = "" if name in MODELS else ", and there is no such folder"
        raise OSError(
            f"The Hub did not give the model {repo:.80}{here}: {why}. To work offline, "
            "take --model tiny or a folder that convert.py wrote."
        ) from error


def failed(error: Exception, reason: str) -> bool:
    """Whether the connection failed, and not the search for a file, on the Hub or, where
    there is a `reason` not to ask it, in the cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return isinstance(error, LocalEntryNotFoundError) and not reason


def fetch_training(repo: str, reason: str, **options) -> Path | None:
    """The folder of what audiocraft's training left: its checkpoint, and the codec,
    which its settings may name instead. None for a repository that has none, or has
    transformers' layout, too."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch_file(name: str) -> str | None:
        try:
            return hf_hub_download(repo, name, **options)
        except EntryNotFoundError as error:
            if failed(error, reason):
                raise
            return None

    if fetch_file("config.json") or not (path := fetch_file(TRAINING_FILE)):
        return None
    fetch_file(AUDIOCRAFT_FILES[1])
    return Path(path).parent


def fetch_transformers(repo: str, **options) -> Path:
    from huggingface_hub import snapshot_download

    common = ["config.json", "spiece.model", "tokenizer.json"]
    common += ["preprocessor_config.json", "processor_config.json"]
    common += ["adapter_config.json"]  # of PEFT: what has only that is told of
    files = ["model*.safetensors", "model.safetensors.index.json"]
    folder = Path(snapshot_download(repo, allow_patterns=common + files, **options))
    if not any(folder.glob("model*.safetensors")):
        weights = ["pytorch_model*"]
        snapshot_download(repo, allow_patterns=common + weights, **options)
    if options.get("local_files_only") and (names := absent(folder)):
        raise FileNotFoundError(ENOENT, "not in the cache", ", ".join(names))
    return folder


def read_small(path: Path, most: int = 2**26) -> str:
    """The text of a file. Raises ValueError for one that memory might not hold."""
    if path.stat().st_size > most:
        raise ValueError(f"{path} must be at most {most >> 20} MB.")
    return path.read_text()


def absent(folder: Path) -> list[str]:
    """What a folder of the cache lacks of transformers' layout. Half a download looks
    whole to huggingface_hub, which does not know what was wanted."""
    names = {"config.json"}
    if not (folder / "tokenizer.json").is_file():
        names.add("spiece.model")
    indices = sorted(folder.glob("*.index.json"), reverse=True)
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not (folder / "model.safetensors").is_file() and indices:
        try:
            names |= {*json.loads(read_small(indices[-1]))["weight_map"].values()}
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            pass  # whoever reads it says so
    elif not weights:
        names.add("model.safetensors")
    return sorted(str(name) for name in names if not (folder / str(name)).is_file())


def explain(
    error: Exception, repo: str, reason: str = "", files: tuple[str, ...] = ()
) -> str:
    """Why the Hub did not give `files` of a repository, without the full stop.

    `reason` is that of `no_network`. What is gated, missing, refused or out of reach is
    told apart, each with the way out.
    """
    from huggingface_hub import constants, errors

    local_only = isinstance(error, errors.LocalEntryNotFoundError)
    if local_only and isinstance(error.__cause__, errors.HfHubHTTPError) and not reason:
        error, local_only = error.__cause__, False  # the Hub has answered
    status = getattr(getattr(error, "response", None), "status_code", None)
    code = f"HTTP {status}" if status else "no access"
    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, OSError) and reason:
        text = in_part(repo, reason, files, error)
    elif local_only:
        text = (
            "the connection failed, and it is not in the cache. Connect, and try again"
        )
    elif isinstance(error, errors.GatedRepoError):
        text = f"it is gated ({code}). Ask for access at {page}, and set HF_TOKEN to a "
        text += "token of that account"
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"there is none of this name, or it is private ({code}). Compare with "
        text += f"{page}; for a private one set HF_TOKEN"
    elif isinstance(error, errors.EntryNotFoundError) and status:
        name = re.search(r"/resolve/[^/\s]+/([^\s?]+?)\.?(\s|$)", str(error))
        text = f"it has no {name[1] if name else 'such file'} ({code})"
    elif isinstance(error, errors.HfHubHTTPError) and status in (401, 403):
        text = f"it refused the token ({code}). Correct HF_TOKEN, or unset it"
    elif isinstance(error, errors.HfHubHTTPError) and status:
        text = f"it answered with {code}. Try again later"
    else:
        text = str(error)
    return text.rstrip(". \n")


def in_part(repo: str, reason: str, files: tuple[str, ...], error: OSError) -> str:
    """The reason, which names what is missing where the rest is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    there = [f for f in files if isinstance(try_to_load_from_cache(repo, f), str)]
    missing = ", ".join(f for f in files if f not in there) if there else ""
    if error.errno == ENOENT and error.filename and not there:
        missing = str(error.filename)
    if not missing:
        return reason
    return reason.replace(
        "it is not in the cache", f"only a part is in the cache, without {missing:.120}"
    )


def no_network() -> str:
    """Why only the Hub's cache can be read, as a sentence; "" where the Hub is asked.

    It is asked where its server answers within LOOK seconds, and unseen where a proxy
    stands between, or the environment sets HF_HUB_OFFLINE to 0.
    """
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and it is not in the cache."
    url = urlsplit(constants.ENDPOINT)
    if os.environ.get("HF_HUB_OFFLINE") or getproxies().keys() & {url.scheme, "all"}:
        return ""
    port = url.port or {"http": 80}.get(url.scheme, 443)
    if not url.hostname or answers(url.hostname, port, int(time.monotonic() // 10)):
        return ""
    return (
        f"there is no network ({url.hostname} does not answer), and it is not in the "
        "cache. Connect, and try again; where the network is slow, set HF_HUB_OFFLINE=0."
    )


@lru_cache(1)
def answers(host: str, port: int, now: int) -> bool:
    """Whether a server takes a connection by IPv4 or IPv6. One look serves the parts
    of a model: `now` counts ten seconds."""
    found: SimpleQueue = SimpleQueue()

    def look(family: int) -> None:
        found.put(connects(family, host, port))

    for family in (
        socket.AF_INET,
        socket.AF_INET6,
    ):  # the lookup of a name has no limit
        Thread(target=look, args=(family,), daemon=True).start()
    end = time.monotonic() + LOOK
    try:
        return any(found.get(timeout=max(0, end - time.monotonic())) for _ in range(2))
    except Empty:
        return False


def connects(family: int, host: str, port: int) -> bool:
    try:
        found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
        for *kind, _, address in found:
            with socket.socket(*kind) as connection:
                connection.settimeout(LOOK)
                if not connection.connect_ex(address):
                    return True
    except (OSError, ValueError):  # the name is not found, or none
        pass
    return False
