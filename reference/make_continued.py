"""Make the reference values of continued and extended generation.

    python make_continued.py --audiocraft DIR

Runs after make.py, on the checkpoints it wrote, and writes `continued.safetensors`
into each: an audio prompt, its codes, and the greedy codes that continue them, in
one window by transformers and audiocraft, in several by audiocraft alone.
"""

import argparse
import json
from pathlib import Path

import make as base
import make_audiocraft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import tiny

FRAMES = 15  # of a window
LONG = 40  # frames made with windows
STRIDE = 9
PROMPT_SAMPLES = 2 * 640 + 77  # the third frame is not full
FRAME_RATE = 50


def close_call(scores: list[Tensor]) -> bool:
    """Whether the best two of any step's last logits (K, V) nearly tie."""
    return tiny.smallest_gap(torch.stack(scores)) < base.SMALLEST_GAP


def audiocraft_values(audiocraft, folder: Path, generator) -> dict | None:
    musicgen = audiocraft.musicgen.MusicGen
    lm = audiocraft.loaders.load_lm_model(str(folder))
    codec = audiocraft.loaders.load_compression_model(str(folder))
    model = musicgen("tiny", codec, lm, max_duration=30)
    codec = model.compression_model  # for stereo, now that of both channels
    model.max_duration = FRAMES / FRAME_RATE  # less than its default stride allows
    sound = tiny.music(codec.channels, PROMPT_SAMPLES, generator)[:1].contiguous()
    prompt, _ = codec.encode(sound)
    arrays, scores = {"audio": sound, "codes": tiny.int32(prompt)}, []

    def record(module, args, logits):
        with_text, without = logits[:, :, -1]  # (2, K, S, V)
        scores.append(without + (with_text - without) * 3.0)

    hook = lm.register_forward_hook(record)
    cases = {"continued": (FRAMES, prompt), "extended": (LONG, None)}
    cases["continued_extended"] = (LONG, prompt)
    for name, (frames, known) in cases.items():
        model.set_generation_params(
            use_sampling=False,
            duration=(frames + 0.5) / FRAME_RATE,
            extend_stride=STRIDE / FRAME_RATE,
            cfg_coef=3.0,
        )
        attributes, _ = model._prepare_tokens_and_attributes(base.PROMPTS[:1], None)
        codes = model._generate_tokens(attributes, known)
        assert codes.shape[-1] == frames, codes.shape
        arrays[name] = tiny.int32(codes)
    hook.remove()
    return None if close_call(scores) else arrays


def transformers_values(folder: Path, generator) -> dict | None:
    model = base.load(transformers.MusicgenForConditionalGeneration, folder)
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
    channels = model.decoder.config.audio_channels
    sound = tiny.music(channels, PROMPT_SAMPLES, generator)[:1].contiguous()
    inputs = tokenizer(base.PROMPTS[:1], return_tensors="pt")
    known = -(-PROMPT_SAMPLES // 640)
    with base.captured_codes(model) as captured:
        output = model.generate(
            **inputs,
            input_values=sound,
            do_sample=False,
            guidance_scale=3.0,
            max_new_tokens=FRAMES - known + 3,
            return_dict_in_generate=True,
            output_scores=True,
        )
    codes = captured[0]
    if len(captured) == 2:
        codes = torch.stack(captured, 2).flatten(1, 2)  # left, right, left...
    if close_call(list(output.scores)):
        return None
    return {
        "audio": sound,
        "codes": tiny.int32(codes[..., :known]),
        "continued": tiny.int32(codes),
    }


def make(audiocraft, name: str) -> dict:
    folder = base.HERE / name
    by_audiocraft = name.endswith("audiocraft")
    if by_audiocraft:
        make_audiocraft.use_local_files(audiocraft, folder)

    @torch.no_grad()
    def attempt(seed: int) -> dict | None:
        generator = torch.Generator().manual_seed(seed)
        if by_audiocraft:
            arrays = audiocraft_values(audiocraft, folder, generator)
        else:
            arrays = transformers_values(folder, generator)
        if arrays is None:
            return None
        save_file(arrays, folder / "continued.safetensors")
        return {"frames": FRAMES, "stride": STRIDE}

    return base.search(attempt, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audiocraft", type=Path, required=True)
    args = parser.parse_args()
    audiocraft = make_audiocraft.import_audiocraft(args.audiocraft)
    names = [
        f"{k}-{kind}"
        for k in ("mono", "stereo")
        for kind in ("audiocraft", "transformers")
    ]
    made = {name: make(audiocraft, name) for name in names}
    (base.HERE / "continued.json").write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
