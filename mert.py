"""MERT: music -> features that tell its style.

The music model of Li et al. (https://arxiv.org/abs/2306.00107) with 95 M parameters: a
HuBERT (https://arxiv.org/abs/2106.07447) that was trained on music. Convolutions turn
24 000 samples a second into 75 frames, and a transformer relates these, in float32.
Stands alone; torch_file.py and strict.py are needed beside it to read the published
`pytorch_model.bin`, hub.py to see at once that there is no network, and audio.py,
resample.py and outputs.py to read a sound file from the command line.

    model = MERT.from_pretrained("m-a-p/MERT-v1-95M")
    features = model(audio)  # (B, N) at model.sampling_rate -> (B, T, 768)

or `python mert.py song.mp3`.
"""

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

if sys.platform == "darwin":  # where an M5 rounds the factors of float32 products
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at the first of them

import mlx.core as mx
import mlx.nn as nn

REPO = "m-a-p/MERT-v1-95M"
FILES = ("config.json", "pytorch_model.bin")


@dataclass(frozen=True)
class MERTConfig:
    """Sizes, spelled as in `config.json`; defaults: the published model's."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    num_conv_pos_embeddings: int = 128  # kernel of the positions, in frames
    num_conv_pos_embedding_groups: int = 16
    sample_rate: int = 24000

    @classmethod
    def from_dict(cls, config: dict) -> "MERTConfig":
        """Read the settings of a `config.json`; those not named here are ignored.

        Raises ValueError for settings that are not ported, and for absurd sizes.
        """
        values = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        result = cls(**values | lists)
        check_config(result)
        for name, value in FIXED.items():
            if config.get(name, value) != value:
                raise ValueError(f"{name} must be {value!r}, got {config[name]!r:.80}.")
        return result


class MERT(nn.Module):
    """The model. `sanitize` maps the published parameter names to ours."""

    def __init__(self, config: MERTConfig):
        super().__init__()
        self.config = config
        ins = (1, *config.conv_dim)
        sizes = zip(ins, config.conv_dim, config.conv_kernel, config.conv_stride)
        self.convs = [nn.Conv1d(*size, bias=False) for size in sizes]
        self.conv_norm = nn.InstanceNorm(config.conv_dim[0], affine=True)
        self.projection_norm = nn.LayerNorm(ins[-1])
        D, kernel = config.hidden_size, config.num_conv_pos_embeddings
        self.projection = nn.Linear(ins[-1], D)
        groups = config.num_conv_pos_embedding_groups
        self.positions = nn.Conv1d(D, D, kernel, padding=kernel // 2, groups=groups)
        self.norm = nn.LayerNorm(D)
        heads, hidden = config.num_attention_heads, config.intermediate_size
        self.layers = [
            EncoderLayer(D, heads, hidden, bias=True, norm_first=False)
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def sampling_rate(self) -> int:
        """Samples per second of its input."""
        return self.config.sample_rate

    @property
    def shortest(self) -> int:
        """Samples that give one frame: 400."""
        length = 1
        config = self.config
        for kernel, stride in zip(config.conv_kernel[::-1], config.conv_stride[::-1]):
            length = (length - 1) * stride + kernel
        return length

    def __call__(self, audio: mx.array) -> mx.array:
        """Samples (B, N) -> the last layer's output (B, T, hidden_size).

        Raises ValueError for another shape, or fewer samples than `shortest`.
        """
        if audio.ndim != 2 or audio.shape[1] < self.shortest:
            raise ValueError(
                f"audio must have the shape (B, N) with N from {self.shortest} on, got "
                f"{audio.shape}."
            )
        x = audio[..., None]
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = nn.gelu(self.conv_norm(x) if i == 0 else x)
        x = self.projection(self.projection_norm(x))
        # An even kernel, padded by half on both sides, gives a frame too many.
        positions = self.positions(x)[:, : x.shape[1]]
        x = self.norm(x + nn.gelu(positions))
        for layer in self.layers:
            x = layer(x)
        return x

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The published names and layouts -> ours, in float32. Ours stay as they are.

        Raises ValueError for weights that are not floats, and where the two parts of
        the positional weight do not match.
        """
        ours = {}
        for name, weight in weights.items():
            if not mx.issubdtype(weight.dtype, mx.floating):
                raise ValueError(
                    f"{name:.150} must hold floats, but holds {weight.dtype}"
                )
            for pattern, replacement in RENAMES:
                name = re.sub(pattern, replacement, name)
            ours[name] = weight.astype(mx.float32)
        ours.pop("masked_spec_embed", None)  # used in training only
        parts = ["positions.weight_g", "positions.weight_v"]
        names = [spell(part, weights) for part in parts]
        lost = [name for part, name in zip(parts, names) if part not in ours]
        if len(lost) == 2:
            return ours  # sanitized before
        if lost:
            raise ValueError(f"{lost[0]} is missing")
        ours["positions.weight"] = fold(ours, names)
        return {  # kernels: (C', C, k) -> (C', k, C)
            name: weight.swapaxes(1, 2) if weight.ndim == 3 else weight
            for name, weight in ours.items()
        }

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path = REPO) -> "MERT":
        """Load `config.json` and `pytorch_model.bin` of a local folder or Hub id.

        Raises OSError where a file is missing, or ValueError for one that is damaged or
        of another model.
        """
        from strict import misfit, one_line
        from torch_file import load_state

        place, file = locate(path_or_repo)
        weights: dict[str, mx.array] = {}
        try:
            model = cls(MERTConfig.from_dict(read_config(place)))
            place, weights = file, load_state(file)
            model.load_weights(list(cls.sanitize(weights).items()))
        except (TypeError, ValueError) as error:
            told = misfit(error, lambda name: spell(name, weights))
            why = one_line(f"MERT in {place} does not load: {told}")
            raise ValueError(why) from error
        mx.eval(model.state)
        return model


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward, with a norm after each, or before it with
    `norm_first`."""

    def __init__(
        self, width: int, heads: int, hidden: int, bias: bool, norm_first: bool
    ):
        super().__init__()
        self._norm_first = norm_first
        self.attention = nn.MultiHeadAttention(width, heads, bias=bias)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden, bias=bias)
        self.linear2 = nn.Linear(hidden, width, bias=bias)
        self.norm2 = nn.LayerNorm(width)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, width) -> same shape."""
        if self._norm_first:
            y = self.norm1(x)
            x = x + self.attention(y, y, y)
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self.attention(x, x, x))
        return self.norm2(x + self._feed_forward(x))

    def _feed_forward(self, x: mx.array) -> mx.array:
        return self.linear2(nn.gelu(self.linear1(x)))


RENAMES = (  # published names -> ours
    (r"^feature_extractor\.conv_layers\.(\d+)\.conv\.", r"convs.\1."),
    (r"^feature_extractor\.conv_layers\.0\.layer_norm\.", "conv_norm."),
    (r"^feature_projection\.layer_norm\.", "projection_norm."),
    (r"^feature_projection\.projection\.", "projection."),
    (r"^encoder\.pos_conv_embed\.conv\.", "positions."),
    (r"^positions\.parametrizations\.weight\.original0$", "positions.weight_g"),
    (r"^positions\.parametrizations\.weight\.original1$", "positions.weight_v"),
    (r"^encoder\.layer_norm\.", "norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attention\.q_proj\.", ".attention.query_proj."),
    (r"\.attention\.k_proj\.", ".attention.key_proj."),
    (r"\.attention\.v_proj\.", ".attention.value_proj."),
    (r"^(layers\.\d+)\.layer_norm\.", r"\1.norm1."),
    (r"\.feed_forward\.intermediate_dense\.", ".linear1."),
    (r"\.feed_forward\.output_dense\.", ".linear2."),
    (r"\.final_layer_norm\.", ".norm2."),
)


SPELLINGS = (  # ours -> published names
    (r"^convs\.(\d+)\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"^conv_norm\.", "feature_extractor.conv_layers.0.layer_norm."),
    (r"^projection_norm\.", "feature_projection.layer_norm."),
    (r"^projection\.", "feature_projection.projection."),
    (r"^positions\.", "encoder.pos_conv_embed.conv."),
    (r"^norm\.", "encoder.layer_norm."),
    (r"\.(q|k|v)\w+_proj\.", r".\1_proj."),
    (r"\.norm1\.", ".layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
    (r"\.linear1\.", ".feed_forward.intermediate_dense."),
    (r"\.linear2\.", ".feed_forward.output_dense."),
    (r"^layers\.", "encoder.layers."),
)
NEWER = (  # since torch 2.1, where a file has one of them
    ("conv.weight_g", "conv.parametrizations.weight.original0"),
    ("conv.weight_v", "conv.parametrizations.weight.original1"),
)


def spell(name: str, weights: dict[str, mx.array]) -> str:
    """The published name of a tensor of ours, as the names in `weights` have it."""
    for pattern, theirs in SPELLINGS:
        name = re.sub(pattern, theirs, name)
    for older, newer in NEWER:
        if any("parametrizations" in other for other in weights):
            name = name.replace(older, newer)
    return name


def fold(weights: dict[str, mx.array], names: list[str]) -> mx.array:
    """Take the two parts of the positional weight, which are published under `names`,
    out of `weights`, and fold them.

    The weight is g * v / |v|, (C', C, k), with a norm for each place k of the kernel.
    """
    v, g = (weights.pop(f"positions.weight_{part}") for part in "vg")
    if v.ndim != 3:
        raise ValueError(f"{names[1]} must have the shape (C', C, k), got {v.shape}")
    if g.shape != (wanted := (1, 1, v.shape[2])):
        raise ValueError(
            f"{names[0]}, beside {names[1]} of {v.shape}, must have the shape {wanted}, "
            f"got {g.shape}"
        )
    return g * v / mx.sqrt((v**2).sum(axis=(0, 1), keepdims=True))


# Checking a config, which may come from a stranger.

LIMITS = {  # least and largest value of each size
    "hidden_size": (2, 2**14),
    "num_hidden_layers": (1, 200),
    "num_attention_heads": (1, 2**10),
    "intermediate_size": (1, 2**17),
    "num_conv_pos_embeddings": (1, 2**10),
    "num_conv_pos_embedding_groups": (1, 2**10),
    "sample_rate": (1000, 192_000),
}
FIXED = {  # settings of which only the published value is ported
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "feat_extract_norm": "group",
    "feat_proj_layer_norm": True,
    "conv_bias": False,
    "conv_pos_batch_norm": False,
    "do_stable_layer_norm": False,
    "feature_extractor_cqt": False,
    "deepnorm": False,
    "attention_relax": -1.0,
    "layer_norm_eps": 1e-5,
}


def check_config(config: MERTConfig) -> None:
    """Raise ValueError for sizes that are impossible or hostile."""
    for name, (low, high) in LIMITS.items():
        size = getattr(config, name)
        if type(size) is not int or not low <= size <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {size!r:.80}.")
    for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
        if config.hidden_size % getattr(config, name):
            raise ValueError(
                f"{name} must divide hidden_size, {config.hidden_size}, got "
                f"{getattr(config, name)}."
            )
    lists = [config.conv_dim, config.conv_kernel, config.conv_stride]
    numbers = [x for sizes in lists for x in sizes]
    same = len({len(sizes) for sizes in lists}) == 1 and numbers
    if not same or not all(type(x) is int and 1 <= x <= 2**14 for x in numbers):
        raise ValueError(
            "conv_dim, conv_kernel and conv_stride must list as many sizes, each from "
            f"1 to {2**14}, got {lists!s:.150}."
        )


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
    """The settings in a `config.json`. Raises ValueError where there are none."""
    if path.stat().st_size > 2**26:  # memory might not hold it
        raise ValueError(f"{path.name} must be at most 64 MB.")
    try:
        config = json.loads(path.read_text())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} must hold an object, got {config!r:.40}")
    return config


def locate(path_or_repo: str | Path) -> list[Path]:
    """Paths of the two FILES, in a local folder, or from the Hub through its cache.

    Raises OSError where one is missing.
    """
    folder = Path(os.path.expanduser(path_or_repo))
    if not folder.is_dir():
        repo = str(path_or_repo)
        try:
            return fetch(repo)
        except OSError as error:
            raise OSError(
                f"The Hub did not give MERT, {repo:.80}, and there is no such folder: "
                f"{error}. To work offline, name a folder with {' and '.join(FILES)}."
            ) from error
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder!s:.200} must hold {' and '.join(FILES)}, but {name} is missing."
            )
    return [folder / name for name in FILES]


def fetch(repo: str) -> list[Path]:
    """The FILES of a repository, from the Hub through its cache. Raises OSError with the
    reason, which has no full stop."""
    from huggingface_hub import hf_hub_download

    reason = no_network(repo)
    options = dict(local_files_only=bool(reason))
    try:
        return [Path(hf_hub_download(repo, name, **options)) for name in FILES]
    except (OSError, ValueError) as error:
        why = str(isinstance(error, OSError) and reason or error)
        if Path(__file__).with_name("hub.py").is_file():
            from hub import explain

            why = explain(error, repo, reason, FILES)
        raise OSError(why.rstrip(". \n")) from error


def demo(model: MERT, path: str) -> None:
    """Print the shape of a sound file's features, and their standard deviation."""
    from audio import load_audio
    from outputs import print_result

    features = model(load_audio(path, model.sampling_rate, 1).T)
    deviation = f"{features.std().item():.3f}"
    print_result(f"{path}: features {features.shape}, deviation {deviation}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Features of a sound file.")
    parser.add_argument("source", help="sound file to read")
    parser.add_argument("--model", default=REPO, help="folder or Hub id (%(default)s)")
    args = parser.parse_args()
    try:
        if not os.path.isfile(os.path.expanduser(args.source)):
            raise FileNotFoundError(f"There is no sound file {args.source}.")
        demo(MERT.from_pretrained(args.model), args.source)
    except (OSError, ValueError) as error:
        sys.exit(f"mert.py: error: {' '.join(str(error).split()):.370}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
