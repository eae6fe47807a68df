"""EnCodec's published files -> settings, and weights by our names and layouts.

transformers' form is `config.json` and `model.safetensors`, audiocraft's one
`compression_state_dict.bin`, for which audiocraft.py, ported.py, decoder_names.py and
torch_file.py are needed. To see at once that there is no network hub.py is needed, to
`load` limits.py. Needs strict.py beside it. What `python encodec.py` does is here, too,
for which audio.py, resample.py
and outputs.py are needed.

    path, settings, weights = read("32khz")  # or a Hub id, or a folder
"""

import argparse
import json
import os
import re
import sys
import warnings
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

import strict
from strict import Misfit, in_a_line, one_line, small_text

REPOS = {size: f"facebook/encodec_{size}" for size in ("24khz", "32khz", "48khz")}
FILES = ("config.json", "model.safetensors")
AUDIOCRAFT_FILE = "compression_state_dict.bin"

Weights = dict[str, mx.array]


def load(codec: type, config_type: type, path_or_repo: str | Path):
    """An `encodec.Encodec` of such files, which is what these types are.

    Raises as `read`, and ValueError naming a tensor that does not fit.
    """
    from limits import check_codec

    path, settings, weights = read(path_or_repo)
    try:
        config = config_type.from_dict(settings)
        check_codec(config)
        model = codec(config)
        model.load_weights(list(weights.items()))
        mx.eval(model.state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(misfit(path, error)) from error
    return model


@in_a_line
def read(path_or_repo: str | Path) -> tuple[Path, dict, Weights]:
    """Where a codec's files lie, its settings, and its weights in float32.

    Raises ValueError or OSError naming the file and what is wrong with it.
    """
    path = Path(os.path.expanduser(path_or_repo)) / AUDIOCRAFT_FILE
    if str(path_or_repo) not in REPOS and path.is_file():
        from audiocraft import find_codec, load_package, read_codec

        package = load_package(path)
        if repo := find_codec(path, package):  # the file only names a codec
            local = path.with_name(repo.split("/")[1])
            try:
                return read(local if local.is_dir() else repo)
            except OSError as error:
                raise needed(path.parent, repo, error) from error
        settings, weights = read_codec(path, package)
    else:
        path, settings, weights = read_files(*locate(path_or_repo))
    try:
        return path, settings, sanitize(weights)
    except (IndexError, ValueError) as error:
        raise ValueError(misfit(path, error)) from error


def needed(folder: Path, repo: str, error: OSError) -> OSError:
    """What is told of a model in a folder whose codec, which it only names, is neither
    beside it nor given by the Hub."""
    why = str(error.__cause__ or error).rstrip(".")  # without what is said here
    place = f"{repo.split('/')[1]}/ ({', '.join(FILES)})"
    return OSError(
        f"{folder} needs the codec {repo} in {place} or from the Hub: {why}."
    )


def misfit(path: Path, error: Exception) -> str:
    """Why the codec in `path`, a folder or audiocraft's file, does not load: a line,
    which names a tensor as its file does."""
    told = strict.misfit(error, lambda name: spell(name, names_in(path)))
    return one_line(f"Codec {path} does not load: {told}")


def names_in(path: Path) -> list[str]:
    """Of the tensors in a folder, or in audiocraft's file."""
    if path.name == AUDIOCRAFT_FILE:
        from audiocraft import load_package

        return [*load_package(path)["best_state"]]
    return [*mx.load(str(path / FILES[1]))]  # their data is not read


def locate(path_or_repo: str | Path) -> list[Path]:
    """The two FILES: in a local folder, or from the Hub through its cache."""
    folder = Path(os.path.expanduser(path_or_repo))
    if str(path_or_repo) in REPOS or not folder.is_dir():  # `./32khz` is a folder
        repo = REPOS.get(str(path_or_repo), str(path_or_repo))
        try:
            return fetch(repo)
        except OSError as error:
            raise OSError(
                f"The Hub did not give the codec {repo}, and there is no such folder: "
                f"{error}. To work offline, name a folder with {' and '.join(FILES)}; "
                f"short names are {', '.join(REPOS)}."
            ) from error
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} must hold {' and '.join(FILES)}, or {AUDIOCRAFT_FILE}, "
                f"but {name} is missing."
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


def read_files(config: Path, weights: Path) -> tuple[Path, dict, Weights]:
    """The folder, the settings and the tensors. Raises ValueError for damaged files."""
    folder = weights.parent
    try:
        settings = read_config(config)
        with safe_open(weights, "numpy"):  # checks the header as mx.load does not
            return folder, settings, mx.load(str(weights))
    except (RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"Codec {folder} does not load: {error!s:.250}") from error


def read_config(path: Path) -> dict:
    """The settings in a `config.json`. Raises ValueError when it holds none."""
    try:
        settings = json.loads(small_text(path))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} must hold an object, got {settings!r:.40}")
    return settings


def sanitize(weights: Weights) -> Weights:
    """Names and layouts of either published form -> ours, in float32.

    Raises ValueError for a tensor that does not hold floats or lacks its
    partner.
    """
    kept = {}
    for name, weight in weights.items():
        if not UNUSED.fullmatch(name):
            add(kept, rename(name), weight)
    for name, weight in kept.items():
        if not mx.issubdtype(weight.dtype, mx.floating):
            raise Misfit(name, f"must hold floats, but holds {weight.dtype}")
    weights = {name: weight.astype(mx.float32) for name, weight in kept.items()}
    if not any("lstm.weight_ih" in name for name in weights):
        return weights  # ours already
    return merge_lstm(channels_last(fold_weight_norm(weights)))


# Training's bookkeeping, of no use here.
UNUSED = re.compile(r"quantizer\..*\.(inited|cluster_size|embed_avg)")

RENAMES = (  # audiocraft's names, then transformers' since 4.46
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.conv(tr)?\.(conv|convtr)\.", ".conv."),
    (r"^quantizer\.vq\.", "quantizer."),
    (r"\._codebook\.", ".codebook."),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)


SPELLINGS = (  # our names -> transformers'
    (r"\.lstm\.(\d+)\.Wx$", r".lstm.weight_ih_l\1"),
    (r"\.lstm\.(\d+)\.Wh$", r".lstm.weight_hh_l\1"),
    (r"\.lstm\.(\d+)\.bias$", r".lstm.bias_ih_l\1"),
)
AUDIOCRAFT_SPELLINGS = (  # and these -> audiocraft's
    (r"\.conv\.", ".conv.conv."),
    (r"^(encoder|decoder)\.layers\.", r"\1.model."),
    (r"^quantizer\.", "quantizer.vq."),
    (r"\.codebook\.", "._codebook."),
)


def spell(name: str, names: list[str]) -> str:
    """A name, ours, as it is in the file whose other `names` these are; of what we
    merge, the part that is largest."""
    if any(".parametrizations." in other for other in names):
        name = re.sub(r"\.weight(_v)?$", ".parametrizations.weight.original1", name)
        name = re.sub(r"\.weight_g$", ".parametrizations.weight.original0", name)
    elif any(other.endswith(".weight_v") for other in names):
        name = re.sub(r"\.conv\.weight$", ".conv.weight_v", name)
    audiocraft = any(n.startswith(("encoder.model.", "decoder.model.")) for n in names)
    for pattern, replacement in SPELLINGS + AUDIOCRAFT_SPELLINGS * audiocraft:
        name = re.sub(pattern, replacement, name)
    upsamples = name.replace(".conv.conv.", ".convtr.convtr.")
    has = {other.rpartition(".")[0] for other in names}
    return upsamples if upsamples.rpartition(".")[0] in has else name


def rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def add(weights: Weights, name: str, weight: mx.array) -> None:
    """Put a tensor under a name. Raises ValueError when the name is taken."""
    if name in weights:
        raise ValueError(f"{name:.150} is there twice, under two spellings")
    weights[name] = weight


def fold_weight_norm(weights: Weights) -> Weights:
    """weight = g * v / |v|, the norm taken over all dimensions but the first."""
    folded = dict(weights)
    for name, weight in weights.items():
        stem = name.removesuffix(".weight_v")
        if stem != name:
            if weight.ndim != 3:
                raise Misfit(name, f"must have 3 dimensions, got {weight.shape}")
            gain = partner(folded, f"{stem}.weight_g", (len(weight), 1, 1))
            norm = mx.sqrt((weight**2).sum(axis=(1, 2), keepdims=True))
            add(folded, f"{stem}.weight", gain * folded.pop(name) / norm)
    for name in folded:
        if name.endswith(".weight_g"):
            raise Misfit(name.replace(".weight_g", ".weight_v"), "is missing")
    return folded


def partner(weights: Weights, name: str, shape: tuple) -> mx.array:
    """Take `name` out of `weights`. Raises ValueError unless it has the shape."""
    if name not in weights or weights[name].shape != shape:
        if name not in weights:
            raise Misfit(name, "is missing")
        raise Misfit(name, f"must have the shape {shape}, got {weights[name].shape}")
    return weights.pop(name)


def channels_last(weights: Weights) -> Weights:
    """Move torch's kernels to our layouts.

    (out, in, kernel) -> (out, kernel, in), and where the decoder upsamples, in
    its inner layers, (in, out, kernel) -> (kernel, out, in).
    """
    inner = re.compile(r"decoder\.layers\.(\d+)\.conv\.weight")
    numbers = [int(m[1]) for m in map(inner.fullmatch, weights) if m]
    if not numbers:
        raise Misfit("decoder.layers.0.conv.weight", "is missing")
    last = max(numbers)

    def move(name: str, weight: mx.array) -> mx.array:
        match = inner.fullmatch(name)
        if match and 0 < int(match[1]) < last:
            return weight.transpose(2, 1, 0)
        return weight.swapaxes(1, 2) if weight.ndim == 3 else weight

    return {name: move(name, weight) for name, weight in weights.items()}


def merge_lstm(weights: Weights) -> Weights:
    """torch's `lstm.weight_ih_l0` and its like -> `lstm.0.Wx`, biases added up."""
    merged = dict(weights)
    for name, weight in weights.items():
        match = re.fullmatch(r"(.*lstm)\.(weight_ih|weight_hh|bias_ih)_l(\d+)", name)
        if not match:
            continue
        stem, kind, layer = match.groups()
        weight = merged.pop(name)
        if kind == "bias_ih":
            other = f"{stem}.bias_hh_l{layer}"
            weight = weight + partner(merged, other, weight.shape)
        ours = {"weight_ih": "Wx", "weight_hh": "Wh", "bias_ih": "bias"}[kind]
        add(merged, f"{stem}.{layer}.{ours}", weight)
    for name in merged:
        if re.search(r"\.bias_hh_l\d+$", name):
            raise Misfit(name.replace(".bias_hh_l", ".bias_ih_l"), "is missing")
    return merged


# Sound files through the codec: what `python encodec.py in.wav out.wav` does.


def main(codec: type) -> None:
    """Read a sound file, code it, and write what the codes give. `codec`: the class."""
    from audio import check_output, load_audio, save_audio
    from outputs import print_out

    warnings.showwarning = warn
    parser = argparse.ArgumentParser(description="Pass a sound file through EnCodec.")
    add = parser.add_argument
    add("source", help="sound file to read")
    add("target", help="sound file to write")
    models = "24khz, 32khz, 48khz, a Hub id or a folder (default: %(default)s)"
    add("--model", default="32khz", help=models)
    add("--bandwidth", type=float, help="kbit/s (default: the model's smallest)")
    add("--force", action="store_true", help="overwrite what is there")
    args = parser.parse_args()
    try:
        check_output(args.target, args.source, args.force)
        model = codec.from_pretrained(args.model)
        audio = load_audio(args.source, model.sampling_rate, model.channels)
        chunks = model.encode(audio[None], args.bandwidth)
        decoded = model.decode(chunks)[0, : len(audio)]
        save_audio(args.target, decoded, model.sampling_rate, overwrite=args.force)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"encodec.py: error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
    frames, K = sum(chunk.codes.shape[1] for chunk in chunks), chunks[0].codes.shape[2]
    print_out(
        f"{args.target}: {len(audio) / model.sampling_rate:.2f} s, {frames} x {K} codes"
    )


def warn(message: Warning | str, *_) -> None:
    print(f"encodec.py: warning: {one_line(message)}", file=sys.stderr)
