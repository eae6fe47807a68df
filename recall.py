"""What a file's settings recall: flags of generate.py that go before those given.

    recalled(parser, ["--again", "take.wav", "--temp", "0.8"])
    # ["--prompt=slow bell", "--seed=7", ...]

A flag that is given puts what it replaces out of force, so that a file's melody does not
come with notes that are typed. Needs edit.py, job.py, magnet_job.py, messages.py,
settings.py and what these need beside it.
"""

import argparse
from pathlib import Path
from typing import Any

import settings
from edit import check_take, edited_file
from job import (
    ALL_KEYS,
    AUDIO_KEYS,
    ENDING_KEYS,
    LEVELS,
    MELODY_KEYS,
    STYLE_KEYS,
)
from magnet_job import DRAWING, is_magnet, is_of_magnet
from messages import one_line

QUANTIZATION = ("q_bits", "q_group_size", "q_mode")
OF_MODEL = ("model", "dtype", *QUANTIZATION, "adapter", "adapter_scale")
RECALLED = {*ALL_KEYS, *OF_MODEL} - {
    "output",
    "mp3_bitrate",
    "best_of",
    "keep_all",
    "rank",
}
FADES = ("fade_in", "fade_out")
KEPT = {"output", *LEVELS, *FADES, "subtype", "mp3_bitrate", "decoder"}  # --redecode's
NEW_IN_EDIT = {
    "seed",
    "duration",
    "loop",
    "bars",
    *AUDIO_KEYS,
    "ending",
    "decoder",
}  # a take's, which its part has not
UNDECODED = {"dtype", *QUANTIZATION, "adapter", "adapter_scale", "batch_size"}
REPLACES = {  # flags, and the settings of a file that they put out of force
    **dict.fromkeys(
        ("prompt", "text", "prompts"), {"prompt", "section_fade", "section_context"}
    ),
    "audio_prompt": {*AUDIO_KEYS},
    "melody": {*MELODY_KEYS, "notes"},
    "notes": {*MELODY_KEYS, "notes"},
    "style": {*STYLE_KEYS},
    "style_length": {"style_start"},
    "model": {"adapter", "adapter_scale"},
    "adapter": {"adapter", "adapter_scale"},
    "adapter_scale": {"adapter_scale"},
    "q_bits": {"q_group_size", "q_mode"},
    "q_mode": {"q_bits", "q_group_size"},
    "loudness": {"peak"},
    "peak": {"loudness"},
    "stream": {"loudness", "peak", "subtype", "drop_prompt", "decoder", *ENDING_KEYS},
    "output": {"subtype"},
}


def recalled(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """The settings of --again, --resume or --redecode, as flags to go before those
    that are given."""
    args, _ = parser.parse_known_args(argv)
    sources = [p for p in (args.again, args.resume, args.redecode) if p is not None]
    sources += (edited := edited_file(args.regenerate))
    if not sources:
        return []
    given = {k for k, v in vars(args).items() if v != parser.get_default(k)}
    if len(sources) > 1:
        parser.error(
            "--again, --resume, --redecode and --regenerate must not come together"
        )
    shaping = given & ({"prompts", "takes", *ALL_KEYS, *UNDECODED} - KEPT)
    if args.redecode and shaping:
        name = min(shaping).replace("_", "-")
        parser.error(f"--redecode takes codes as they are: leave out --{name}")
    if args.resume and args.audio_prompt:
        parser.error("--resume goes on from codes: leave out --audio-prompt")
    codes_only = args.resume or args.redecode
    if codes_only and sources[0].suffix != ".safetensors":
        flag = "--resume" if args.resume else "--redecode"
        parser.error(f"{flag} needs a .safetensors of --save-codes, got {sources[0]}")
    try:
        record = read_record(sources[0], bool(args.again), bool(args.regenerate))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {one_line(error)}\n")
    filled = refilled(record) if args.again else []
    model = args.model if args.model != parser.get_default("model") else None
    edits = sources[0] if edited else None
    wanted = staying(record, given, model, edits, bool(filled))
    flags = {f"--{k.replace('_', '-')}": v for k, v in wanted.items()}
    chosen = [
        (flag, one)
        for flag, value in flags.items()
        for one in (value if isinstance(value, list) else [value])
        if one is not None and one is not False
    ]
    found = [flag if value is True else f"{flag}={value}" for flag, value in chosen]
    found += filled
    parser.source = f"{sources[0]}: "
    parser.parse_known_args(found)
    parser.source = ""
    return found


def staying(
    record: dict[str, Any],
    given: set[str],
    model: str | None = None,
    edited: Path | None = None,
    filled: bool = False,
) -> dict[str, Any]:
    """Of the settings of a file those that hold beside the `given` ones: with another
    `model`, for an edit of the take in the file `edited`, or to fill parts of one again.
    """
    replaced = set().union(*(REPLACES.get(name, ()) for name in given))
    if filled:
        replaced |= NEW_IN_EDIT - {"seed"}
    if model is not None:
        replaced |= of_other_kind(model, record)
    if is_of_magnet(record) and "top_k" in given:  # see `magnet_job.fit`
        replaced |= {"top_p"}
    if edited:
        replaced |= NEW_IN_EDIT
        in_sound = {*LEVELS, *FADES}  # already, where the take is no codes
        replaced |= set() if edited.suffix == ".safetensors" else in_sound
    return {k: record[k] for k in (RECALLED - replaced) & record.keys()}


def of_other_kind(model: str, record: dict[str, Any]) -> set[str]:
    """Settings of a file that go where a model of another kind is given. A MAGNeT may
    not be able to last as long."""
    magnet = is_magnet(model)
    if magnet in (None, is_of_magnet(record)):
        return set()
    return {*DRAWING, "duration"} if magnet else {*DRAWING}


def read_record(
    source: Path, again: bool = False, edits: bool = False
) -> dict[str, Any]:
    """The settings of a take, for --again or to be edited; none of a sound to be edited
    that has none. Raises OSError or ValueError, also for --again of what settings alone
    do not make, and for what cannot be edited."""
    try:
        record = settings.read_settings(source)
    except ValueError:
        if edits and source.suffix != ".safetensors":
            return {}
        raise
    if edits:
        check_take(source, record)
    if again and "regenerated" in record and not refilled(record):
        raise ValueError(
            f"{source} was made by --regenerate {record.get('part')} of "
            f"{record['regenerated']!s:.150}: give that again, with --seed "
            f"{record.get('part_seed', record.get('seed'))} --candidates 1."
        )
    return record


def refilled(record: dict[str, Any]) -> list[str]:
    """Flags that fill in the parts of a MAGNeT's take again, of its settings; none of a
    take in which none were filled in."""
    told = [record.get(name) for name in ("part", "regenerated")]
    if not (is_of_magnet(record) and all(isinstance(text, str) for text in told)):
        return []
    return ["--regenerate", *told[0].split(), told[1]]
