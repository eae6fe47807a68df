"""Names, shapes and dtypes of every tensor in the published checkpoints.

`manifests.json` keeps them short: tensors that repeat from layer to layer
share one line. `expand` undoes that. Standard library only, no weights.

    python manifests.py FOLDER

rebuilds `manifests.json` from a folder of full manifests (`NAME.transformers.json`,
`NAME.audiocraft.json`, `NAME.demucs.json`, `NAME.config.json`) and checks that nothing was lost.
"""

import argparse
import json
import re
from pathlib import Path

MANIFESTS = Path(__file__).with_name("manifests.json")
MUSICGEN = [
    f"musicgen-{kind}{size}"
    for kind in ("", "stereo-")
    for size in ("small", "medium", "large")
]
MELODY = [
    f"musicgen-{kind}melody{size}"
    for kind in ("", "stereo-")
    for size in ("", "-large")
]
STYLE = ["musicgen-style"]  # has no checkpoint of the transformers kind
AUDIOGEN = ["audiogen-medium"]  # neither
MAGNET = [
    *(f"magnet-{size}-{s}secs" for size in ("small", "medium") for s in (10, 30)),
    *(f"audio-magnet-{size}" for size in ("small", "medium")),
]  # nor they
DIFFUSION = ["mbd_musicgen_32khz", "mbd_comp_24khz"]
OTHERS = ["encodec_24khz", "encodec_32khz", "encodec_48khz", "t5-base", "t5-large"]

# Every transformers checkpoint of MusicGen holds the same codec, written once.
CODEC = {"audio_encoder.": "encodec_32khz.transformers"}


def read() -> dict:
    """Return manifests.json, with the shared codec put back where it belongs.

    `tensors` maps "NAME.transformers" or "NAME.audiocraft" to a compact
    manifest, `compression` maps a MusicGen name to what is in its
    compression_state_dict.bin, `configs` maps a name to its config.json, and
    `diffusion` maps a decoder to what is in its file, each model_state compact.
    """
    stored = json.loads(MANIFESTS.read_text())
    for manifest in stored["tensors"].values():
        for prefix, source in manifest.pop("include", {}).items():
            for name, entry in stored["tensors"][source].items():
                manifest[prefix + name] = entry
    return stored


def expand(manifest: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return {tensor name: (dtype, shape)} for one compact manifest.

    An entry is `name: [dtype, shape]`, or `name: [dtype, shape, start, stop]`
    when the name holds "{i}", which then counts from start up to stop.
    """
    full = {}
    for name, (dtype, shape, *span) in manifest.items():
        names = [name.replace("{i}", str(i)) for i in range(*span)] if span else [name]
        full.update((n, (dtype, tuple(shape))) for n in names)
    return full


def compact(full: dict) -> dict:
    """Undo `expand`: fold names that differ only in their first number."""
    groups = {}
    for name, (dtype, shape) in full.items():
        template = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name, count=1)
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        index = int(number[0]) if number else None
        groups.setdefault((template, dtype, tuple(shape)), []).append(index)
    manifest = {}
    for (template, dtype, shape), indices in groups.items():
        start, count = indices[0], len(indices)
        in_a_row = count > 1 and indices == list(range(start, start + count))
        # Layers of two shapes may share a template, which can be a key only once.
        if in_a_row and template not in manifest:
            manifest[template] = [dtype, list(shape), start, start + count]
            continue
        for index in indices:
            manifest[template.replace("{i}", str(index))] = [dtype, list(shape)]
    return manifest


def share_codec(manifest: dict, tensors: dict) -> dict:
    (prefix, source), *_ = CODEC.items()
    own = {k: v for k, v in manifest.items() if not k.startswith(prefix)}
    codec = {
        k.removeprefix(prefix): v for k, v in manifest.items() if k.startswith(prefix)
    }
    if expand(codec) != expand(tensors[source]):
        raise ValueError(f"The codec under {prefix} is not that of {source}.")
    return own | {"include": CODEC}


def full_manifests(folder: Path) -> tuple[dict, dict]:
    """Read {name: full manifest} and {name: compression_state_dict.bin}."""
    tensors, compression = {}, {}
    for name in OTHERS + MUSICGEN + MELODY:
        key = f"{name}.transformers"
        tensors[key] = json.loads((folder / f"{key}.json").read_text())
    others = ("mert-v1-95m.transformers", "encodec_32khz.audiocraft", "htdemucs.demucs")
    for key in (*others, "encodec_16khz_audiogen.audiocraft"):
        tensors[key] = json.loads((folder / f"{key}.json").read_text())
    for name in MUSICGEN + STYLE + MELODY + AUDIOGEN + MAGNET:
        files = json.loads((folder / f"{name}.audiocraft.json").read_text())
        tensors[f"{name}.audiocraft"] = files["state_dict.bin"]["best_state"]
        compression[name] = files["compression_state_dict.bin"]
    return tensors, compression


def diffusion_in(folder: Path) -> dict[str, dict]:
    """Read {name: what is in the file of a multi-band diffusion}."""
    found = {}
    for name in DIFFUSION:
        files = json.loads((folder / f"{name}.audiocraft.json").read_text())
        (found[name],) = files.values()
    return found


def short(package: dict) -> dict:
    """What is in a file of a multi-band diffusion, its first band's model_state compact;
    those of the others are "as 0"."""
    first = package["0"]
    return package | {"0": first | {"model_state": compact(first["model_state"])}}


def rebuild(folder: Path) -> None:
    full, compression = full_manifests(folder)
    tensors = {key: compact(manifest) for key, manifest in full.items()}
    for name in MUSICGEN + MELODY:
        key = f"{name}.transformers"
        tensors[key] = share_codec(tensors[key], tensors)
    configs = {
        name: json.loads((folder / f"{name}.config.json").read_text())
        for name in OTHERS + MUSICGEN + MELODY
    }
    diffusion = diffusion_in(folder)
    stored = {"tensors": tensors, "compression": compression, "configs": configs}
    stored["diffusion"] = {name: short(package) for name, package in diffusion.items()}
    MANIFESTS.write_text(one_entry_a_line(stored))
    verify(full, compression, configs, diffusion)


def one_entry_a_line(stored: dict) -> str:
    """Minified JSON that still gives readable diffs."""
    sections = []
    for section, entries in stored.items():
        lines = [
            f"{json.dumps(k)}:{json.dumps(v, separators=(',', ':'))}"
            for k, v in entries.items()
        ]
        sections.append(f"{json.dumps(section)}:{{\n" + ",\n".join(lines) + "\n}")
    return "{" + ",\n".join(sections) + "}\n"


def verify(full: dict, compression: dict, configs: dict, diffusion: dict) -> None:
    stored = read()
    for name, package in diffusion.items():
        ours = stored["diffusion"][name]
        assert ours == short(package)
        state = package["0"]["model_state"]
        wanted = {n: (dtype, tuple(shape)) for n, (dtype, shape) in state.items()}
        assert expand(ours["0"]["model_state"]) == wanted
    for key, manifest in full.items():
        wanted = {n: (dtype, tuple(shape)) for n, (dtype, shape) in manifest.items()}
        if expand(stored["tensors"][key]) != wanted:
            raise ValueError(f"{key} does not survive the round trip.")
    assert (stored["compression"], stored["configs"]) == (compression, configs)
    print(f"{len(full)} manifests, {MANIFESTS.stat().st_size} bytes, all equal")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the full manifests are")
    rebuild(parser.parse_args().folder)
