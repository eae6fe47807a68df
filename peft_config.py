"""What `adapter_config.json` of PEFT asks for, checked.

    config = read_config(Path("brass-peft/adapter_config.json"))
    rank = by_pattern(config.get("rank_pattern"), "decoder.lm_heads.0", config["r"])
    left_out_by(config, "decoder.lm_heads.0")  # "target_modules", or None

The rules are those of the library PEFT (https://github.com/huggingface/peft). Needs
strict.py beside it.
"""

import json
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from strict import small_text

CONFIG = "adapter_config.json"
REFUSED = (  # settings that ask for another computation
    *("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora"),
    *("trainable_token_indices", "target_parameters", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
KINDS = {  # of settings; where one is null, PEFT's default holds
    "use_rslora use_dora fan_in_fan_out lora_bias use_qalora inference_mode": bool,
    "bias base_model_name_or_path revision task_type peft_version": str,
    "target_modules exclude_modules layers_pattern": (list, str),
    "layers_to_transform": (list, int),
    "modules_to_save": list,
    "rank_pattern alpha_pattern auto_mapping loftq_config": dict,
    "init_lora_weights": (bool, str),
}
WORDS = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
WORDS |= {int: "a whole number"}
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # that spare the weights
MERGED = "In PEFT merge_and_unload() and save_pretrained() make a model that loads here"


def read_config(path: Path) -> dict[str, Any]:
    """The settings of an adapter, checked. Raises ValueError naming what cannot be."""
    try:
        config = json.loads(small_text(path))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} does not load: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object, got {config!r:.40}.")
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(
            f"{path}: peft_type must be 'LORA', got {kind!r:.40}. {MERGED}."
        )
    check_kinds(path, config)
    for name in REFUSED:
        if value := config.get(name):
            raise ValueError(
                f"{path}: {name} must be off, got {value!r:.60}; it asks for what is not "
                f"ported. {MERGED}."
            )
    if (start := config.get("init_lora_weights")) not in STARTS:
        raise ValueError(
            f"{path}: init_lora_weights must leave the model's weights as they are, got "
            f"{start!r:.60}. {MERGED}."
        )
    check_numbers(path, config)
    check_modules(path, config)
    return config


def check_kinds(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError for a setting of a wrong type: "no" would count as true."""
    for names, kinds in KINDS.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        for name in names.split():
            value = config.get(name)
            if value is not None and type(value) not in kinds:
                words = ", or ".join(WORDS[kind] for kind in kinds)
                raise ValueError(f"{path}: {name} must be {words}, got {value!r:.60}.")


def check_numbers(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError unless ranks and alphas are what they can be."""
    for whole, name in ((True, "r"), (False, "lora_alpha")):
        default = config.setdefault(name, 8)
        pattern = "rank_pattern" if whole else "alpha_pattern"
        patterns = config.get(pattern) or {}
        for key, value in {name: default, **patterns}.items():
            kinds = (int,) if whole else (int, float)
            if type(value) not in kinds or not 0 < value < 1e6:
                where = name if key == name else f"{pattern} of {key:.80}"
                rule = "below 1e6" if type(value) in kinds and value > 1 else "above 0"
                if type(value) not in kinds:
                    rule = "a whole number above 0" if whole else "a number above 0"
                raise ValueError(f"{path}: {where} must be {rule}, got {value!r:.60}.")
        for key in patterns:
            check_pattern(path, key)


def check_modules(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError where PEFT could not tell which modules are meant. Warns of a
    pattern that may take for ever, which is not compared with the tensors then."""
    bias = config.get("bias") or "none"
    if bias not in ("none", "all") and not bias.endswith("_only"):
        raise ValueError(
            f"{path}: bias must be 'none', 'all' or 'lora_only', got {bias!r:.60}."
        )
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        names = config.get(name)
        is_text = isinstance(names, str)
        for pattern in [names] if is_text else names or []:
            if not isinstance(pattern, str):
                raise ValueError(
                    f"{path}: {name} must hold texts, got {pattern!r:.60}."
                )
            if (is_text or name == "layers_pattern") and is_intricate(pattern):
                warnings.warn(f"{path}: {name} is too intricate to be heeded.")
                config[name] = None
            elif is_text or name == "layers_pattern":
                check_pattern(path, pattern)


def is_intricate(key: str) -> bool:
    """Whether a regular expression may take for ever."""
    greedy = len(re.findall(r"[*+{]", key)) > 3 or re.search(r"\)[*+{]", key)
    return len(key) > 300 or bool(greedy)


def check_pattern(path: Path, key: str) -> None:
    """Raise ValueError for a regular expression that is none, or may take for ever."""
    try:
        if is_intricate(key):
            raise ValueError("it is too intricate")
        compiled(key)
    except (OverflowError, RecursionError, ValueError, re.error) as error:
        raise ValueError(f"{path} has the pattern {key!r:.80}: {error}.") from error


@lru_cache(4096)
def compiled(key: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({key})$")


def by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends in."""
    for key, value in (patterns or {}).items():
        if compiled(key).match(module):
            return value
    return default


def left_out_by(
    config: dict[str, Any], module: str, is_table: bool = False
) -> str | None:
    """The setting that keeps a low-rank change from a module, if one does: PEFT loads
    none for it. Its `check_target_module_exists`; a table is an embedding."""
    targets, dotted = config.get("target_modules"), f".{module}."
    excluded, saved = config.get("exclude_modules"), config.get("modules_to_save")
    if excluded and is_named(excluded, module):
        return "exclude_modules"
    if any(f".{name}." in dotted for name in saved or []):
        return "modules_to_save"
    if targets is None:
        return None
    if str(targets).lower() == "all-linear":
        return "target_modules" if is_table else None
    if not is_named(targets, module):
        return "target_modules"
    by_end = isinstance(targets, list) and module not in targets
    return "layers_to_transform" if by_end and not in_layers(config, module) else None


def is_named(names: str | list, module: str) -> bool:
    """Whether a regular expression is a module's name, or a list has its end."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(f".{module}".endswith(f".{name}") for name in names)


def in_layers(config: dict[str, Any], module: str) -> bool:
    """Whether a module is of the layers to transform."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns or [r"[^.]+"]:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(match[1]) in (layers if isinstance(layers, list) else [layers])
    return False
