"""Make two tiny MAGNeTs in audiocraft's layout, and what audiocraft's MAGNeT makes.

    python make_magnet.py --audiocraft DIR

writes `magnet-audiocraft/` (music of 32 kHz, T5 in `t5-base/`) and
`audio-magnet-audiocraft/` (sounds of 16 kHz, T5 in `t5-large/`) beside this file. Runs
after make.py and make_audiogen.py, of whose folders it takes the codec and T5 as they
are. Needs what make_audiocraft.py needs.
"""

import argparse
import importlib
import json
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import make as base
import make_audiocraft
import make_audiogen
import torch
import transformers
import xpcfg
from safetensors.torch import save_file
from torch import Tensor

import tiny

NAMES = ("magnet-audiocraft", "audio-magnet-audiocraft")
CODECS = ("mono-audiocraft", "audiogen-audiocraft")  # of these folders, byte for byte
T5S = {"t5-base": base.T5, "t5-large": make_audiogen.T5}
EQUAL = (  # as many tokens each: audiocraft attends to the padding of shorter ones
    ["fast techno with a heavy kick drum", "sad violin in a large cathedral"],
    ["thunder and heavy rain", "birds sing in a forest"],
)
MIXED = (
    base.PROMPTS,
    ["rain on a tin roof", "wind", "footsteps on gravel, then a door"],
)
PROMPT = 7  # frames: two spans of three, and a part of the third
FRAMES = 64  # of `logits`, so that a window of 5 frames on each side is a part of them
SHORT = [
    5,
    4,
    3,
    2,
]  # steps of each stage, where the usual 20, 10, 10, 10 are not meant
NEVER = -1e3  # scores below are of what is never masked again

# Scores of spans are probabilities at a temperature of 0.01, where logits of a usual
# size all give 1, and the order of ties is nobody's. So these are weak.
WEAK = 2.0**-10
MASK = 2.0**-4  # of what stands for a masked token, beside the position
SMALLEST_CUT = 1e-4  # between the last span masked and the first that is not
SMALLEST_GAP = 4e-4  # between the best two tokens, in log-probability
FAR_CUT = 0.02  # of sums with a -10000 in them, of which float32 keeps 0.001

CHANGES = {  # from MusicGen's settings to those of config/solver/magnet/*.yaml
    "solver: musicgen": "solver: magnet\nefficient_attention_backend: xformers",
    "segment_duration: 30": "segment_duration: 10",
    "lm_model: transformer_lm": "lm_model: transformer_lm_magnet",
    "modeling: delay": "modeling: parallel\n  parallel:\n    empty_initial: -1",
    "causal: true": "causal: false\n  subcodes_context: 5\n"
    "  compression_model_framerate: 50\n  segment_duration: 0\n  span_len: -1",
    "classifier_free_guidance:": """masking:
  span_len: 3
generate:
  every: 25
  path: samples
  lm:
    max_prompt_len: null
    max_gen_len: null
    remove_prompts: false
    use_sampling: true
    temp: 3.0
    top_k: 0
    top_p: 0.9
    max_cfg_coef: 10.0
    min_cfg_coef: 1.0
    decoding_steps: [60, 10, 10, 10]
    anneal_temp: true
    span_scoring: max
    span_arrangement: nonoverlap
    prompted_samples: false
classifier_free_guidance:""",
}
SOUND_CHANGES = {  # and on to audio-MAGNeT's; the solver fills in what the yaml leaves open
    "solver: magnet": "solver: audio_magnet",
    "sample_rate: 32000": "sample_rate: 16000",
    "//pretrained/facebook/encodec_32khz": "//reference/bd44a852/checkpoint.th",
    "  segment_duration: 0\n  span_len: -1": "  segment_duration: 10\n  span_len: 3",
    "temp: 3.0": "temp: 3.5",
    "top_p: 0.9": "top_p: 0.8",
    "max_cfg_coef: 10.0": "max_cfg_coef: 20.0",
    "decoding_steps: [60": "decoding_steps: [20",
    "training_dropout: 0.3": "training_dropout: 0.1",
    "name: t5-base": "name: t5-large",
    "word_dropout: 0.3": "word_dropout: 0.0",
}


# The files


def magnet_cfg(sound: bool) -> str:
    text = xpcfg.lm_cfg(False, layers=2, dim=32, heads=2, hidden_scale=1.5, card=64)
    for old, new in (CHANGES | (SOUND_CHANGES if sound else {})).items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def copy_parts(folder: Path, source: Path, t5: str) -> None:
    (folder / t5).mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "spiece.model", "model.safetensors"):
        shutil.copy(source / t5 / name, folder / t5 / name)
    name = "compression_state_dict.bin"
    shutil.copy(source / name, folder / name)


def save_lm(audiocraft, folder: Path, text: str, generator: torch.Generator) -> None:
    from omegaconf import OmegaConf

    cfg = OmegaConf.create(text)
    cfg.device, cfg.dtype = "cpu", "float32"
    model = audiocraft.builders.get_lm_model(cfg)
    tiny.fill(model, generator)
    with torch.no_grad():
        for linear in model.linears:
            linear.weight.mul_(WEAK)
        for table in model.emb:  # or all masked frames say the same
            table.weight[model.special_token_id].mul_(MASK)
    make_audiogen.save_part(model, text, torch.float16, folder / "state_dict.bin")


def load(audiocraft, folder: Path):
    """audiocraft's MAGNeT of the files, by its own loaders."""
    module = importlib.import_module("audiocraft.models.magnet")
    codec = audiocraft.loaders.load_compression_model(str(folder))
    rate = int(codec.frame_rate)
    lm = audiocraft.loaders.load_lm_model_magnet(str(folder), rate)
    return module.MAGNeT(name="tiny", compression_model=codec, lm=lm)


def memory_efficient_attention(query, key, value, bias=None, p=0.0) -> Tensor:
    """What xformers computes under this name: (B, T, H, D), `bias` is added to scores.

    audiocraft's loader asks for the xformers backend, since that of torch takes any mask
    for a causal one. The rest of that path is audiocraft's; only xformers' kernel, which
    is not here, is torch's, with the mask as it is.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, attn_mask=bias, dropout_p=p).transpose(1, 2)


# Close calls


class Watch:
    """Follows a generation of audiocraft's: how close each choice was."""

    def __init__(self, lm):
        self.lm, self.masks, self.gaps, self.cuts = lm, [], [], []

    @contextmanager
    def watch(self):
        softmax, topk = torch.softmax, Tensor.topk
        spans = self.lm._least_probable_span_masking
        construct = self.lm._construct_spans_mask

        def model(sequence, conditions, tensors, stage):
            rows = sequence[: len(sequence) // 2, stage]
            self.masks.append((stage, rows == self.lm.special_token_id))
            return self.lm(sequence, conditions, tensors, stage=stage)

        def watch_softmax(logits, dim):
            logs = logits[:, 0].log_softmax(-1)
            best, second = topk(logs, 2).values.unbind(-1)
            self.gaps.append(best - second)
            return softmax(logits, dim)

        def watch_topk(scores, k, dim=-1):
            self.cuts += [cut(row[0], k) for row in scores]
            return topk(scores, k, dim)

        def watch_spans(scores, target):
            built = []

            def watch_construct(starts, T, device):
                built.append(len(starts))
                return construct(starts, T, device)

            with patch.object(self.lm, "_construct_spans_mask", watch_construct):
                mask = spans(scores, target)
            if scores.max() > 0:  # else it is a stage's first step, which masks all
                self.cuts.append(self.span_cut(scores[0, 0], built, target))
            return mask

        with ExitStack() as stack:
            stack.enter_context(patch.dict(self.lm.__dict__, {"_fsdp": model}))
            stack.enter_context(patch.object(torch, "softmax", watch_softmax))
            stack.enter_context(patch.object(Tensor, "topk", watch_topk))
            name = "_least_probable_span_masking"
            stack.enter_context(patch.object(self.lm, name, watch_spans))
            yield

    def span_cut(self, scores: Tensor, built: list[int], target: int) -> float:
        """The closest cut of a search for the number of spans, of those that count: the
        last one's order, and the others' unless what lies clearly above is too much."""
        sums = scores.unfold(0, 3, 1).sum(-1)
        cuts = []
        for number in built:
            clear = (sums > sums.sort().values[-number] + FAR_CUT).nonzero()[:, 0]
            covered = {
                frame for start in clear.tolist() for frame in range(start, start + 3)
            }
            if number == built[-1] or len(covered) <= max(target, 3):
                cuts.append(cut(sums, number))
        return min(cuts)

    def smallest_gap(self) -> float:
        """Over the tokens that stay: another mask on them would make them again."""
        smallest = float("inf")
        after = [*self.masks[1:], (None, None)]
        for (stage, mask), (next_stage, next_mask), gap in zip(
            self.masks, after, self.gaps
        ):
            kept = mask & ~next_mask if stage == next_stage else mask
            smallest = min([smallest, *gap[kept].tolist()])
        return smallest


def cut(scores: Tensor, number: int) -> float:
    """By how much the last of `number` is above the next; as much weaker as FAR_CUT is
    to SMALLEST_CUT where a -10000 takes a part of its precision."""
    ordered = scores.sort(descending=True).values
    if number >= len(ordered):
        return float("inf")
    gap = (ordered[number - 1] - ordered[number]).item()
    return gap * SMALLEST_CUT / FAR_CUT if ordered[number - 1] < NEVER else gap


# What audiocraft computes


def cases(folder_index: int, prompt: Tensor) -> dict[str, tuple]:
    """name: (texts, codes to begin with, seconds, settings). Those of `annealed` are
    likeliest tokens, too: so small a top_p leaves one, and the scores are of temp."""
    equal, mixed = EQUAL[folder_index], MIXED[folder_index]
    likeliest = {"use_sampling": False, "temperature": 0.0}
    short = likeliest | {"decoding_steps": SHORT}
    stride1 = {"span_arrangement": "stride1"}
    annealed = {"temperature": 0.04, "top_p": 1e-6, "decoding_steps": SHORT}
    annealed |= {"max_cfg_coef": 8.0, "min_cfg_coef": 2.0}
    alone = {
        f"alone_{i}": ([text], None, 1.02, likeliest) for i, text in enumerate(mixed)
    }
    return alone | {
        "batch": (equal, None, 1.0, likeliest),
        "prompted": (equal, prompt, 1.02, short),
        "annealed": (equal, None, 1.0, annealed),
        "stride1": (equal, None, 1.0, likeliest | stride1),
        "stride1_prompted": (equal, prompt, 1.0, short | stride1),
        "stride1_annealed": (equal, None, 1.0, annealed | stride1),
    }


@torch.no_grad()
def expect(audiocraft, folder: Path, generator: torch.Generator) -> dict | None:
    model = load(audiocraft, folder)
    index = NAMES.index(folder.name)
    prompt = torch.randint(0, 64, (2, 4, PROMPT), generator=generator)
    arrays, gaps, cuts, settings = {"prompt": tiny.int32(prompt)}, [], [], {}
    for name, (texts, codes, seconds, how) in cases(index, prompt).items():
        model.duration = seconds
        model.set_generation_params(**how)
        watch = Watch(model.lm)
        with watch.watch():
            attributes, _ = model._prepare_tokens_and_attributes(texts, None)
            codes = model._generate_tokens(attributes, codes)
        gaps.append(watch.smallest_gap())
        cuts.append(min(watch.cuts))
        if gaps[-1] < SMALLEST_GAP or cuts[-1] < SMALLEST_CUT or dull(codes):
            return None
        arrays[f"{name}_codes"] = tiny.int32(codes)
        settings[name] = {"texts": texts, "seconds": seconds} | how
    first = arrays["alone_0_codes"][:, :, :15].long()
    arrays["audio"] = tiny.float32(model.generate_audio(first))
    arrays |= expect_logits(model, EQUAL[index][0], generator)
    drawn = expect_draws(audiocraft, model.lm, generator)
    if drawn is None:
        return None
    arrays |= drawn
    if folder.name == NAMES[0]:  # of any model alike
        arrays |= expect_counts(audiocraft, model.lm)
    save_file(arrays, folder / "expected.safetensors")
    closest = {"smallest_gap": min(gaps), "smallest_cut": min(cuts)}
    return {"source": "audiocraft", "cases": settings} | closest


def dull(codes: Tensor) -> bool:
    return base.dull(codes.flatten(0, 1))


def expect_logits(model, text: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Of each stage: what it may see, masked in part, and its logits (1, T, V)."""
    lm, arrays = model.lm, {}
    attributes, _ = model._prepare_tokens_and_attributes([text], None)
    tensors = lm.condition_provider(lm.condition_provider.tokenize(attributes))
    codes = torch.randint(0, lm.card, (1, 4, FRAMES), generator=generator)
    for stage in range(4):
        tokens = codes.clone()
        tokens[:, stage + 1 :] = lm.special_token_id
        hidden = torch.rand(FRAMES, generator=generator) < 0.6
        tokens[:, stage, hidden] = lm.special_token_id
        logits = lm(tokens, [], tensors, stage=stage)
        arrays[f"stage_{stage}_tokens"] = tiny.int32(tokens)
        arrays[f"stage_{stage}_logits"] = tiny.float32(logits[:, stage])
    return arrays


RULES = {"all": {}, "top_k": {"top_k": 5}, "top_p": {"top_p": 0.8}}
RULES |= {"both": {"top_k": 5, "top_p": 0.6}}


def expect_draws(audiocraft, lm, generator: torch.Generator) -> dict | None:
    """Of fixed logits (T, V) in the first of three steps, at a temperature of 2: by each
    rule the probabilities of the draws, and those that scores are made of; then tokens
    that were drawn, and the mask (T,) that their scores make for the second step."""
    logits = 2 * torch.randn((24, 16), generator=generator)
    arrays = {"draws_logits": logits}
    for name, rule in RULES.items():
        for spans in ("nonoverlap", "stride1"):
            how = {"top_k": 0, "top_p": 0.0, "span_arrangement": spans} | rule
            drawn, closest = draw(audiocraft, lm, logits, how)
            if closest < SMALLEST_CUT:
                return None
            for kind in ("tokens", "mask"):
                arrays[f"draws_{name}_{spans}_{kind}"] = tiny.int32(drawn.pop(kind))
            arrays |= {f"draws_{name}_{kind}": drawn[kind] for kind in drawn}
    return arrays


def draw(audiocraft, lm, logits: Tensor, rule: dict) -> tuple[dict[str, Tensor], float]:
    utils = importlib.import_module("audiocraft.utils.utils")
    multinomial, gather, calls = utils.multinomial, torch.gather, []

    def watch_multinomial(probs, num_samples):
        calls.append(("draws", probs[0, 0].clone()))
        return multinomial(probs, num_samples)

    def watch_gather(values, dim, tokens):
        if dim == 3:  # for scores; sample_top_p gathers, too
            calls.extend([("probs", values[0, 0]), ("tokens", tokens[0, 0, :, 0])])
        return gather(values, dim, tokens)

    def model(sequence, conditions, tensors, stage):
        calls.append(("mask", sequence[0, 0] == lm.special_token_id))
        return logits.expand(2, lm.num_codebooks, -1, -1)

    watch = Watch(lm)
    conditions = [audiocraft.conditioners.ConditioningAttributes({"description": "a"})]
    options = {"max_gen_len": len(logits), "decoding_steps": [3], "temp": 3.0} | rule
    with (
        watch.watch(),
        patch.dict(lm.__dict__, {"_fsdp": model}),
        patch.object(utils, "multinomial", watch_multinomial),
        patch.object(torch, "gather", watch_gather),
    ):
        lm._generate_magnet(conditions=conditions, **options)
    found = dict(reversed(calls[:4])) | {"mask": calls[4][1]}  # of the first step
    if rule["top_p"] > 0:  # whose draws are in the order of probabilities
        order = found["probs"].argsort(-1, descending=True)
        found["draws"] = torch.zeros_like(logits).scatter(-1, order, found["draws"])
    return found, min(watch.cuts)


def count_masked(audiocraft, lm, spans: str, frames: int, steps: int) -> list[int]:
    """How many spans, in stride1 frames, audiocraft means to mask in each step."""
    counts, topk = [], Tensor.topk

    def watch_topk(scores, k, dim=-1):
        counts.append(k)
        return topk(scores, k, dim)

    def watch_spans(scores, target):
        counts.append(target)
        return torch.ones_like(scores, dtype=torch.bool)

    def model(sequence, conditions, tensors, stage):
        return torch.zeros(*sequence.shape, 2)

    conditions = [audiocraft.conditioners.ConditioningAttributes({"description": "a"})]
    options = {"decoding_steps": [steps], "span_arrangement": spans, "top_k": 0}
    with (
        patch.dict(lm.__dict__, {"_fsdp": model}),
        patch.object(Tensor, "topk", watch_topk),
        patch.object(lm, "_least_probable_span_masking", watch_spans),
    ):
        lm._generate_magnet(conditions=conditions, max_gen_len=frames, **options)
    return counts


def expect_counts(audiocraft, lm) -> dict[str, Tensor]:
    """By arrangement, frames and steps. Of 4, 7, 10... steps one is of cos 60°, which
    float32 takes now above and now below 1/2, as torch's linspace rounds 2/3."""
    wanted = [("nonoverlap", T, S) for T in (744, 747) for S in (20, 10)]
    wanted += [
        ("nonoverlap", T, S) for T in (498, 1500) for S in (1, 2, 3, 4, 7, 10, 13, 20)
    ]
    wanted += [("stride1", T, S) for T in (498, 500, 1500) for S in (20, 10)]
    return {
        f"counts_{spans}_{frames}_{steps}": torch.tensor(
            count_masked(audiocraft, lm, spans, frames, steps), dtype=torch.int32
        )
        for spans, frames, steps in wanted
    }


def make_checkpoint(audiocraft, name: str) -> dict:
    folder, sound = base.HERE / name, name != NAMES[0]
    source, t5 = base.HERE / CODECS[sound], list(T5S)[sound]
    copy_parts(folder, source, t5)
    make_audiocraft.use_local_files(audiocraft, folder)
    audiocraft.conditioners.T5Conditioner.MODELS_DIMS[t5] = T5S[t5]["d_model"]

    def attempt(seed: int) -> dict | None:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(4000 + 1000 * sound + seed)
        save_lm(audiocraft, folder, magnet_cfg(sound), generator)
        return expect(audiocraft, folder, generator)

    return base.search(attempt, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audiocraft", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    audiocraft = make_audiocraft.import_audiocraft(args.audiocraft)
    audiocraft.transformer.ops.memory_efficient_attention = memory_efficient_attention
    made = {name: make_checkpoint(audiocraft, name) for name in NAMES}
    path = base.HERE / "expected.json"
    tiny.write_json(path, json.loads(path.read_text()) | made)


if __name__ == "__main__":
    main()
