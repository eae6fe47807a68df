"""Make tiny random style models, and what audiocraft computes with them.

    python make_style.py --audiocraft DIR

writes `style-audiocraft/`, which hears with MERT, and `style-encodec-audiocraft/`,
which hears with EnCodec, beside this file, after make.py. It needs what make.py does.
MERT is HuBERT by another name, so transformers' HuBERT takes its place here. The
excerpts are cut from tunes of sounds.py.
"""

import argparse
import inspect
import json
import sys
import types
from functools import partial
from pathlib import Path

import make as base
import make_audiocraft
import make_melody
import sounds
import torch
import transformers
import xpcfg
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny

TUNES = [
    [60, 64, 67, 72, 71, 67, 62, 65, 69, 74],
    [45, 57, 52, 43, 55, 50, 47, 59, 54, 40],
]
RATE = 32000
START, SECONDS = 8000, 3.0  # of an excerpt, in samples and in seconds
LENGTHS = [1.5, 4.5]  # the shortest and longest excerpts in training
QUANTIZERS = [1, 3, 6]
GUIDANCE, BETA = 3.0, 5.0
WINDOW, LONG, STRIDE = 1, 110, 30  # seconds of a window, frames; three windows
FRAME_RATE = 50

# What audiocraft has in its source rather than in xp.cfg; released: 512, 8, 8.
TRANSFORMER = {"d_model": 32, "num_heads": 4, "num_layers": 2}
T5 = base.T5 | {"num_layers": 1}
CODEC = base.CODEC_INSIDE | {
    "hidden_size": 8,
    "codebook_dim": 8,
    "codebook_size": 32,
    "num_lstm_layers": 1,
    "target_bandwidths": [1.0],
}
MERT = {
    "activation_dropout": 0.1,
    "apply_spec_augment": True,
    "architectures": ["MERTModel"],
    "attention_dropout": 0.1,
    "attention_relax": -1.0,
    "conv_bias": False,
    "conv_dim": [8, 8, 8, 8, 8, 8, 8],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "deepnorm": False,
    "do_stable_layer_norm": False,
    "feat_extract_activation": "gelu",
    "feat_extract_norm": "group",
    "feat_proj_dropout": 0.1,
    "feat_proj_layer_norm": True,
    "feature_extractor_cqt": False,
    "feature_extractor_cqt_bins": 336,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-05,
    "layerdrop": 0.1,
    "mask_feature_prob": 0.0,
    "mask_time_prob": 0.05,
    "model_type": "mert_model",
    "num_attention_heads": 2,
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 16,
    "num_feat_extract_layers": 7,
    "num_hidden_layers": 2,
    "sample_rate": 24000,
    "torch_dtype": "float32",
    "vocab_size": 32,
}
# EnCodec has 50 frames a second and MERT 75: either way five are left.
DS_FACTORS = {"mert": 15, "encodec": 10}
STYLE = """
  self_wav:
    model: style
    style:
      model_name: {model_name}
      transformer_scale: default
      sample_rate: ${{sample_rate}}
      encodec_checkpoint: //pretrained/facebook/encodec_32khz
      encodec_n_q: 3
      length: {seconds}
      ds_factor: {ds_factor}
      n_q_out: {quantizers}
      eval_q: 3
      q_dropout: true
      bins: 32
      varying_lengths: {lengths}
      batch_norm: true
      compute_mask: true
      num_codebooks_lm: ${{transformer_lm.n_q}}
      ds_rate_compression: 640
      use_middle_of_segment: false
      rvq_threshold_ema_dead_code: 0.1
"""


def lm_cfg(model_name: str) -> str:
    layers = 2 if model_name == "mert" else 1
    card = CODEC["codebook_size"]
    text = xpcfg.lm_cfg(False, layers, dim=32, heads=2, hidden_scale=1.5, card=card)
    style = STYLE.format(
        model_name=model_name,
        seconds=SECONDS,
        ds_factor=DS_FACTORS[model_name],
        quantizers=max(QUANTIZERS),
        lengths=LENGTHS,
    )
    for old, new in (
        ("segment_duration: 30", f"segment_duration: {WINDOW}"),
        (
            "  prepend: []\n  cross:\n  - description\n",
            "  prepend: [self_wav, description]\n  cross: []\n",
        ),
        ("conditioners:\n", "conditioners:" + style),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


# MERT


def make_mert(folder: Path) -> None:
    """Write a MERT under the names of the published file."""
    tiny.write_json(folder / "config.json", MERT)
    config = transformers.HubertConfig.from_dict(MERT)
    model = transformers.HubertModel(config)
    fill_mert(model, torch.Generator().manual_seed(0))
    state = base.published(model.state_dict())
    state = {name: tensor.half().float() for name, tensor in state.items()}
    torch.save(state, folder / "pytorch_model.bin")


@torch.no_grad()
def fill_mert(model: nn.Module, generator: torch.Generator) -> None:
    tiny.fill(model, generator)
    for layer in model.feature_extractor.conv_layers:
        weight = layer.conv.weight
        std = 1.5 / weight[0].numel() ** 0.5
        weight.copy_(tiny.grid_normal(weight.shape, std, generator))
    tiny.fill_conv(model.encoder.pos_conv_embed.conv, generator)


def load_mert(folder: Path) -> nn.Module:
    model = base.load(transformers.HubertModel, folder)
    model.set_attn_implementation("eager")
    return model


# audiocraft


def import_audiocraft(checkout: Path) -> types.SimpleNamespace:
    """With small sizes in place of those in its source, and one start of excerpts."""
    audiocraft = make_audiocraft.import_audiocraft(checkout)
    conditioners = audiocraft.conditioners
    for name, old, new in (
        ("FeatureExtractor", "nn.Linear(768,", f"nn.Linear({MERT['hidden_size']},"),
        (
            "StyleConditioner",
            "{'d_model': 512, 'num_heads': 8, 'num_layers': 8}",
            repr(TRANSFORMER),
        ),
    ):
        source = inspect.getsource(getattr(conditioners, name))
        assert source.count(old) == 1, old
        exec(source.replace(old, new), vars(conditioners))
    for module in (audiocraft.builders, audiocraft.musicgen):
        module.StyleConditioner = conditioners.StyleConditioner
    conditioners.random = types.SimpleNamespace(randint=start)
    return audiocraft


def start(first: int, last: int) -> int:
    assert first <= START <= last
    return START


def use_local_files(audiocraft, folder: Path) -> None:
    """Have T5, the codec and what hears the excerpt come from the folder."""
    make_audiocraft.use_local_files(audiocraft, folder)

    def mert(name, trust_remote_code):
        return load_mert(folder / Path(name).name)

    def codec(name, device):
        return audiocraft.loaders.load_compression_model(str(folder))

    transformers.AutoModel = types.SimpleNamespace(from_pretrained=mert)
    solver = types.SimpleNamespace(model_from_checkpoint=codec)
    stand_in = types.SimpleNamespace(CompressionSolver=solver)
    sys.modules["audiocraft.solvers.compression"] = stand_in


def save_codec(folder: Path, generator: torch.Generator) -> None:
    """Write a compression_state_dict.bin that only names a codec, and that codec."""
    pointer = {"pretrained": "facebook/encodec_32khz", "exported": True}
    pointer["version"] = sys.modules["audiocraft"].__version__
    torch.save(pointer, folder / "compression_state_dict.bin")
    config = base.CONFIGS["encodec_32khz"] | CODEC
    codec = folder / "encodec_32khz"
    tiny.write_json(codec / "config.json", config)
    state = base.published(base.random_codec(config, generator).state_dict())
    save_file(state, codec / "model.safetensors", {"format": "pt"})


def save_lm(audiocraft, folder: Path, model_name: str, generator) -> None:
    from omegaconf import OmegaConf

    cfg = OmegaConf.create(lm_cfg(model_name))
    cfg.device, cfg.dtype = "cpu", "float32"
    model = audiocraft.builders.get_lm_model(cfg).eval()
    tiny.fill(model, generator)
    conditioner = model.condition_provider.conditioners["self_wav"]
    if model_name == "encodec":
        for table in conditioner.embed:
            table.weight.copy_(tiny.grid_normal(table.weight.shape, 1.0, generator))
    fit_bottleneck(audiocraft, conditioner, generator)
    state = model.state_dict()
    saved = make_audiocraft.package(state, lm_cfg(model_name), torch.float16)
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            saved["best_state"][name] = tensor.clone()  # stays int64
    torch.save(saved, folder / "state_dict.bin")


def fit_bottleneck(audiocraft, conditioner, generator: torch.Generator) -> None:
    """Set the batch norm and the codebooks by what the transformer makes of tunes."""
    heard = [features(audiocraft, conditioner, which) for which in range(len(TUNES))]
    latents = torch.cat([conditioner.transformer(x) for x in heard], 1)
    latents = latents.transpose(1, 2)  # (1, T, D) -> (1, D, T)
    norm = conditioner.batch_norm
    norm.running_mean.copy_(latents.mean((0, 2)).half())
    norm.running_var.copy_(latents.var((0, 2)).half())
    norm.num_batches_tracked.fill_(1000)
    codebooks = [layer._codebook for layer in conditioner.rvq.vq.layers]
    tiny.fit_codebooks(codebooks, norm(latents), generator)


# Expected values


def sound(which: int) -> Tensor:
    """A tune of five seconds: (1, N)."""
    return torch.from_numpy(sounds.tune(RATE, TUNES[which])).T


def condition(audiocraft, which: int):
    """A tune as audiocraft hands it to a conditioner."""
    wav = sound(which)
    length = torch.tensor([wav.shape[-1]])
    return audiocraft.conditioners.WavCondition(wav[None], length, [RATE])


def features(audiocraft, conditioner, which: int) -> Tensor:
    """What enters the conditioner's transformer: (1, T, D)."""
    extractor = audiocraft.conditioners.FeatureExtractor
    return extractor._get_wav_embedding(conditioner, condition(audiocraft, which))


def style(audiocraft, conditioner, which: int, q: int = 3, seconds=SECONDS) -> Tensor:
    """What is left of an excerpt, before the projection to the decoder: (T, D)."""
    conditioner.set_params(eval_q=q, excerpt_length=seconds)
    return conditioner._get_wav_embedding(condition(audiocraft, which))[0]


def watch_bottleneck(conditioner) -> tuple[list[float], list[list[Tensor]]]:
    """Collect how close each choice of a code was, and the codes, by codebook.

    Only the frames that are kept count.
    """
    gaps, chosen = [], []

    def record(codes: list[Tensor], codebook, args, output):
        states = args[0][0, :: conditioner.ds_factor]
        distances = torch.cdist(states, codebook.embed).square()
        first, second = distances.topk(2, largest=False).values.unbind(-1)
        gaps.append(((second - first) / distances.mean()).min().item())
        codes.append(output[1][0, :: conditioner.ds_factor])

    for layer in conditioner.rvq.vq.layers:
        chosen.append([])
        layer._codebook.register_forward_hook(partial(record, chosen[-1]))
    return gaps, chosen


def mert_arrays(audiocraft, conditioner) -> dict[str, Tensor]:
    arrays, heard = {}, []
    hook = conditioner.feat_extractor.register_forward_hook(
        lambda module, args, output: heard.append(output.last_hidden_state[0])
    )
    for which in range(len(TUNES)):
        for q in QUANTIZERS:
            states = style(audiocraft, conditioner, which, q)
            arrays[f"style_{which}_q{q}"] = tiny.float32(states)
        arrays[f"mert_{which}"] = tiny.float32(heard[-1])
    for seconds in LENGTHS:
        states = style(audiocraft, conditioner, 0, seconds=seconds)
        arrays[f"style_0_len{seconds}"] = tiny.float32(states)
    hook.remove()
    return arrays


def encodec_arrays(audiocraft, conditioner) -> dict[str, Tensor]:
    states = style(audiocraft, conditioner, 0)
    heard = features(audiocraft, conditioner, 0)[0]
    return {"features_0": tiny.float32(heard), "style_0_q3": tiny.float32(states)}


def mert_cases() -> list[tuple]:
    """Names of codes, with prompts, tune and settings."""
    prompts = base.PROMPTS[:2]
    cases = [("text_only", prompts, None, {})]
    for i in range(len(TUNES)):
        cases.append((f"unguided_{i}", prompts, i, {"guidance": 1.0}))
        for q in QUANTIZERS:
            cases.append((f"text_style_{i}_q{q}", prompts, i, {"q": q}))
        cases.append((f"style_only_{i}", [None], i, {}))
        cases.append((f"beta_{i}", prompts, i, {"beta": BETA}))
        cases.append((f"long_{i}", prompts, i, {"frames": LONG}))
    return cases


def encodec_cases() -> list[tuple]:
    return [("text_style_0_q3", base.PROMPTS[:2], 0, {})]


def load_model(audiocraft, folder: Path):
    lm = audiocraft.loaders.load_lm_model(str(folder))
    codec = audiocraft.loaders.load_compression_model(str(folder))
    model = audiocraft.musicgen.MusicGen("tiny", codec, lm, max_duration=30)
    model.max_duration = WINDOW  # less than its default stride allows
    return model


def greedy(
    model,
    prompt: str | None,
    which: int | None,
    frames: int = base.FRAMES,
    q: int = 3,
    guidance: float = GUIDANCE,
    beta: float | None = None,
) -> tuple[Tensor, float]:
    """Codes (1, K, T) for one prompt and one tune, and the closest call."""
    scores = []

    def record(module, args, logits):
        with_text, *with_style, without = logits[:, :, -1]  # each (K, V)
        if beta is not None:
            with_text = with_style[0] + beta * (with_text - with_style[0])
        scores.append(without + guidance * (with_text - without))

    model.set_style_conditioner_params(eval_q=q)
    model.set_generation_params(
        use_sampling=False,
        duration=(frames + 0.5) / FRAME_RATE,
        extend_stride=STRIDE / FRAME_RATE,
        cfg_coef=guidance,
        cfg_coef_beta=beta,
    )
    tune = None if which is None else sound(which)
    conditioner = model.lm.condition_provider.conditioners["self_wav"]
    hooks = [model.lm.register_forward_hook(record)]
    hooks.append(hear_the_same(conditioner, tune))
    attributes, _ = model._prepare_tokens_and_attributes([prompt], None, [tune])
    codes = model._generate_tokens(attributes, None)
    for hook in hooks:
        hook.remove()
    return codes, tiny.smallest_gap(torch.stack(scores))


def hear_the_same(conditioner, tune: Tensor | None):
    """Hand the conditioner the whole tune in every window, as in the first.

    audiocraft turns the tune on by the stride and cuts it to a window, so that each
    window would hear another excerpt. Ours keeps one for the whole take. In takes of
    one window this changes nothing.
    """

    def replace(module, args):
        given = args[0]
        there = given.length > 0
        if tune is None:
            return None
        wav = there[:, None, None] * tune
        return (given._replace(wav=wav, length=there * tune.shape[-1]),)

    return conditioner.register_forward_pre_hook(replace)


@torch.no_grad()
def expect(audiocraft, folder: Path, find_arrays, cases: list) -> dict | None:
    """Styles and greedy codes; one prompt at a time, as audiocraft attends padding."""
    model = load_model(audiocraft, folder)
    conditioner = model.lm.condition_provider.conditioners["self_wav"]
    code_gaps, chosen = watch_bottleneck(conditioner)
    with tiny.watch_codebooks(base.EncodecEuclideanCodebook) as heard_gaps:
        arrays = find_arrays(audiocraft, conditioner)
    code_gap = min(code_gaps + heard_gaps)
    used = [torch.cat(codes) for codes in chosen if codes]
    if code_gap < base.SMALLEST_CODE_GAP or base.dull(used):
        return None
    gaps, takes = [], {}
    for name, prompts, which, settings in cases:
        rows = []
        for prompt in prompts:
            codes, gap = greedy(model, prompt, which, **settings)
            rows.append(codes)
            gaps.append(gap)
            if gap < base.SMALLEST_GAP:
                return None
        takes[name] = tiny.int32(torch.cat(rows))
        if base.dull(takes[name].flatten(0, 1)):
            return None
    # A long take begins as the short one does.
    short = [codes for name, codes in takes.items() if not name.startswith("long")]
    if make_melody.alike(torch.cat(short)):
        return None
    save_file(arrays | takes, folder / "expected.safetensors")
    return {"smallest_logit_gap": min(gaps), "smallest_code_gap": code_gap}


def make(audiocraft, name: str, model_name: str, spiece: bytes) -> dict:
    folder = base.HERE / name
    t5 = base.make_t5(folder / "t5-base", T5, spiece, whole=False)
    use_local_files(audiocraft, folder)
    mert = model_name == "mert"
    if mert:
        make_mert(folder / "MERT-v1-95M")
    wanted = (mert_arrays, mert_cases()) if mert else (encodec_arrays, encodec_cases())

    @torch.no_grad()
    def attempt(seed: int) -> dict | None:
        generator = torch.Generator().manual_seed(8000 + 1000 * mert + seed)
        save_codec(folder, generator)
        save_lm(audiocraft, folder, model_name, generator)
        return expect(audiocraft, folder, *wanted)

    about = base.search(attempt, name) | settings(model_name)
    return {name: about, f"{name}/t5-base": t5}


def settings(model_name: str) -> dict:
    about = {
        "tunes": TUNES,
        "start": START,
        "seconds": SECONDS,
        "model_name": model_name,
        "transformer": TRANSFORMER,
        "prompts": base.PROMPTS[:2],
        "frames": base.FRAMES,
        "guidance": GUIDANCE,
    }
    if model_name == "mert":
        about |= {"quantizers": QUANTIZERS, "lengths": LENGTHS, "beta": BETA}
        about |= {"long_frames": LONG, "stride": STRIDE, "window_seconds": WINDOW}
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audiocraft", type=Path, required=True, help="a checkout")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    spiece = tiny.tokenizer("identity")
    audiocraft = import_audiocraft(args.audiocraft)
    about = make(audiocraft, "style-audiocraft", "mert", spiece)
    about |= make(audiocraft, "style-encodec-audiocraft", "encodec", spiece)
    path = base.HERE / "expected.json"
    tiny.write_json(path, json.loads(path.read_text()) | about)


if __name__ == "__main__":
    main()
