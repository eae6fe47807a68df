"""The published files of multi-band diffusion -> its bands.

    files = open_files("musicgen")  # or a file, a folder, a Hub id
    band = files.read(0)

A file of audiocraft holds the settings and weights of each band. Sizes, schedule and
processors are what its settings say; one that is missing is an error. Only the band that
is asked for is read. Needs diffusion.py, torch_file.py, strict.py and hub.py beside it,
with what these need.
"""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from diffusion import Band, Processor, Schedule, UNet, UNetConfig
from hub import local
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
MOST = dict(hidden=4096, depth=12, growth=64, max_channels=10**6, kernel=256, stride=256)
MOST |= dict(norm_groups=4096, res_blocks=16, codec_dim=4096)  # of sizes
LINK = re.compile(r"\$\{([\w.]+)\}")
ROOM = 2  # times the weights must fit into what memory is left, for all to be kept


class Files(NamedTuple):
    """A published file, and what all of its bands have in common."""

    path: Path
    sampling_rate: int
    n_bands: int

    def read(self, number: int, dtype: mx.Dtype = mx.float32) -> Band:
        """A band. Raises ValueError naming what is missing or not ported."""
        part = load_torch(self.path, keys=(number,)).get(number)
        try:
            return make_band(part, self.sampling_rate, dtype)
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
    """The file of a name. Raises FileNotFoundError for a folder without one, OSError
    where the Hub does not give it."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if (folder := local(name)) is not None:
        found = [p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES]
        if not found:
            raise FileNotFoundError(
                f"{name:.150} holds no {' or '.join(SUFFIXES)} file."
            )
        return found[0]
    from huggingface_hub import hf_hub_download

    repo = REPO if name in FILES else name
    try:
        return Path(hf_hub_download(repo, FILES.get(name, FILES["musicgen"])))
    except (OSError, ValueError) as error:
        raise OSError(
            f"The Hub did not give {repo:.80}: {error!s:.200} Name a file that is here."
        ) from error


def fits(files: Files, dtype: mx.Dtype) -> bool:
    """Whether memory holds all bands at once, beside what is there."""
    from engine import memory_size

    weights = files.path.stat().st_size * dtype.size // 4  # which are float32 there
    return ROOM * weights < memory_size() - mx.get_active_memory()


def make_band(part: dict[str, Any], sampling_rate: int, dtype: mx.Dtype) -> Band:
    """A band of its settings and weights."""
    settings = flat(part["cfg"])
    for name, value in FIXED.items():
        if (found := setting(settings, name)) != value:
            raise ValueError(f"{name} must be {value!r}, got {found!r:.40}.")
    unet = UNet(make_config(settings))
    load(unet, part["model_state"], dtype)
    schedule = {
        field.name: setting(settings, f"schedule.{field.name}")
        for field in fields(Schedule)
    }
    processor = make_processor(part, settings, sampling_rate)
    return Band(unet, Schedule(**schedule), processor)


def make_config(settings: dict[str, Any]) -> UNetConfig:
    """The sizes of a UNet. Raises ValueError for such as cannot be."""
    own = {field.name for field in fields(UNetConfig)} - {"channels", "num_steps"}
    sizes = {name: setting(settings, f"diffusion_unet.{name}") for name in own}
    for name, value in sizes.items():
        whole = type(value) is int or name == "growth" and type(value) is float
        if name != "emb_all_layers" and not (whole and 1 <= value <= MOST[name]):
            raise ValueError(
                f"diffusion_unet.{name} must be from 1 to {MOST[name]}, got {value!r:.40}."
            )
    if type(sizes["emb_all_layers"]) is not bool:
        raise ValueError("diffusion_unet.emb_all_layers must be true or false.")
    config = UNetConfig(**sizes)
    if config.kernel % config.stride or (config.kernel - config.stride) % 2:
        raise ValueError(
            f"diffusion_unet.kernel must be a multiple of its stride {config.stride}, and "
            f"even beside it, got {config.kernel}."
        )
    if any(width % config.norm_groups for width in config.widths[1:]):
        raise ValueError(
            f"diffusion_unet.norm_groups must divide {config.widths[1:]}, got "
            f"{config.norm_groups}."
        )
    return config


def make_processor(part: dict, settings: dict[str, Any], sampling_rate: int):
    """What turns a band back, which is nothing where the settings use none."""
    if not setting(settings, "processor.use"):
        return lambda x: x
    state = part["processor_state"]
    counts = state["counts"]
    mean, power = state["sum_x"] / counts, setting(settings, "processor.power_std")
    spread = mx.sqrt(mx.maximum(state["sum_x2"] / counts - mean**2, 0))
    target = state["sum_target_x2"] / counts  # a power: audiocraft takes no root of it
    return Processor(sampling_rate, mean, (spread / target) ** mx.array(power))


def load(unet: UNet, state: dict[str, mx.array], dtype: mx.Dtype) -> None:
    """Load torch's weights. Raises ValueError naming a tensor that is missing, of
    another shape, or not known."""
    weights = {}
    for name, weight in state.items():
        if name == "conv_codec.weight" and weight.ndim == 3:  # of one tap
            weight = weight.squeeze(2)
        elif weight.ndim == 3:  # of convolutions: (out, in, k), transposed (in, out, k)
            order = (2, 0, 1) if "convtr" in name else (2, 1, 0)
            weight = weight.transpose(order)
        weights[name] = mx.contiguous(weight.astype(dtype))
    wanted = {name: array.shape for name, array in tree_flatten(unet.parameters())}
    for name in sorted(wanted.keys() ^ weights.keys()):
        what = "lacks" if name in wanted else "has the unknown"
        raise ValueError(f"it {what} tensor {name:.120}.")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"{name:.120} must be of shape {shape}, got {weights[name].shape}."
            )
    unet.load_weights([*weights.items()])
    mx.eval(unet.parameters())  # so that what is cast goes


def flat(settings: dict, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Settings by their dotted names."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict) and depth < 8:
            found |= flat(value, f"{prefix}{name}.", depth + 1)
        else:
            found[f"{prefix}{name}"] = value
    return found


def setting(settings: dict[str, Any], name: str) -> Any:
    """A setting by its dotted name; what refers to another is that. Raises ValueError
    for one that is missing, or refers to itself."""
    seen = []
    while name not in seen:
        seen.append(name)
        if name not in settings:
            raise ValueError(f"its settings must have {name:.80}.")
        value = settings[name]
        link = LINK.fullmatch(value) if isinstance(value, str) else None
        if link is None:
            return value
        name = link[1]
    raise ValueError(f"its setting {name:.80} refers to itself.")
