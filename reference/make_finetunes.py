"""Make tiny fine-tunes as transformers 5 saves them, and what it computes with them.

    python make_finetunes.py

writes `finetune-bfloat16/`, mono, and `finetune-float16/`, stereo: whole models in
these types, by `save_pretrained`, with `tokenizer.json` but no `spiece.model`, which is
kept in `t5-base/`. What is expected was computed in float32, from these weights. Needs
torch, transformers 5 with sentencepiece and protobuf.
"""

import json
from pathlib import Path

import make as base
import torch
import transformers

import tiny

SIZES = {"hidden_size": 48, "num_attention_heads": 3, "ffn_dim": 80}  # of no release
KINDS = {  # name: stereo, type of the weights
    "finetune-bfloat16": (False, torch.bfloat16),
    "finetune-float16": (True, torch.float16),
}


def random_model(stereo: bool, generator: torch.Generator) -> torch.nn.Module:
    config = base.musicgen_config(stereo)
    config["decoder"] |= SIZES | {"num_hidden_layers": 1}
    config["text_encoder"].pop("n_positions")  # as in what was never published
    parsed = transformers.MusicgenConfig.from_dict(config)
    model = transformers.MusicgenForConditionalGeneration(parsed).eval()
    base.random_state(model, [model.enc_to_dec_proj], generator)
    special = config["decoder"]["pad_token_id"]
    model.generation_config.update(  # as musicgen-dreamboothing does
        bos_token_id=special,
        pad_token_id=special,
        decoder_start_token_id=special,
        guidance_scale=3.0,
        max_length=1500,
    )
    return model


def save_tokenizer(folder: Path, spiece: bytes) -> None:
    """`tokenizer.json` made of a `spiece.model`, which is kept in `t5-base/`."""
    path = folder / "t5-base" / "spiece.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(spiece)
    tokenizer = transformers.T5Tokenizer.from_pretrained(path.parent)
    tokenizer.save_pretrained(folder)


def make(name: str, stereo: bool, dtype: torch.dtype, spiece: bytes) -> dict:
    folder = base.HERE / name
    save_tokenizer(folder, spiece)

    def attempt(seed: int) -> dict | None:
        generator = torch.Generator().manual_seed(4000 + 1000 * stereo + seed)
        random_model(stereo, generator).to(dtype).save_pretrained(folder)
        return base.expect_musicgen(folder, generator)

    return base.search(attempt, name)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    spiece = tiny.tokenizer("identity")
    made = {name: make(name, *kind, spiece) for name, kind in KINDS.items()}
    path = base.HERE / "expected.json"
    tiny.write_json(path, json.loads(path.read_text()) | made)


if __name__ == "__main__":
    main()
