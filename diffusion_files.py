"""The published files of multi-band diffusion -> what diffusion.py makes its bands of.

    files = open_files("musicgen")  # or a file, a folder, a Hub id
    band = files.read(0, build)  # build(Parts) -> a band

A file of audiocraft holds the settings and weights of each band. Sizes, schedule and
processors are what its settings say; one that is missing is an error. Only the band that
is asked for is read. Needs torch_file.py and hub.py beside it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from hub import explain, local, no_network
from torch_file import load_torch

REPO, FILES = "facebook/multiband-diffusion", {"musicgen": "mbd_musicgen_32khz.th"}
SUFFIXES = (".th", ".pt")
FIXED = {  # what is not ported, by where it stands
    "schedule.repartition": "power",
    "schedule.n_bands": None,
    "schedule.num_steps": 1000,
    "channels": 1,
    "diffusion_unet.bilstm": False,
    "diffusion_unet.transformer": False,
    "diffusion_unet.cross_attention": False,
}
MOST = dict(
    hidden=4096, depth=12, growth=64, max_channels=10**6, kernel=256, stride=256
)
MOST |= dict(norm_groups=4096, res_blocks=16, codec_dim=4096)  # of sizes
SCHEDULE = ("beta_t0", "beta_t1", "beta_exp", "num_steps", "clip", "noise_scale")
LINK = re.compile(r"\$\{ *(\.*)([\w-]+(?:\.[\w-]+)*) *\}")
PROCESSOR = "multi_band_processor"
MOST_LINKS = 20  # from one setting to the next
RECOMMENDED = "max_recommended_working_set_size"  # of a Mac, in bytes
ROOM = 2  # times the weights must fit into what memory is left, for all to be kept


class Parts(NamedTuple):
    """What a file holds of a band, in numbers of Python and MLX."""

    sizes: dict[str, Any]  # of the UNet
    schedule: dict[str, Any]
    processor: (
        tuple[mx.array, mx.array] | None
    )  # means and gains of its bands, (n,) each
    weights: dict[str, mx.array]  # float32, laid out as in MLX


class Files(NamedTuple):
    """A published file, and what all of its bands have in common."""

    path: Path
    sampling_rate: int
    n_bands: int

    def read(self, number: int, build: Callable[[Parts], Any]) -> Any:
        """What `build` makes of a band's parts. Raises ValueError naming the file, and
        what is missing, not ported or does not fit."""
        part = load_torch(self.path, keys=(number,)).get(number)
        try:
            return build(read_parts(part))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            told = f"{self.path!s:.150}, band {number}: {error}"
            raise ValueError(" ".join(told.split())[:390]) from error


def open_files(path_or_repo: str | Path) -> Files:
    """Find the file, and read what is common. Raises as `from_pretrained`."""
    path = find(str(path_or_repo))
    head = load_torch(path, keys=("sample_rate", "n_bands"))
    rate, n_bands = (
        head.get(name) if isinstance(head, dict) else None
        for name in ("sample_rate", "n_bands")
    )
    if not (type(rate) is int and 1000 <= rate <= 10**6):
        raise ValueError(f"{path!s:.150} must have a sample_rate, got {rate!r:.40}.")
    if not (type(n_bands) is int and 1 <= n_bands <= 64):
        raise ValueError(f"{path!s:.150} must have n_bands, got {n_bands!r:.40}.")
    return Files(path, rate, n_bands)


def find(name: str) -> Path:
    """The file of a name. Raises as `find_in` for a folder, OSError where the Hub does
    not give it."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if (folder := local(name)) is not None:
        return find_in(folder)
    from huggingface_hub import hf_hub_download

    repo, reason = REPO if name in FILES else name, no_network()
    file = FILES.get(name, FILES["musicgen"])
    try:
        return Path(hf_hub_download(repo, file, local_files_only=bool(reason)))
    except (OSError, ValueError) as error:
        why = explain(error, repo, reason, (file,))
        raise OSError(
            f"The Hub did not give the decoder {repo:.80}: {why}. To work offline, name "
            f"its file {file}."
        ) from error


def find_in(folder: Path) -> Path:
    """The file in a folder: MusicGen's where there are several, as Meta's are. Raises
    FileNotFoundError for none, ValueError where it is not clear which."""
    found = [p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES]
    if not found:
        wanted = " or ".join(SUFFIXES)
        raise FileNotFoundError(f"{folder!s:.150} holds no {wanted} file.")
    ours = [p for p in found if p.name == FILES["musicgen"]] or found
    if len(ours) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(
            f"{folder!s:.150} must hold one file, has {names:.150}: name one."
        )
    return ours[0]


def fits(files: Files, dtype: mx.Dtype) -> bool:
    """Whether memory holds all bands at once, beside what is there."""
    weights = files.path.stat().st_size * dtype.size // 4  # which are float32 there
    limit = mx.get_memory_limit()
    limit = min(limit, mx.device_info().get(RECOMMENDED, limit))
    return ROOM * weights < limit - mx.get_active_memory()


def read_parts(part: dict[str, Any]) -> Parts:
    """The parts of a band, from its settings and states."""
    settings = part["cfg"]
    for name, value in FIXED.items():
        if (found := setting(settings, name)) != value:
            raise ValueError(f"{name} must be {value!r}, got {found!r:.40}.")
    schedule = {name: setting(settings, f"schedule.{name}") for name in SCHEDULE}
    for name, value in schedule.items():
        if type(value) not in (int, float) and (name, value) != ("clip", None):
            raise ValueError(f"schedule.{name} must be a number, got {value!r:.40}.")
    processor = read_processor(part, settings)
    return Parts(read_sizes(settings), schedule, processor, weights_of(part))


def read_sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a UNet. Raises ValueError for such as cannot be."""
    sizes = {name: setting(settings, f"diffusion_unet.{name}") for name in MOST}
    for name, value in sizes.items():
        whole = type(value) is int or name == "growth" and type(value) is float
        if not (whole and 1 <= value <= MOST[name]):
            raise ValueError(
                f"diffusion_unet.{name} must be from 1 to {MOST[name]}, got {value!r:.40}."
            )
    kernel, stride = sizes["kernel"], sizes["stride"]
    if kernel % stride or (kernel - stride) % 2:
        raise ValueError(
            f"diffusion_unet.kernel must be a multiple of its stride {stride}, and differ "
            f"by an even number, got {kernel}."
        )
    everywhere = setting(settings, "diffusion_unet.emb_all_layers")
    if type(everywhere) is not bool:
        raise ValueError("diffusion_unet.emb_all_layers must be true or false.")
    return sizes | dict(emb_all_layers=everywhere)


def read_processor(
    part: dict[str, Any], settings: dict[str, Any]
) -> tuple[mx.array, mx.array] | None:
    """Means and gains that turn a band back; None where the settings use none."""
    use = setting(settings, "processor.use")
    if type(use) is not bool:
        raise ValueError(f"processor.use must be true or false, got {use!r:.40}.")
    if not use:
        return None
    if (kind := setting(settings, "processor.name")) != PROCESSOR:
        raise ValueError(f"processor.name must be {PROCESSOR}, got {kind!r:.40}.")
    state, n_bands = part["processor_state"], setting(settings, "processor.n_bands")
    counts = state["counts"]
    mean, power = state["sum_x"] / counts, setting(settings, "processor.power_std")
    powers = power if isinstance(power, list) else [power] * len(mean)
    if mean.shape != (n_bands,):
        raise ValueError(
            f"processor_state must have {n_bands} bands, got {mean.shape}."
        )
    if len(powers) != n_bands or any(type(p) not in (int, float) for p in powers):
        raise ValueError(
            f"processor.power_std must be a number, or {n_bands} of them, got {power!r:.40}."
        )
    spread = mx.sqrt(mx.maximum(state["sum_x2"] / counts - mean**2, 0))
    target = state["sum_target_x2"] / counts  # a power: audiocraft takes no root of it
    return mean, (spread / target) ** mx.array(powers)


def weights_of(part: dict[str, Any]) -> dict[str, mx.array]:
    """torch's weights as MLX has them."""
    weights = {}
    for name, weight in part["model_state"].items():
        if name == "conv_codec.weight" and weight.ndim == 3:  # of one tap
            weight = weight.squeeze(2)
        elif weight.ndim == 3:  # of convolutions: (out, in, k), transposed (in, out, k)
            order = (2, 0, 1) if "convtr" in name else (2, 1, 0)
            weight = weight.transpose(order)
        weights[name] = weight.astype(mx.float32)
    return weights


def setting(cfg: dict[str, Any], name: str) -> Any:
    """A setting by its dotted name. What refers to another one is that: `${a.b}` from the
    top, `${.b}` beside it, `${..b}` a level up, also on the way to the name. Raises
    ValueError for one that is missing, or refers to itself."""
    words = name.split(".")
    for _ in range(MOST_LINKS):
        value: Any = cfg
        for i, word in enumerate(words, 1):
            if not isinstance(value, dict) or word not in value:
                raise ValueError(f"its settings must have {'.'.join(words):.80}.")
            value = value[word]
            if link := LINK.fullmatch(value) if isinstance(value, str) else None:
                above = words[: max(i - len(link[1]), 0)] if link[1] else []
                words = above + link[2].split(".") + words[i:]
                break
        else:
            return value
    raise ValueError(f"its setting {name:.80} refers to itself.")
