"""PEFT's adapters: their files -> changes of a MusicGen's weights; and ours -> theirs.

    merge(model, "owner/adapter", scale=0.8)  # or a folder
    write("brass-peft", *read_adapter("brass.safetensors"))  # of lora.py

or `python peft_files.py brass.safetensors brass-peft`. An adapter of the library PEFT
(https://github.com/huggingface/peft) is `adapter_config.json` beside
`adapter_model.safetensors` or `.bin`, made for transformers' MusicGen. Needs
peft_config.py and strict.py beside it; hub.py is needed to fetch one and to compare
models, torch_file.py to read a `.bin`. To write one, settings.py and outputs.py are
needed, and lora.py for the command.
"""

import argparse
import json
import math
import os
import re
import sys
import warnings
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from peft_config import CONFIG, by_pattern, left_out_by, read_config
from strict import in_a_line, one_line

FILES = WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MELODY = 12  # features of a melody's frame
NUMBER = r"(0|[1-9]\d*)"
LAYER = r"(?:decoder\.)?model\.decoder\.(layers\.(?:0|[1-9]\d*))\."
SHARED = "text_encoder.shared"
PLACES = (  # modules of transformers -> ours, and which part of it the last group is
    (LAYER + r"self_attn\.([qkv])_proj", r"decoder.\1.self_attn.in_proj", "qkv"),
    (LAYER + r"encoder_attn\.([kv])_proj", r"decoder.\1.cross_attention.kv_proj", "kv"),
    (LAYER + r"encoder_attn\.(q_proj|out_proj)", r"decoder.\1.cross_attention.\2", ""),
    (LAYER + r"self_attn\.out_proj", r"decoder.\1.self_attn.out_proj", ""),
    (LAYER + r"fc([12])", r"decoder.\1.linear\2", ""),
    (LAYER + r"self_attn_layer_norm", r"decoder.\1.norm1", ""),
    (LAYER + r"encoder_attn_layer_norm", r"decoder.\1.norm_cross", ""),
    (LAYER + r"final_layer_norm", r"decoder.\1.norm2", ""),
    (r"(?:decoder\.)?model\.decoder\.layer_norm", "decoder.out_norm", ""),
    (rf"(?:decoder\.)?model\.decoder\.embed_tokens\.{NUMBER}", "decoder.emb", None),
    (rf"(?:decoder\.)?lm_heads\.{NUMBER}", "decoder.linears", None),
    (r"enc_to_dec_proj", "decoder.output_proj", ""),
    (r"audio_enc_to_dec_proj", "decoder.sound_proj", ""),
    (r"text_encoder\.(?:shared|encoder\.embed_tokens)", "text_encoder.shared", ""),
    (r"((?:text|audio)_encoder\..+)", r"\1", ""),
)


class Adapter(NamedTuple):
    """What the two files hold."""

    path: Path  # of the tensors
    config: dict[str, Any]
    tensors: dict[str, mx.array]  # by PEFT's names

    @property
    def base(self) -> str:
        """The model that it was made for."""
        return str(self.config.get("base_model_name_or_path") or "not named")


class Change(NamedTuple):
    """What one module of the adapter does to a weight of ours, or to a part of it."""

    name: str  # of its tensor in the file
    part: int  # of how many, one above another
    parts: int
    factors: tuple[mx.array, ...]  # one replaces the part; a product of two is added
    scale: float


# Reading


@in_a_line
def read(path_or_repo: str | Path) -> Adapter:
    """An adapter in a folder, or of the Hub through its cache.

    Raises FileNotFoundError, OSError where the Hub does not give it, or ValueError
    naming the file and the setting or tensor that it cannot have.
    """
    config, path = locate(path_or_repo)
    settings = read_config(config)
    if path.suffix == ".bin":
        from torch_file import load_state

        try:
            tensors = load_state(path)
        except ValueError as error:
            if path.read_bytes()[:2] in (b"PK", b"\x80\x02"):
                raise
            raise ValueError(f"{path} is damaged, fetch it again.") from error
        check_tensors(path, tensors)
        return Adapter(path, settings, tensors)
    try:
        with safe_open(path, "numpy"):  # checks the header as mx.load does not
            tensors = mx.load(str(path))
        mx.eval(tensors)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged, fetch it again: {error}") from error
    check_tensors(path, tensors)
    return Adapter(path, settings, tensors)


def locate(path_or_repo: str | Path) -> tuple[Path, Path]:
    """Where the config and the tensors lie: beside each other, or in the Hub's cache."""
    path = Path(os.path.expanduser(path_or_repo))
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        return fetch(str(path_or_repo))
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} must hold {CONFIG} beside {WEIGHTS}, but lacks it: PEFT writes "
            "both. An adapter of train.py is named by its file."
        )
    for name in FILES:
        if (folder / name).is_file():
            return folder / CONFIG, folder / name
    raise FileNotFoundError(f"{folder} must hold {WEIGHTS}, but lacks it.")


def fetch(repo: str) -> tuple[Path, Path]:
    """The same from the Hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    import hub

    reason = hub.no_network()
    options = dict(local_files_only=bool(reason))
    try:
        config = hf_hub_download(repo, CONFIG, **options)
        try:
            return Path(config), Path(hf_hub_download(repo, WEIGHTS, **options))
        except EntryNotFoundError:
            return Path(config), Path(hf_hub_download(repo, PICKLE, **options))
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        why = hub.explain(error, repo, reason, (CONFIG, WEIGHTS))
        raise OSError(
            f"The Hub did not give the adapter {repo:.80}, and there is no such folder: "
            f"{why:.220}. To work offline, name its folder."
        ) from error


def check_tensors(path: Path, tensors: dict[str, mx.array]) -> None:
    """Raise ValueError unless there are tensors that count, all of them finite."""
    names = [n for n in tensors if not UNUSED.fullmatch(n.removeprefix(PREFIX))]
    if not names:
        raise ValueError(
            f"{path} changes nothing: it holds no tensor of an adapter. Save it again."
        )
    for name in names:
        tensor = tensors[name]
        floating = mx.issubdtype(tensor.dtype, mx.floating)
        if floating and not mx.isfinite(tensor).all():
            raise ValueError(
                f"{path}: {name:.120} must be finite, but holds NaN or infinity. The "
                "training went wrong; take what it saved before."
            )


# Changes

LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
WHOLE = re.compile(
    r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(weight|bias)"
)
UNUSED = re.compile(r".*(\.original_module\..*|\.embed_positions\.weights)")


@in_a_line
def changes(adapter: Adapter, codebooks: int) -> dict[str, list[Change]]:
    """What an adapter does to our weights, by our names; what replaces comes first.

    Raises ValueError for a tensor that has no place, or whose partner is missing.
    """
    found: dict[str, list[Change]] = {}
    pairs: dict[tuple[str, bool], dict[str, str]] = {}
    replaced, added = {}, {}
    for name in sorted(adapter.tensors):  # whole modules before biases beside them
        own = name.removeprefix(PREFIX)
        if UNUSED.fullmatch(own):
            continue
        if match := LORA.fullmatch(own):
            names = pairs.setdefault((match[1], bool(match[2])), {})
            if not is_again(adapter, names.get(match[3]), name):
                names[match[3]] = name
        elif (match := WHOLE.fullmatch(own)) and own != name:
            where = place(adapter, name, match[1], match[2], codebooks)
            again = is_again(adapter, replaced.get(where), name)
            check_target(adapter, match[1], name)
            if not again and not is_unheard(adapter, match[1]):
                replaced[where], value = name, (floats(adapter, name),)
                change = Change(name, *where[1:], value, 1.0)
                found.setdefault(where[0], []).append(change)
        else:
            no_place(adapter, name)
    for (module, embeds), names in pairs.items():
        name = names.get("B") or names["A"]
        where, bias = (
            place(adapter, name, module, kind, codebooks) for kind in ("weight", "bias")
        )
        check_target(adapter, module, name)
        if (other := added.setdefault(where, name)) != name:
            given_twice(adapter, other, name)
        check_beside(adapter, name, [replaced.get(at) for at in (where, bias)])
        change = Change(name, *where[1:], *low_rank(adapter, module, embeds, names))
        found.setdefault(where[0], []).append(change)
    return found


def check_beside(adapter: Adapter, name: str, others: list[str | None]) -> None:
    """Raise ValueError where a module that has a low-rank change is replaced, too, by a
    tensor of another name than PEFT has for that, which it would not load."""
    for other in others:
        if other and ".base_layer." not in other:
            raise ValueError(
                f"{adapter.path}: {one_line(other):.110} is of a module with "
                f"{name.rpartition('.lora_')[2]:.30}, where PEFT would not load it: it has "
                "base_layer in its name there."
            )


def is_again(adapter: Adapter, other: str | None, name: str) -> bool:
    """Whether the file holds a tensor by another name already: PEFT writes some biases
    twice. Raises ValueError where both are not the same."""
    if other is None:
        return False
    one, two = adapter.tensors[other], adapter.tensors[name]
    if one.shape != two.shape or not mx.array_equal(one, two):
        given_twice(adapter, other, name)
    return True


def given_twice(adapter: Adapter, *names: str) -> None:
    one, two = (f"{one_line(name):.100}" for name in names)
    raise ValueError(
        f"{adapter.path} gives one tensor twice: {one} and {two}. Save it again with PEFT."
    )


def is_unheard(adapter: Adapter, module: str) -> bool:
    """Whether PEFT puts a module where nothing reads it: it saves `shared` of T5, and
    T5's encoder goes on with its own `embed_tokens`, also where `ensure_weight_tying` is
    asked for. Warns of it."""
    saved = adapter.config.get("modules_to_save") or []
    unheard = module == SHARED and any(SHARED.endswith(str(name)) for name in saved)
    if unheard:
        warnings.warn(
            f"{adapter.path}: {module} is left out, as it is by PEFT, where T5 reads "
            "encoder.embed_tokens instead."
        )
    return unheard


def check_target(adapter: Adapter, module: str, name: str) -> None:
    """Raise ValueError for a tensor that PEFT would leave out, since the settings do not
    ask for its module."""
    saved = adapter.config.get("modules_to_save") or []
    if "lora_" in name:
        key = left_out_by(adapter.config, module, "lora_embedding_" in name)
    else:
        is_saved = any(module.endswith(str(one)) for one in saved)
        spelled = ".modules_to_save." in name
        key = "modules_to_save" if spelled and not is_saved else None
    if key:
        raise ValueError(
            f"{adapter.path}: {one_line(name):.110} is of a module that {key} in {CONFIG} "
            f"leaves out, {one_line(adapter.config.get(key)):.60}: PEFT would not load it."
        )


def place(
    adapter: Adapter, name: str, module: str, kind: str, codebooks: int
) -> tuple[str, int, int]:
    """Our name of a tensor's weight, which part of it, and of how many."""
    for pattern, whole, order in PLACES if len(module) <= 200 else ():
        if match := re.fullmatch(pattern, module, re.ASCII):
            ours, part, parts = f"{match.expand(whole)}.{kind}", 0, 1
            if order:
                part, parts = order.index(match[2]), len(order)
            elif order is None:
                part, parts = int(match[1][:9]), codebooks
            if part < parts:
                return ours, part, parts
    no_place(adapter, name)


def no_place(adapter: Adapter, name: str) -> None:
    raise ValueError(
        f"{adapter.path}: {one_line(name):.120} has no place in this model. The adapter was made "
        f"for another, {one_line(adapter.base):.80}."
    )


def floats(adapter: Adapter, name: str) -> mx.array:
    tensor = adapter.tensors[name]
    if not mx.issubdtype(tensor.dtype, mx.floating):
        raise ValueError(
            f"{adapter.path}: {name} must hold floats, got {tensor.dtype}."
        )
    return tensor.astype(mx.float32)


def low_rank(
    adapter: Adapter, module: str, embeds: bool, names: dict[str, str]
) -> tuple[tuple[mx.array, mx.array], float]:
    """The two factors of a change, and how much it counts."""
    config = adapter.config
    if len(names) < 2:
        (name,) = names.values()
        raise ValueError(f"{adapter.path}: {name} has no partner, lora_A or lora_B.")
    rank = by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    a, b = (floats(adapter, names[kind]) for kind in "AB")
    for kind, array, axis in (("A", a, 0), ("B", b, -1)):
        if array.ndim != 2 or array.shape[axis] != rank:
            raise ValueError(
                f"{adapter.path}: {names[kind]} must be of rank {rank}, as {CONFIG} says, "
                f"got the shape {array.shape}."
            )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return ((a.T, b.T) if embeds else (b, a)), scale


def apply(weight: mx.array, change: Change, scale: float) -> mx.array:
    """A weight in float32 with the change, `scale` times."""
    rows = len(weight) // change.parts
    part = slice(change.part * rows, (change.part + 1) * rows)
    old = weight[part]
    if len(change.factors) == 1:
        new = scale * change.factors[0] + (1 - scale) * old
    else:
        left, right = change.factors
        new = old + scale * change.scale * (left @ right)
    weight = mx.array(weight)
    weight[part] = new
    return weight


# Merging


@in_a_line
def merge(model: nn.Module, path_or_repo: str | Path, scale: float = 1.0) -> None:
    """Work an adapter into the weights of a MusicGen, `scale` times, in float32.

    What replaces a weight (`modules_to_save`, `bias`) is blended with it where `scale`
    is not 1. Raises as `read`, and ValueError for an adapter of another model, for a
    model that is quantized, and for weights beyond float32.
    """
    check_sums(model, merge_unread(model, path_or_repo, scale))


@in_a_line
def merge_unread(
    model: nn.Module, path_or_repo: str | Path, scale: float
) -> dict[str, str]:
    """The same, with weights that are still to be computed, and may be no numbers.
    Returns their names, each with the file and the tensor that changes it."""
    if not (isinstance(scale, Real) and math.isfinite(scale)) or scale is True:
        raise ValueError(f"scale must be a finite number, got {scale!r:.80}.")
    adapter = read(path_or_repo)
    check_base(adapter, model.name)
    check_sizes(adapter, model)
    if model.config.quantization is not None:
        raise ValueError(
            f"{adapter.path} cannot be worked into {model.name}, which is quantized: take "
            "the model that it was made from, with q_bits."
        )
    found = changes(adapter, model.config.decoder.num_codebooks)
    weights = dict(tree_flatten(model.parameters()))
    for name, steps in found.items():
        check_shapes(adapter, weights.get(name), steps)
    model.load_weights([*changed(weights, found, scale).items()], strict=False)
    keep_text_encoder(model, found, scale)
    return {
        name: f"{adapter.path}: {one_line(steps[-1].name):.120}"
        for name, steps in found.items()
    }


def check_sums(model: nn.Module, changed: dict[str, str]) -> None:
    """Raise ValueError where a weight that was changed is no number any more."""
    weights = dict(tree_flatten(model.parameters()))
    for name, what in changed.items():
        weight = weights[name]
        if not mx.isfinite(weight).all():
            kind = str(weight.dtype).removeprefix("mlx.core.")
            raise ValueError(
                f"{what} makes weights of {name} NaN or infinite in {kind}: take a "
                "smaller scale, or float32."
            )


def changed(
    weights: dict[str, mx.array], found: dict[str, list[Change]], scale: float
) -> dict[str, mx.array]:
    """The weights that change, in float32."""
    new = {}
    for name, steps in found.items():
        new[name] = weights[name].astype(mx.float32)
        for change in steps:
            new[name] = apply(new[name], change, scale)
    return new


def keep_text_encoder(
    model: nn.Module, found: dict[str, list[Change]], scale: float
) -> None:
    """Change T5's weights again where they are read again, after they were freed."""
    prefix = "text_encoder."
    found = {
        name.removeprefix(prefix): steps
        for name, steps in found.items()
        if name.startswith(prefix)
    }
    if found and (read_before := model.read_text_encoder):

        def read_again() -> dict[str, mx.array]:
            weights = read_before()
            return weights | changed(weights, found, scale)

        model.read_text_encoder = read_again


def check_base(adapter: Adapter, model: str) -> None:
    """Raise ValueError where both models are released ones, and not the same."""
    if not Path(__file__).with_name("hub.py").is_file():
        return
    from hub import MODELS

    ours, released = MODELS.get(model, model), {*MODELS.values()}
    if {ours, adapter.base} <= released and ours != adapter.base:
        raise ValueError(
            f"{adapter.path} belongs to another model: {adapter.base}, not {ours}."
        )


def check_sizes(adapter: Adapter, model: nn.Module) -> None:
    """Raise ValueError where the adapter's model is a released one of other sizes."""
    if not Path(__file__).with_name("hub.py").is_file():
        return
    from hub import shape_of

    decoder = model.config.decoder
    here = {
        "layers": decoder.num_hidden_layers,
        "width": decoder.hidden_size,
        "codebooks": decoder.num_codebooks,
        "channels": model.channels,
        "sampling_rate": model.sampling_rate,
        "follows": getattr(model.conditioner, "kind", ""),
    }
    for name, size in (shape_of(adapter.base) or {}).items():
        if here[name] != size:
            raise ValueError(
                f"{adapter.path} belongs to another model, {adapter.base}: {name} {size!r} "
                f"there, {here[name]!r} here."
            )


def check_shapes(
    adapter: Adapter, weight: mx.array | None, steps: list[Change]
) -> None:
    """Raise ValueError unless a weight is there, and each change has its shape."""
    for change in steps:
        if weight is None:
            no_place(adapter, change.name)
        rows, *rest = weight.shape
        shape = (rows // change.parts, *rest)
        factors = change.factors
        got = factors[0].shape
        if len(factors) == 2:
            got = (factors[0].shape[0], factors[1].shape[1])
        if got != shape:
            raise ValueError(
                f"{adapter.path} belongs to another model ({one_line(adapter.base):.80}): "
                f"{change.name} is for a weight of {got}, here it is {shape}."
            )


# Writing

SPLIT = {  # endings of our names -> of transformers', part by part
    "self_attn.in_proj": [f"self_attn.{x}_proj" for x in "qkv"],
    "self_attn.out_proj": ["self_attn.out_proj"],
    "cross_attention.q_proj": ["encoder_attn.q_proj"],
    "cross_attention.kv_proj": [f"encoder_attn.{x}_proj" for x in "kv"],
    "cross_attention.out_proj": ["encoder_attn.out_proj"],
    "linear1": ["fc1"],
    "linear2": ["fc2"],
}
TOP = {"output_proj": ["enc_to_dec_proj"], "sound_proj": ["audio_enc_to_dec_proj"]}


def write(
    folder: str | Path, arrays: dict[str, mx.array], metadata: dict[str, Any]
) -> None:
    """Write what lora.py's `read_adapter` gives as the two files of PEFT.

    A matrix that is several of transformers' is split: each part has its own rows of
    one factor and the whole of the other, which gives the same product. Raises OSError,
    or ValueError for an adapter of a model that transformers does not have.
    """
    from outputs import whole_file
    from settings import save_arrays

    sizes, rank = metadata["sizes"], metadata["rank"]
    check_model(sizes.get("sound_width", 0))
    tensors, targets = {}, set()
    for name in sorted(name[:-2] for name in arrays if name.endswith(".a")):
        a, b = arrays[f"{name}.a"], arrays[f"{name}.b"]
        for module, down, up in split(name, a, b, sizes["num_codebooks"]):
            middle = "lora_embedding_" if name == "emb" else "lora_"
            end = "" if name == "emb" else ".weight"
            tensors[f"{PREFIX}{module}.{middle}A{end}"] = mx.contiguous(down)
            tensors[f"{PREFIX}{module}.{middle}B{end}"] = mx.contiguous(up)
            targets.add(re.search(r"[^.]+(\.\d+)?$", module)[0])
    folder = Path(os.path.expanduser(folder))
    check_parent(folder)
    folder.mkdir(exist_ok=True)
    save_arrays(folder / WEIGHTS, tensors, {"format": "pt"})
    config = peft_config(rank, sorted(targets), metadata.get("model"))
    with whole_file(folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2) + "\n")


def check_model(prefix_width: int) -> None:
    """Raise ValueError for a decoder that transformers does not have."""
    if prefix_width not in (0, MELODY):
        raise ValueError(
            "transformers has no model that follows a style, so PEFT takes no adapter of "
            "one: leave out --format peft."
        )


def split(
    name: str, a: mx.array, b: mx.array, codebooks: int
) -> list[tuple[str, mx.array, mx.array]]:
    """Modules of transformers, and the factors of each: lora_A and lora_B."""
    if name == "emb":  # whose rows are codes
        rows = mx.split(a, codebooks)
        names = [f"decoder.model.decoder.embed_tokens.{k}" for k in range(codebooks)]
        return [(module, part.T, b.T) for module, part in zip(names, rows)]
    if name == "linears":
        names = [f"decoder.lm_heads.{k}" for k in range(codebooks)]
    elif name in TOP:
        names = TOP[name]
    else:
        layers, number, end = name.split(".", 2)
        names = [f"decoder.model.decoder.{layers}.{number}.{x}" for x in SPLIT[end]]
    return [(module, a.T, p) for module, p in zip(names, mx.split(b.T, len(names)))]


def peft_config(rank: int, targets: list[str], model: Any) -> dict[str, Any]:
    """What PEFT is to know. A folder of this machine means nothing elsewhere."""
    if isinstance(model, str) and Path(__file__).with_name("hub.py").is_file():
        from hub import MODELS, local

        model = None if local(model) else MODELS.get(model, model)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": model if isinstance(model, str) else None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def write_whole(source: str, target: str) -> None:
    """Write a file of `train.py lora` as a new folder of PEFT, which appears under its
    name when it is whole. Raises OSError or ValueError."""
    from lora import read_adapter
    from outputs import whole_folder

    if not target.strip():
        raise ValueError(f"The folder to write must have a name, got {target!r}.")
    path, folder = (Path(os.path.expanduser(text)) for text in (source, target))
    place = path if path.is_dir() else path.parent
    if (place / CONFIG).is_file() and (place == path or path.name in (CONFIG, *FILES)):
        raise ValueError(f"{source} is PEFT's already: it is named by its folder.")
    if os.path.lexists(folder):
        raise FileExistsError(f"{target} exists already; choose another folder.")
    check_parent(folder)
    arrays, metadata = read_adapter(path)
    with whole_folder(folder) as part:
        try:
            write(part, arrays, metadata)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{source} is damaged: {error!r:.200}") from error
        except OSError as error:
            raise OSError(str(error).replace(str(part), str(folder))) from error


def check_parent(folder: Path) -> None:
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"The folder {folder.parent} must exist.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write an adapter of train.py lora for PEFT."
    )
    parser.add_argument("source", help="file of train.py lora")
    parser.add_argument("target", help="folder to write; must not exist")
    args = parser.parse_args()
    try:
        write_whole(args.source, args.target)
    except (OSError, ValueError) as error:
        sys.exit(f"peft_files.py: error: {one_line(error)}")
    from outputs import print_out

    print_out(f"Wrote {args.target}")


if __name__ == "__main__":
    main()
