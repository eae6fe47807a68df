"""A file of prompts: its lines as jobs, and which of them are left to make.

    jobs = plan_file(Path("prompts.jsonl"), dict(seed=0, output="song.wav"))
    jobs, messages = left(jobs, {"model": "small"})

A line is a prompt, or a JSON object with any of the settings. What was made with the
settings of its line, which stand in the sound file, is not made again. Needs job.py,
jobs.py, magnet_job.py, settings.py, outputs.py, hub.py, options.py, strict.py and what
these need beside it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from endings import FADE
from hub import MODELS, follows, local, same_model
from job import ALL_KEYS, Job, make_job, numbered
from jobs import agree
from magnet_job import DRAWING, is_of_magnet
from options import Options
from outputs import identity, in_words, is_there
from sections import Sections
from settings import read_settings
from strict import in_a_line, small_text

ALIASES = {"guidance": "guidance_coef", "negative": "negative_prompt"}
DURATIONS = (8.0, 5.0)  # seconds that models take where none are given
OF_MAGNETS = (10.0, 30.0)  # likewise
MODEL_DEFAULTS = {"model": None, "adapter_scale": 1.0}  # defaults of a record
DEFAULTS = asdict(Options()) | MODEL_DEFAULTS


@in_a_line
def plan_file(path: Path, values: dict[str, Any]) -> list[Job]:
    """Jobs for the lines of a file: a prompt each, or a JSON object with any of the
    settings; `values` are those that a line does not give. A line with a value that
    cannot be is a job with a fault; one without a prompt goes with a model that
    `may_lack_text`. Raises ValueError naming the line that is neither, has an unknown
    key, or the output of another line."""
    lines, jobs, outputs = list(read_lines(path)), [], {}
    seed = values["seed"]  # the next one that no line takes
    for i, (number, overrides) in enumerate(lines):
        default = dict(seed=seed)
        default["output"] = numbered(values["output"], i, max(len(lines), 2))
        if may_lack := values.get("may_lack_text", False):  # null is none, too
            overrides = {k: v for k, v in overrides.items() if v is not None}
        if not (prompted := "prompt" in overrides):
            default["prompt"] = ""
        if not (prompted or may_lack):
            raise ValueError(f"{path}, line {number} must have a prompt.")
        try:
            job = make_job(values | default | overrides, number, {*overrides})
        except (TypeError, ValueError) as error:
            jobs.append(faulty(default, number, error))
            seed += values.get("best_of") or 1
            continue
        seed += job.best_of or 1
        kind = follows(str(values.get("model", "")))
        for name, followed in job.follows.items():
            if kind is not None and followed != kind:
                fault = f"{name} needs a model that follows one; this does not."
                job = replace(job, fault=fault)
        for output in job.outputs():
            place = identity(output)
            if place in outputs:
                raise ValueError(
                    f"{path}, line {number}: its output {output} is that of line "
                    f"{outputs[place]}, too."
                )
            outputs[place] = number
        fixed = "seed" in overrides or values.get("seed_is_given", True)
        jobs.append(replace(job, seed_is_given=bool(fixed), prompt_is_given=prompted))
    if not jobs:
        raise ValueError(f"{path} must hold a prompt in a line, but holds none.")
    check_used(path, values, jobs)
    return jobs


def check_used(path: Path, values: dict[str, Any], jobs: list[Job]) -> None:
    """Raise ValueError for a setting of a score that would change no line. A line with a
    fault, which is told, might have used it."""
    sections = any(isinstance(job.prompt, Sections) for job in jobs)
    many = any(job.best_of for job in jobs)
    uses = dict(bars=("a loop", any(job.loop is not None for job in jobs)))
    uses |= dict.fromkeys(("section_fade", "section_context"), ("sections", sections))
    uses |= dict.fromkeys(("keep_all", "rank"), ("a best_of", many))
    for name, (wanted, used) in uses.items():
        given = values.get(name) not in (None, False)
        if given and not used and not any(job.fault for job in jobs):
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} changes nothing: no line of {path} has {wanted}. Leave it out."
            )


def faulty(default: dict[str, Any], number: int, error: Exception) -> Job:
    """A job that says what is wrong with its line."""
    job = make_job(default | {"prompt": ""}, number)
    return replace(job, fault=str(error))


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and settings of each line that is not empty.

    The file is JSON Lines if it is called so, or its first such line begins with a
    brace or bracket.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {in_words(error)}.") from error
    filled = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    named = path.suffix in (".json", ".jsonl", ".ndjson")
    json_lines = named or bool(filled) and filled[0][1].startswith(("{", "["))
    for number, line in filled:
        yield number, parse_line(path, number, line) if json_lines else {"prompt": line}


def parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        line_settings = json.loads(line)
    except json.JSONDecodeError as error:
        wrong = f"is no JSON: {error.msg} at character {error.pos + 1}"
        raise ValueError(f"{path}, line {number} {wrong}.") from error
    except (ValueError, RecursionError) as error:  # too long a number, or too deep
        raise ValueError(f"{path}, line {number} is no JSON: {error}.") from error
    if not isinstance(line_settings, dict):
        raise ValueError(f"{path}, line {number} must be an object, got {line:.40}")
    overrides = {
        ALIASES.get(k, k.replace("-", "_")): v
        for k, v in line_settings.items()
        if v is not None or k == "prompt"  # null: as if it were not there
    }
    if unknown := overrides.keys() - {*ALL_KEYS}:
        raise ValueError(
            f"{path}, line {number} has the unknown key '{min(unknown)}'; known are "
            f"{', '.join(sorted(ALL_KEYS))}."
        )
    return overrides


def left(
    jobs: list[Job],
    given: dict[str, Any],
    force: bool = False,
    every: list[Job] | None = None,
) -> tuple[list[Job], list[str]]:
    """Jobs that are to be made, and why the others are not, or are made again.

    `given` are settings of the model by their names in a sound file. What is there is
    made again where other settings stand in it, or where `force` says so; what holds
    none is left alone, for it may be anybody's. What a line of `every` one reads is not
    overwritten by another: that is a fault.
    """
    wanted, messages = [], []
    own = own_settings(str(given.get("model", "")))
    read_by = {
        identity(path): job.line
        for job in (jobs if every is None else every)
        for path in job.inputs().values()
    }
    for job in jobs:
        there = [output for output in job.outputs() if is_there(output)]
        if job.fault or not there or job.output.is_dir():
            wanted.append(job)
            continue
        message = "" if force else already_made(job, given, own)
        readers = {path: read_by.get(identity(path), job.line) for path in there}
        read = [path for path, line in readers.items() if line != job.line]
        if message.startswith("skipped"):
            messages.append(message)
        elif read:
            line = readers[read[0]]
            fault = f"its output {read[0]} is what line {line} reads: rename one."
            wanted.append(replace(job, fault=fault))
        else:
            wanted.append(replace(job, overwrite=True))
            messages += [message] if message else []
    return wanted, messages


def already_made(job: Job, given: dict[str, Any], own: dict[str, Any]) -> str:
    """Why a job is skipped, or is made again, of whose files some or all are there."""
    changed = []
    for output in job.outputs():
        if not is_there(output):
            changed.append(f"{output} is missing")
            continue
        try:
            found = differences(job, given, own, read_settings(output))
        except (OSError, ValueError):
            return (
                f"skipped {output}, which is there but was not made by generate.py: "
                "--force overwrites it"
            )
        changed += [one for one in found if one not in changed]
    if changed:
        return f"{job.output} is made again: {'; '.join(changed)}"
    return f"skipped {job.output}: it is there, with these settings"


def agreed(
    jobs: list[Job], wanted: list[Job], group: mx.distributed.Group
) -> list[Job]:
    """Of the jobs those that the first process of a group wants."""
    mine = {job.line: job for job in wanted}
    flags = [int(group.rank() == 0 and job.line in mine) for job in jobs]
    kept = zip(jobs, agree(flags, group))
    return [mine.get(job.line, job) for job, keep in kept if keep]


def own_settings(model: str) -> dict[str, Any]:
    """What a model takes where nothing is given, as far as that is known without reading
    its weights: a released one, or a folder with a config.json. Else nothing."""
    folder = local(model)
    if folder is None and (model in MODELS or model in MODELS.values()):
        return {"duration": own_duration(model), "q_bits": None}
    try:
        config = json.loads(small_text(folder / "config.json"))
        stored = config.get("quantization") or {}
        own = "default_duration" if config.get("masking") is None else "max_duration"
        duration = config.get(own, DURATIONS[0])
        return {"duration": duration, "q_bits": stored.get("bits")}
    except (AttributeError, OSError, TypeError, ValueError):
        return {}


def own_duration(model: str) -> float:
    """Seconds that a released model takes where none are given."""
    if "magnet" in model:
        return OF_MAGNETS["30secs" in model]
    music, sounds = DURATIONS
    return sounds if "audiogen" in model else music


def as_recorded(job: Job, record: dict[str, Any]) -> Job:
    """The job as of the kind of model that made the file, where that is not known yet;
    of another kind the model's name tells."""
    try:
        return job.fitted(is_of_magnet(record))
    except ValueError:
        return job


def differences(
    job: Job, given: dict[str, Any], own: dict[str, Any], record: dict[str, Any]
) -> list[str]:
    """What is other in a sound file's record than the job asks for. `own` is what the
    model takes where nothing is given."""
    job, defaults, durations = as_recorded(job, record), DEFAULTS, DURATIONS
    if is_of_magnet(record):
        defaults, durations = MODEL_DEFAULTS, OF_MAGNETS
    wanted = dict.fromkeys({*ALL_KEYS} - {"output"}) | job.record() | given
    if job.best_of and "first_seed" in record:  # the file's own is the best one's
        record = record | dict(seed=record["first_seed"])
    wanted["keep_all"] = record.get("keep_all")  # of files beside this one
    if job.magnet not in (None, is_of_magnet(record)):  # which the model's name tells
        for name in DRAWING & wanted.keys():
            del wanted[name]
    if not job.seed_is_given:
        del wanted["seed"]
    for name, value in own.items():
        if wanted.get(name) is None:
            wanted[name] = value
    unsaid = own == {} and job.options.duration is None
    if unsaid and record.get("duration") in durations:
        del wanted["duration"]  # only the model's files tell which
    if wanted["style_start"] is None:  # drawn by the seed
        del wanted["style_start"]
    if "fade_out" not in record and wanted["fade_out"] == FADE:
        del wanted["fade_out"]  # older files have none
    if wanted.get("adapter") != record.get("adapter"):  # that alone is told
        wanted.pop("adapter_hash", None)
    if "q_bits" in record:
        record = {"q_mode": "affine"} | record  # older files do not say so
    changed = []
    for name, value in sorted(wanted.items()):
        before = record.get(name, defaults.get(name))
        if name == "adapter_hash":  # older files do not tell it
            same = None in (before, value) or before == value
        elif name == "model":
            same = isinstance(before, str) and same_model(before, value)
        else:
            unset = all(x is None or x is False for x in (before, value))
            same = unset or before == value
        if not same:
            changed.append(f"{name} was {before!r:.60} and is {value!r:.60}")
    return changed
