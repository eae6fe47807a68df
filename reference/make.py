"""Make the tiny random checkpoints, and what transformers computes with them.

    python make.py --audiocraft DIR

writes everything beside this file, in a minute or two. DIR is a checkout of
audiocraft; without it only the checkpoints that transformers reads are made.
Needs torch, transformers and sentencepiece; make_audiocraft.py needs more.
"""

import argparse
import itertools
import json
from contextlib import contextmanager
from pathlib import Path

import manifests
import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.encodec.modeling_encodec import EncodecEuclideanCodebook
from transformers.models.musicgen import modeling_musicgen

import tiny

HERE = Path(__file__).parent
CONFIGS = manifests.read()["configs"]
NOT_FOUND_AFTER = 300

PROMPTS = [
    "slow piano ballad with soft strings",
    "808 drums",
    "A happy rock song, with LOUD guitars and heavy drums in a large cathedral",
]
GUIDANCE = [1.0, 3.0, 4.5]
FRAMES = 15

# No choice made in these files is closer than this: neither between the best
# two logits, nor (relative to the mean distance) between the nearest two codes.
SMALLEST_GAP = 1e-3
SMALLEST_CODE_GAP = 2e-4

T5 = {
    "d_model": 24,
    "d_ff": 40,
    "d_kv": 12,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "vocab_size": 208,
    "task_specific_params": None,
}
T5_GATED = T5 | {
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 3,
    "num_layers": 3,
    "relative_attention_num_buckets": 12,
    "feed_forward_proj": "gated-gelu",
}
CODEC = {
    "num_filters": 2,
    "hidden_size": 16,
    "codebook_dim": 16,
    "codebook_size": 64,
}
CODECS = {
    "encodec_24khz": CODEC | {"target_bandwidths": [0.9, 1.8]},
    "encodec_32khz": CODEC | {"target_bandwidths": [1.2]},
    "encodec_48khz": CODEC
    | {"target_bandwidths": [1.8, 3.6], "chunk_length_s": 0.04, "overlap": 0.1},
}
# Three strides in place of four make a codec of half the size, still 640
# samples a frame.
CODEC_INSIDE = CODECS["encodec_32khz"] | {"upsampling_ratios": [10, 8, 8]}
DECODER = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "ffn_dim": 64,
    "vocab_size": 64,
    "bos_token_id": 64,
    "pad_token_id": 64,
    "max_position_embeddings": 64,
}


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weight norm to the spelling of the files on the Hub."""
    spelling = {"original0": "weight_g", "original1": "weight_v"}
    renamed = {}
    for name, tensor in state.items():
        for now, then in spelling.items():
            name = name.replace(f"parametrizations.weight.{now}", then)
        renamed[name] = tensor.contiguous()
    return renamed


def load(model_class: type, folder: Path) -> torch.nn.Module:
    """Read a checkpoint back in float32, making sure that every weight had its
    place."""
    options = dict(output_loading_info=True, dtype=torch.float32)
    model, info = model_class.from_pretrained(folder, **options)
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(f"{folder}: {kind} {info[kind]}")
    return model.eval()


def search(attempt, what: str) -> dict:
    """Call attempt(seed) with 0, 1, 2... until it returns expected values."""
    for seed in itertools.count():
        result = attempt(seed)
        if result is not None:
            print(f"{what}: seed {seed}", flush=True)
            return result | {"seed": seed}
        if seed == NOT_FOUND_AFTER:
            raise RuntimeError(f"{what}: no seed without close calls. Change sizes.")


# T5


def make_t5(folder: Path, sizes: dict, spiece: bytes, whole: bool) -> dict:
    """Write a T5 and its encoder's states for a padded batch.

    With `whole` the file also holds a decoder, as those on the Hub do.
    """
    config = CONFIGS["t5-base"] | sizes
    tiny.write_json(folder / "config.json", config)
    (folder / "spiece.model").write_bytes(spiece)
    model_class = (
        transformers.T5ForConditionalGeneration
        if whole
        else transformers.T5EncoderModel
    )
    model = model_class(transformers.T5Config.from_dict(config))
    generator = torch.Generator().manual_seed(sizes["d_model"])
    tiny.fill(model, generator)
    state = {k: v for k, v in model.state_dict().items() if "embed_tokens" not in k}
    state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return expect_t5(folder, generator)


def expect_t5(folder: Path, generator: torch.Generator) -> dict:
    model = load(transformers.T5EncoderModel, folder)
    lengths = torch.tensor([33, 4, 17])
    ids = torch.randint(2, 108, (3, 33), generator=generator)
    mask = (torch.arange(33) < lengths[:, None]).long()
    ids = torch.where(torch.arange(33) == lengths[:, None] - 1, 1, ids) * mask
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    arrays = {"input_ids": tiny.int32(ids), "attention_mask": tiny.int32(mask)}
    arrays["last_hidden_state"] = tiny.float32(states)
    save_file(arrays, folder / "expected.safetensors")
    return {"source": "transformers", "lengths": lengths.tolist()}


# EnCodec


def random_codec(config: dict, generator: torch.Generator) -> torch.nn.Module:
    config = transformers.EncodecConfig.from_dict(config)
    model = transformers.EncodecModel(config).eval()
    tiny.fill_codec(model, generator)
    fit_codec(model, config.sampling_rate // 3, generator)
    return model


def fit_codec(model: torch.nn.Module, samples: int, generator) -> None:
    channels = model.config.audio_channels
    with torch.no_grad():
        audio = tiny.music(channels, samples, generator)
        if model.config.normalize:
            audio = audio / audio.square().mean().sqrt()
        codebooks = [layer.codebook for layer in model.quantizer.layers]
        tiny.fit_codebooks(codebooks, model.encoder(audio), generator)


def make_codec(name: str, old_spelling: bool) -> dict:
    folder = HERE / name
    config = CONFIGS[name] | CODECS[name]

    def attempt(seed: int) -> dict | None:
        generator = torch.Generator().manual_seed(seed)
        model = random_codec(config, generator)
        tiny.write_json(folder / "config.json", config)
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        state = published(state) if old_spelling else state
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return expect_codec(folder, config, generator)

    return search(attempt, name)


def expect_codec(folder: Path, config: dict, generator) -> dict | None:
    model = load(transformers.EncodecModel, folder)
    samples = int(config["sampling_rate"] * 0.1) + 77
    if config["chunk_length_s"]:
        samples = 4001
    audio = tiny.music(config["audio_channels"], samples, generator)
    short = audio[..., 1000:1050].contiguous()
    bandwidths = config["target_bandwidths"]
    arrays = {"audio": audio, "short_audio": short}
    pads = {}
    with tiny.watch_codebooks(EncodecEuclideanCodebook) as gaps, torch.no_grad():
        for bandwidth in bandwidths:
            suffix = f"_{bandwidth:g}"
            pads["last_frame_pad_length"] = code(
                model, audio, bandwidth, arrays, suffix
            )
        code(model, short, bandwidths[-1], arrays, "_short")
    codes = arrays[f"codes_{bandwidths[-1]:g}"]
    if min(gaps) < SMALLEST_CODE_GAP or dull(codes.movedim(2, 0).flatten(1)):
        return None
    save_file(arrays, folder / "expected.safetensors")
    return {
        "source": "transformers",
        "bandwidths": bandwidths,
        "smallest_code_gap": min(gaps),
    } | pads


def code(model, audio, bandwidth: float, arrays: dict, suffix: str) -> int:
    """Encode and decode; returns the padding of the last chunk's codes."""
    encoded = model.encode(audio, bandwidth=bandwidth, return_dict=True)
    pad = encoded.last_frame_pad_length
    decoded = model.decode(
        encoded.audio_codes, encoded.audio_scales, last_frame_pad_length=pad
    )
    arrays[f"codes{suffix}"] = tiny.int32(encoded.audio_codes)
    if encoded.audio_scales[0] is not None:
        scales = torch.stack(list(encoded.audio_scales))
        arrays[f"scales{suffix}"] = tiny.float32(scales)
    arrays[f"decoded{suffix}"] = tiny.float32(decoded.audio_values)
    return int(pad)


def dull(codes: Tensor) -> bool:
    """Whether any row of codes has fewer than four different values."""
    return any(len(row.unique()) < 4 for row in codes)


# MusicGen


def musicgen_config(stereo: bool) -> dict:
    config = CONFIGS["musicgen-stereo-small" if stereo else "musicgen-small"]
    config = json.loads(json.dumps(config))
    config["text_encoder"] |= T5
    config["audio_encoder"] |= CODEC_INSIDE
    config["decoder"] |= DECODER | ({"num_hidden_layers": 1} if stereo else {})
    return config


def make_musicgen(name: str, stereo: bool, spiece: bytes) -> dict:
    folder = HERE / name
    config = musicgen_config(stereo)
    tiny.write_json(folder / "config.json", config)
    special = config["decoder"]["pad_token_id"]
    generation = {"bos_token_id": special, "pad_token_id": special}
    generation |= {"decoder_start_token_id": special, "do_sample": True}
    generation |= {"guidance_scale": 3.0, "max_length": 1500}
    tiny.write_json(folder / "generation_config.json", generation)
    (folder / "spiece.model").write_bytes(spiece)

    def attempt(seed: int) -> dict | None:
        generator = torch.Generator().manual_seed(1000 * stereo + seed)
        state = random_musicgen(config, generator)
        (save_shards if stereo else save_one)(state, folder)
        return expect_musicgen(folder, generator)

    return search(attempt, name)


def random_musicgen(config: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the weights of a tiny model under the names of the published files."""
    parsed = transformers.MusicgenConfig.from_dict(config)
    model = transformers.MusicgenForConditionalGeneration(parsed)
    state = random_state(model, [model.enc_to_dec_proj], generator)
    positions = modeling_musicgen.MusicgenSinusoidalPositionalEmbedding
    state["decoder.model.decoder.embed_positions.weights"] = positions.get_embedding(
        DECODER["max_position_embeddings"], DECODER["hidden_size"]
    )
    return state


def random_state(model, projections: list, generator: torch.Generator) -> dict:
    """Fill a model of MusicGen's kind; its weights under the published names."""
    tiny.fill(model.text_encoder, generator)
    tiny.fill(model.decoder, generator)
    tiny.fill_codec(model.audio_encoder, generator)
    fit_codec(model.audio_encoder, 16000, generator)
    for projection in projections:
        for name, tensor in projection.state_dict().items():
            tensor.copy_(tiny.draw(name, tensor.shape, generator))
    state = published(model.state_dict())
    state.pop("text_encoder.encoder.embed_tokens.weight")
    return state


def save_one(state: dict[str, Tensor], folder: Path) -> None:
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def save_shards(state: dict[str, Tensor], folder: Path) -> None:
    """Write pytorch_model-0000x-of-00002.bin as early transformers did.

    There the T5 embedding appears under two names with one storage, and the
    dict carries the attribute `_metadata`.
    """
    shared = "text_encoder.shared.weight"
    state = state | {"text_encoder.encoder.embed_tokens.weight": state[shared]}
    weight_map = {}
    for number, in_shard in enumerate((True, False), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        shard = torch.nn.Module().state_dict()  # an OrderedDict with _metadata
        for name, tensor in state.items():
            if name.startswith(("text_encoder.", "audio_encoder.")) == in_shard:
                shard[name] = tensor
                weight_map[name] = file
        torch.save(shard, folder / file)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    tiny.write_json(folder / "pytorch_model.bin.index.json", index)


def expect_musicgen(folder: Path, generator: torch.Generator) -> dict | None:
    model = load(transformers.MusicgenForConditionalGeneration, folder)
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
    arrays, gaps = {}, []
    for name, prompts in ("one", PROMPTS[:1]), ("batch", PROMPTS):
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        for coef in GUIDANCE:
            codes, audio, gap = greedy(model, inputs, coef)
            arrays[f"{name}_g{coef:g}_codes"] = tiny.int32(codes)
            if (name, coef) == ("one", 3.0):
                arrays["one_g3_audio"] = tiny.float32(audio)
            gaps.append(gap)
            if gap < SMALLEST_GAP:
                return None
    if not lively(arrays):
        return None
    arrays |= expect_layers(model, inputs, generator)
    save_file(arrays, folder / "expected.safetensors")
    ids = [ids[mask > 0].tolist() for ids, mask in zip(*inputs.values())]
    return {
        "source": "transformers",
        "frames": FRAMES,
        "max_new_tokens": FRAMES + 3,
        "guidance": GUIDANCE,
        "prompts": PROMPTS,
        "prompt_ids": ids,
        "smallest_logit_gap": min(gaps),
    }


def lively(arrays: dict[str, Tensor]) -> bool:
    """Whether codes vary over time, between prompts and with guidance."""
    names = [name for name in arrays if name.endswith("_codes")]
    batches = [arrays[name] for name in names if name.startswith("batch")]
    if any(dull(arrays[name].flatten(0, 1)) for name in names):
        return False
    rows = [row for batch in batches for row in batch]
    return all(
        (a != b).float().mean() > 0.2 for a, b in itertools.combinations(rows, 2)
    )


@torch.no_grad()
def greedy(model, inputs, coef: float) -> tuple[Tensor, Tensor, float]:
    """Return codes (B, K, T), audio (B, C, N) and the closest call."""
    with captured_codes(model) as captured:
        output = model.generate(
            **inputs,
            do_sample=False,
            guidance_scale=coef,
            max_new_tokens=FRAMES + 3,
            return_dict_in_generate=True,
            output_scores=True,
        )
    K = model.decoder.num_codebooks
    codes = captured[0]
    if len(captured) == 2:
        codes = torch.stack(captured, 2).flatten(1, 2)  # left, right, left...
    B = codes.shape[0]
    assert codes.shape == (B, K, FRAMES)
    scores = torch.stack(output.scores, 1).unflatten(0, (B, K))  # (B, K, S, V)
    pairs = 2 if K == 8 else 1
    used = [scores[:, k, k // pairs :][:, :FRAMES] for k in range(K)]
    used = torch.stack(used, 1)
    # Scores and codes must be two views of one run.
    assert (used.argmax(-1) == codes).all()
    return codes, output.sequences, tiny.smallest_gap(used)


@contextmanager
def captured_codes(model):
    """Collect the codes (B, K, T) that generate() hands to the codec."""
    captured, decode = [], model.audio_encoder.decode

    def capture(audio_codes, *args, **kwargs):
        captured.append(audio_codes[0])
        return decode(audio_codes, *args, **kwargs)

    model.audio_encoder.decode = capture
    try:
        yield captured
    finally:
        del model.audio_encoder.decode


@torch.no_grad()
def expect_layers(model, inputs, generator: torch.Generator) -> dict[str, Tensor]:
    """Text states of all prompts, and logits after the first two of them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    states = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    states = model.enc_to_dec_proj(states) * mask[..., None]
    K, V = model.decoder.num_codebooks, DECODER["vocab_size"]
    tokens = delayed_tokens(K, V, generator)
    logits = model.decoder(
        input_ids=tokens.flatten(0, 1),
        encoder_hidden_states=states[:2],
        encoder_attention_mask=mask[:2],
    ).logits
    return {
        "text_ids": tiny.int32(ids),
        "text_mask": tiny.int32(mask),
        "text_states": tiny.float32(states),
        "tokens": tiny.int32(tokens),
        "logits": tiny.float32(logits.unflatten(0, (2, K))),
    }


def delayed_tokens(K: int, V: int, generator: torch.Generator) -> Tensor:
    """Return random (2, K, 6) tokens with the special token V before each delay."""
    tokens = torch.randint(0, V, (2, K, 6), generator=generator)
    delays = torch.arange(K) // (K // 4)
    return torch.where(torch.arange(6) <= delays[:, None], V, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--audiocraft", type=Path, help="a checkout of audiocraft")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    spiece, small_spiece = tiny.tokenizer("nmt_nfkc"), tiny.tokenizer("identity")
    about = {
        "versions": {
            package.__name__: package.__version__
            for package in (torch, transformers, sentencepiece)
        }
    }
    about["t5-gated"] = make_t5(HERE / "t5-gated", T5_GATED, small_spiece, whole=False)
    about["encodec_24khz"] = make_codec("encodec_24khz", old_spelling=True)
    about["encodec_32khz"] = make_codec("encodec_32khz", old_spelling=False)
    about["encodec_48khz"] = make_codec("encodec_48khz", old_spelling=False)
    about["mono-transformers"] = make_musicgen("mono-transformers", False, spiece)
    about["stereo-transformers"] = make_musicgen(
        "stereo-transformers", True, small_spiece
    )
    tiny.write_json(HERE / "expected.json", about)
    if args.audiocraft:
        import make_audiocraft

        about |= make_audiocraft.make(args.audiocraft, small_spiece)
        tiny.write_json(HERE / "expected.json", about)


if __name__ == "__main__":
    main()
