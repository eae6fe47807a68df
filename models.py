"""The released models: what they follow, how large they are, and which are here.

    python models.py  # or generate.py --list-models

prints all of them, with what lies in the Hub's cache; no network is asked, and no model
is loaded. Needs hub.py and outputs.py beside it.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from hub import AUDIOCRAFT_FILES, BESIDE, MAGNETS, MODELS, follows
from outputs import print_result

CODEC = "facebook/encodec_32khz"
T5, T5_LARGE = "google-t5/t5-base", "google-t5/t5-large"
MERT = "m-a-p/MERT-v1-95M"
PARTS = {  # other repositories: the files that are fetched of them, and their GB
    CODEC: (("config.json", "model.safetensors"), 0.236),
    T5: (("config.json", "model.safetensors", "spiece.model"), 0.8917),
    T5_LARGE: (("config.json", "model.safetensors", "spiece.model"), 2.951),
    MERT: (("config.json", "pytorch_model.bin"), 0.378),
}


class Model(NamedTuple):
    """A released model; sizes are about, in GB of 10**9 bytes."""

    decoder: float  # its `state_dict.bin`
    memory: float  # that a take of one window needs, decoder in 16 bits, with guidance
    codec: float = 0.0  # its `compression_state_dict.bin`, which may only name a codec
    parts: tuple[str, ...] = (T5,)  # what else is fetched

    @property
    def download(self) -> float:
        """GB, of all that is fetched."""
        return self.decoder + self.codec + sum(PARTS[part][1] for part in self.parts)


RELEASED = {
    "small": Model(0.841, 2.5, 0.236),
    "medium": Model(3.678, 5.4, 0.236),
    "large": Model(6.514, 8.4, 0.236),
    "stereo-small": Model(0.874, 2.5, parts=(CODEC, T5)),
    "stereo-medium": Model(3.728, 5.4, parts=(CODEC, T5)),
    "stereo-large": Model(6.581, 8.4, parts=(CODEC, T5)),
    "melody": Model(2.771, 4.8, 0.236),
    "melody-large": Model(4.903, 7.3, parts=(CODEC, T5)),
    "stereo-melody": Model(2.822, 4.8, parts=(CODEC, T5)),
    "stereo-melody-large": Model(4.970, 7.4, parts=(CODEC, T5)),
    "style": Model(2.837, 5.1, parts=(CODEC, T5, MERT)),
    "audiogen-medium": Model(3.678, 6.2, 0.236, (T5_LARGE,)),
    **dict.fromkeys(MAGNETS[0:4:2], Model(0.841, 2.5, 0.236)),  # of 10 s and of 30 s
    **dict.fromkeys(MAGNETS[1:4:2], Model(3.678, 5.4, 0.236)),
    "audio-magnet-small": Model(0.841, 3.4, 0.236, (T5_LARGE,)),
    "audio-magnet-medium": Model(3.678, 6.2, 0.236, (T5_LARGE,)),
}
HEAD = ("--model", "follows", "makes", "download", "memory", "in the cache")
FOOT = """
Sizes are about. Most models share T5 and codec, which are fetched once. Memory: what a
take of one window needs with the decoder in 16 bits; computed, not measured on a Mac.
The cache is"""


def missing(name: str) -> float:
    """GB of a released model that are not in the Hub's cache."""
    model = RELEASED[name]
    sizes = (model.decoder, model.codec)
    wanted = [(MODELS[name], [f], gb) for f, gb in zip(AUDIOCRAFT_FILES, sizes)]
    wanted += [(part, *PARTS[part]) for part in model.parts]
    absent = [
        max(gb, 0.001)  # what only names a codec is to be fetched, too
        for repo, files, gb in wanted
        if not all(is_cached(repo, file) for file in files)
    ]
    return sum(absent)


def is_cached(repo: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(repo, file), str)
    except (OSError, ValueError):  # a damaged entry
        return False


def rows() -> Iterator[tuple[str, ...]]:
    """Of each model: its name, what it follows, what it makes, GB to download and of
    memory, and what of it is in the Hub's cache."""
    for name in MODELS:
        kind = follows(name)
        told = f"text and {kind}" if kind else "text"
        makes = "sounds" if name.startswith("audio") else "music"
        makes += ", stereo" if name.startswith("stereo") else ""
        if name in BESIDE:
            yield name, told, makes, "none", "any", "beside the scripts"
            continue
        model, left = RELEASED[name], missing(name)
        cached = f"all but {left:.1f} GB" if left >= 0.05 else "all but a few KB"
        if left == 0:
            cached = "yes"
        elif left > model.download - 0.05:
            cached = "no"
        yield name, told, makes, f"{model.download:.1f} GB", f"{model.memory} GB", cached


def table() -> str:
    """All models, a line each, and what the columns mean."""
    from huggingface_hub import constants

    lines = [HEAD, *rows()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join(padded) + f"\n{FOOT} {constants.HF_HUB_CACHE}."


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the released models.")
    parser.parse_args()
    print_result(table())


if __name__ == "__main__":
    main()
