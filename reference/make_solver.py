"""Make tiny models as audiocraft's solver saves them, and what audiocraft computes.

    python make_solver.py --audiocraft DIR

Runs after make.py. Writes `solver-audiocraft/` (with a text, bfloat16),
`textless-audiocraft/` (float16) and `stereo-textless-audiocraft/` (float32, as under
FSDP): a `checkpoint.th` each, the `state_dict.bin` that audiocraft's own `export_lm`
makes of it, and greedy codes. T5 and codec are those of `mono-audiocraft/` and
`stereo-audiocraft/`. The state has the keys, in the order, of flashy's BaseSolver and
audiocraft's MusicGenSolver; `xp.cfg` is a DictConfig, as Dora hands it to the solver.
"""

import argparse
import importlib
import json
from pathlib import Path

import make as base
import make_audiocraft
import torch
import xpcfg
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

import tiny

# What config/conditioner/none.yaml says in place of text2music.yaml.
NO_TEXT = """
classifier_free_guidance:
  training_dropout: 0
  inference_coef: 1
attribute_dropout:
  text: {}
  wav: {}
fuser:
  sum: []
  prepend: []
  cross: []
  input_interpolate: []
conditioners: null
"""
# Of the solver's own settings: none is of use to who only generates.
TRAINING = """
optim:
  epochs: 500
  lr: 1.0e-04
  optimizer: adamw
  adam:
    betas: [0.9, 0.95]
  ema:
    use: false
    updates: 1
seed: 2036
slurm:
  mem_per_gpu: 40
  constraint: null
deadlock:
  use: "${fsdp.use}"
logging:
  level: INFO
"""
SIGNATURE = "f10c7e5b"


def settings(text: str, dtype: str, fsdp: bool) -> OmegaConf:
    """The whole configuration of an experiment, as Hydra composes it."""
    cfg = OmegaConf.create(text)
    if not cfg.fuser.cross:
        none = OmegaConf.create(NO_TEXT)
        for key in none:
            cfg[key] = none[key]
    cfg = OmegaConf.merge(cfg, OmegaConf.create(TRAINING))
    cfg.autocast, cfg.autocast_dtype = not fsdp, dtype
    cfg.fsdp = {"use": fsdp, "param_dtype": dtype}
    OmegaConf.set_struct(cfg, True)
    return cfg


def model_settings(stereo: bool, text: bool) -> str:
    cfg = xpcfg.lm_cfg(stereo, layers=2, dim=16, heads=2, hidden_scale=1.5, card=64)
    return cfg if text else cfg.replace("  cross:\n  - description", "  cross: []")


def trained(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimizer with the state of a step that changes nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def save(model, cfg, path: Path, dtype: torch.dtype, fsdp: bool, whole: bool) -> None:
    """Write what `BaseSolver.save_checkpoints` writes; less than the `whole` state as
    with `checkpoint.keep_every_states`."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    best = {"model": {k: v.to(dtype) for k, v in state.items()}}
    losses = {"ce": 4.1, "ppl": 60.3, "duration": 12.5}
    checkpoint = {
        "history": [{"train": losses, "valid": losses, "epoch": 1}],
        "xp.cfg": cfg,
        "xp.sig": SIGNATURE,
        "best_state": {"model": {}} if fsdp else best,
        "fsdp_best_state": best if fsdp else {},
    }
    if whole:
        optimizer = trained(model).state_dict()
        checkpoint |= {"model": state, "optimizer": optimizer, "ema": None}
    torch.save(checkpoint, path)


def export(checkpoint: Path, target: Path) -> None:
    """audiocraft's own, whose torch.load is of before torch 2.6."""
    load = torch.load
    torch.load = lambda path, device=None: load(path, device, weights_only=False)
    try:
        module = importlib.import_module("audiocraft.utils.export")
        module.export_lm(checkpoint, target)
    finally:
        torch.load = load


def load_exported(audiocraft, path: Path):
    """As `loaders.load_lm_model`, which stumbles over `conditioners: null` where it
    deletes settings below it."""
    package = torch.load(path)
    cfg = OmegaConf.create(package["xp.cfg"])
    cfg.device, cfg.dtype = "cpu", "float32"
    if cfg.conditioners is not None:
        audiocraft.loaders._delete_param(
            cfg, "conditioners.args.merge_text_conditions_p"
        )
        audiocraft.loaders._delete_param(cfg, "conditioners.args.drop_desc_p")
    model = audiocraft.builders.get_lm_model(cfg)
    model.load_state_dict(package["best_state"])
    return model.eval()


@torch.no_grad()
def expect(audiocraft, lm, texts: list, generator) -> dict[str, Tensor] | None:
    """Codes for each of the texts and guidances, and logits without a text."""
    attributes = audiocraft.conditioners.ConditioningAttributes
    scores, arrays = [], {}

    def record(module, args, logits):
        first, *null = logits[:, :, -1]  # (R, K, V); one row where nothing guides
        scores.extend(x + coef * (first - x) for x in null or [first])

    hook = lm.register_forward_hook(record)
    for coef in (1.0, 3.0):
        rows = []
        for text in texts:
            rows.append(
                lm.generate(
                    conditions=[attributes(text={"description": text})],
                    max_gen_len=base.FRAMES,
                    use_sampling=False,
                    cfg_coef=coef,
                    check=True,
                )
            )
        arrays[f"g{coef:g}_codes"] = tiny.int32(torch.cat(rows))
    hook.remove()
    gap = tiny.smallest_gap(torch.stack(scores))
    if gap < base.SMALLEST_GAP or not alive(arrays["g3_codes"]):
        return None
    if texts == [None]:
        assert (arrays["g1_codes"] == arrays["g3_codes"]).all()
    tokens = base.delayed_tokens(lm.num_codebooks, lm.card, generator)
    arrays["tokens"] = tiny.int32(tokens)
    nothing = [attributes(text={"description": None})] * len(tokens)
    tensors = lm.condition_provider(lm.condition_provider.tokenize(nothing))
    arrays["logits"] = tiny.float32(
        lm(tokens, conditions=[], condition_tensors=tensors)
    )
    return arrays | {"gap": gap}


def alive(codes: Tensor) -> bool:
    """Whether a random model says something: many codes, few twice."""
    return all(len(row.unique()) > row.numel() / 4 for row in codes)


def make(
    audiocraft, name: str, stereo: bool, text: bool, dtype: str, fsdp: bool
) -> dict:
    folder = base.HERE / name
    folder.mkdir(exist_ok=True)
    make_audiocraft.use_local_files(audiocraft, base.HERE / "mono-audiocraft")

    def attempt(seed: int) -> dict | None:
        generator = torch.Generator().manual_seed(7000 + seed)
        cfg = settings(model_settings(stereo, text), dtype, fsdp)
        built = OmegaConf.merge(cfg, {"device": "cpu", "dtype": "float32"})
        model = audiocraft.builders.get_lm_model(built)
        tiny.fill(model, generator)
        path, kind = folder / "checkpoint.th", getattr(torch, dtype)
        save(model, cfg, path, kind, fsdp, whole=text)
        export(path, folder / "state_dict.bin")
        lm = load_exported(audiocraft, folder / "state_dict.bin")
        arrays = expect(audiocraft, lm, base.PROMPTS if text else [None], generator)
        if arrays is None:
            return None
        gap = arrays.pop("gap")
        if stereo:
            (folder / "state_dict.bin").unlink()  # the others show what is exported
        save_file(arrays, folder / "expected.safetensors")
        return {"source": "audiocraft", "smallest_logit_gap": gap, "dtype": dtype}

    return {name: base.search(attempt, name)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--audiocraft", type=Path, required=True)
    audiocraft = make_audiocraft.import_audiocraft(parser.parse_args().audiocraft)
    about = make(audiocraft, "solver-audiocraft", False, True, "bfloat16", False)
    about |= make(audiocraft, "textless-audiocraft", False, False, "float16", False)
    about |= make(
        audiocraft, "stereo-textless-audiocraft", True, False, "float32", True
    )
    path = base.HERE / "expected.json"
    known = json.loads(path.read_text())
    tiny.write_json(path, known | about)


if __name__ == "__main__":
    main()
