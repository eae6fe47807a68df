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
MOST = dict(hidden=4096, depth=12, growth=64, max_channels=10**6)  # of sizes
MOST |= dict(kernel=256, stride=256, norm_groups=4096, res_blocks=16, codec_dim=4096)
SCHEDULE = dict(beta_t0=(1e-9, 0.99), beta_t1=(1e-9, 0.99), beta_exp=(0.01, 1000))
SCHEDULE |= dict(clip=(0, 1e6), noise_scale=(1e-3, 1e3))  # least and most of numbers
SUMS = ("counts", "sum_x", "sum_x2", "sum_target_x2")  # of a processor
MOST_BANDS, MOST_POWER = 64, 100
LINK = re.compile(r"\$\{ *(\.*)([\w-]+(?:\.[\w-]+)*) *\}")
PROCESSOR = "multi_band_processor"
MOST_LINKS = 20  # from one setting to the next
RECOMMENDED = "max_recommended_working_set_size"  # of a Mac, in bytes
ROOM = 2  # times the weights must fit into what memory is left, for all to be kept


class Parts(NamedTuple):
    """What a file holds of a band, in numbers of Python and MLX."""

    sizes: dict[str, Any]  # of the UNet
    schedule: dict[str, Any]
    processor: tuple[mx.array, mx.array] | None  # means and gains (n,) of its bands
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
        except ValueError as error:
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
    if not (type(n_bands) is int and 1 <= n_bands <= MOST_BANDS):
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
        here = "" if name in FILES else ", and there is no such file or folder"
        raise OSError(
            f"The Hub did not give the decoder {repo:.80}{here}: {why}. To work offline, "
            f"name its file {file}."
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
    if not isinstance(part, dict):
        raise ValueError("there is no such band.")
    settings = part.get("cfg")
    for name, value in FIXED.items():
        if (found := setting(settings, name)) != value:
            raise ValueError(f"{name} must be {value!r}, got {found!r:.40}.")
    processor = read_processor(part, settings)
    sizes, schedule = read_sizes(settings), read_schedule(settings)
    return Parts(sizes, schedule, processor, weights_of(part))


def read_schedule(settings: dict[str, Any]) -> dict[str, float | None]:
    """The schedule, which has a thousand steps. Raises ValueError for such as cannot be."""
    schedule = {name: setting(settings, f"schedule.{name}") for name in SCHEDULE}
    for name, value in schedule.items():
        if not is_number(value, *SCHEDULE[name]) and (name, value) != ("clip", None):
            least, most = SCHEDULE[name]
            raise ValueError(
                f"schedule.{name} must be a number from {least:g} to {most:g}, got "
                f"{value!r:.40}."
            )
    return schedule


def is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most


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
    """Means and gains that turn a band back; None where the settings use none. Raises
    ValueError where they cannot."""
    use = setting(settings, "processor.use")
    if type(use) is not bool:
        raise ValueError(f"processor.use must be true or false, got {use!r:.40}.")
    if not use:
        return None
    if (kind := setting(settings, "processor.name")) != PROCESSOR:
        raise ValueError(f"processor.name must be {PROCESSOR}, got {kind!r:.40}.")
    state, n_bands = tensors(part, "processor_state"), read_bands(settings)
    if lacking := [name for name in SUMS if name not in state]:
        raise ValueError(f"processor_state must have {lacking[0]}.")
    for name in SUMS:
        shape = state[name].shape
        if shape != (n_bands,) and (name, shape) != ("counts", (1,)):
            raise ValueError(
                f"processor_state must have {n_bands} bands, got {name} of {shape}."
            )
    counts, sum_x, sum_x2, sum_target = (state[name] for name in SUMS)
    mean, power = sum_x / counts, read_power(settings, n_bands)
    spread = mx.sqrt(mx.maximum(sum_x2 / counts - mean**2, 0))
    target = sum_target / counts  # a power: audiocraft takes no root of it
    gain = (spread / target) ** power
    if not mx.isfinite(mean + gain).all():
        raise ValueError("processor_state must give finite means and gains.")
    return mean, gain


def read_bands(settings: dict[str, Any]) -> int:
    """Of a processor. Raises ValueError for a number that cannot be."""
    n_bands = setting(settings, "processor.n_bands")
    if not (type(n_bands) is int and 1 <= n_bands <= MOST_BANDS):
        raise ValueError(
            f"processor.n_bands must be from 1 to {MOST_BANDS}, got {n_bands!r:.40}."
        )
    return n_bands


def read_power(settings: dict[str, Any], n_bands: int) -> mx.array:
    """One exponent for all bands of a processor, or one for each. Raises ValueError for
    what is neither."""
    power = setting(settings, "processor.power_std")
    each = power if isinstance(power, list) else [power]
    fits = len(each) in (1, n_bands)
    if not fits or not all(is_number(one, -MOST_POWER, MOST_POWER) for one in each):
        raise ValueError(
            f"processor.power_std must be a number, or {n_bands}, got {power!r:.40}."
        )
    return mx.array(each, mx.float32)


def tensors(part: dict[str, Any], name: str) -> dict[str, mx.array]:
    """Some of a band's. Raises ValueError where there are none by names."""
    found = part.get(name)
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, mx.array)
        for key, value in found.items()
    ):
        raise ValueError(f"its {name} must map names to tensors.")
    return found


def weights_of(part: dict[str, Any]) -> dict[str, mx.array]:
    """torch's weights as MLX has them."""
    weights = {}
    for name, weight in tensors(part, "model_state").items():
        if name == "conv_codec.weight" and weight.shape[2:] == (1,):  # of one tap
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
