"""Names of the decoder's weights: audiocraft's and transformers' -> ours, and back.

Matrices that are applied to the same input are stacked. What a message says of a tensor
has the spelling of its file. Needs strict.py beside it.

    weights = name_decoder(weights)  # of either layout; ours stay as they are
    spell("out_norm.weight", TRANSFORMERS)  # decoder.model.decoder.layer_norm.weight
"""

import re

import mlx.core as mx

from strict import Misfit


def name_decoder(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """audiocraft's or transformers' names -> ours, with what we fuse fused.

    Safe to run twice. Raises Misfit for integers, save quantized ones, and for missing
    parts.
    """
    renamed = {}
    for name, weight in weights.items():
        if not name.endswith(COMPUTED):
            add(renamed, rename(name), weight)
    check_numbers(renamed)
    return fuse(split_cross(renamed))


COMPUTED = ("embed_positions.weights", ".self_wav.chroma.spec.window")  # from nothing

RENAMES = (  # transformers' names -> audiocraft's -> ours
    (r"^model\.decoder\.", ""),
    (r"^embed_tokens\.", "emb."),
    (r"^lm_heads\.", "linears."),
    (r"^enc_to_dec_proj\.", "output_proj."),
    (r"^(audio_enc_to_dec|melody)_proj\.", "sound_proj."),
    (r"^layer_norm\.", "out_norm."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm_cross."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.encoder_attn\.", ".cross_attention."),
    (r"\.fc([12])\.", r".linear\1."),
    (r"^transformer\.", ""),
    (r"^condition_provider\.conditioners\.description\.", ""),
    (r"^condition_provider\.conditioners\.self_wav\.output_", "sound_"),
    (r"\.in_proj_weight$", ".in_proj.weight"),
)


AUDIOCRAFT = (  # our names -> audiocraft's
    (r"^layers\.", "transformer.layers."),
    (r"^(emb|linears)\.weight$", r"\1.0.weight"),
    (r"\.in_proj\.weight$", ".in_proj_weight"),
    (r"cross_attention\.(q|k|v|kv)_proj\.weight$", "cross_attention.in_proj_weight"),
    (r"^output_proj\.", "condition_provider.conditioners.description.output_proj."),
    (r"^sound_proj\.", "condition_provider.conditioners.self_wav.output_proj."),
)
TRANSFORMERS = (  # our names -> transformers'
    (r"^emb\.weight$", "emb.0.weight"),
    (r"^linears\.weight$", "linears.0.weight"),
    (r"\.self_attn\.in_proj\.weight$", ".self_attn.q_proj.weight"),
    (r"\.kv_proj\.weight$", ".k_proj.weight"),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm_cross\.", ".encoder_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
    (r"\.cross_attention\.", ".encoder_attn."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"^layers\.", "decoder.model.decoder.layers."),
    (r"^emb\.", "decoder.model.decoder.embed_tokens."),
    (r"^out_norm\.", "decoder.model.decoder.layer_norm."),
    (r"^linears\.", "decoder.lm_heads."),
    (r"^output_proj\.", "enc_to_dec_proj."),
    (r"^sound_proj\.", "audio_enc_to_dec_proj."),
)
Layout = tuple[tuple[str, str], ...]


def spell(name: str, layout: Layout = AUDIOCRAFT) -> str:
    """A name of the decoder's weights, ours, as a file has it; of those that we fuse,
    the first part."""
    for pattern, replacement in layout:
        name = re.sub(pattern, replacement, name)
    return name


def rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def add(weights: dict[str, mx.array], name: str, weight: mx.array) -> None:
    """Put a tensor under a name. Raises ValueError when the name is taken."""
    if name in weights:
        raise ValueError(f"{name:.150} is there twice, under two spellings")
    weights[name] = weight


def check_numbers(weights: dict[str, mx.array]) -> None:
    """Raise ValueError unless all are floats, or quantized and so with `scales`."""
    for name, weight in weights.items():
        packed = f"{name.removesuffix('.weight')}.scales" in weights
        quantized = packed and weight.dtype == mx.uint32
        if not (quantized or mx.issubdtype(weight.dtype, mx.floating)):
            raise Misfit(name, f"must hold floats, but holds {weight.dtype}")


def split_cross(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Part the queries of audiocraft's cross-attention from keys and values."""
    split = {}
    for name, weight in weights.items():
        stem, found, _ = name.partition("cross_attention.in_proj.weight")
        if found:
            if weight.ndim != 2 or weight.shape[0] % 3:
                raise Misfit(name, f"must hold 3 matrices, got {weight.shape}")
            D = weight.shape[0] // 3
            add(split, f"{stem}cross_attention.q_proj.weight", weight[:D])
            add(split, f"{stem}cross_attention.kv_proj.weight", weight[D:])
        else:
            add(split, name, weight)
    return split


FUSED = (  # pattern of the parts' names -> name of the whole; parts in order
    (r"(.*self_attn)\.([qkv])_proj\.weight", r"\1.in_proj.weight", "qkv"),
    (r"(.*cross_attention)\.([kv])_proj\.weight", r"\1.kv_proj.weight", "kv"),
    (r"(emb)\.(0|[1-9]\d?)\.weight", r"\1.weight", None),
    (r"(linears)\.(0|[1-9]\d?)\.weight", r"\1.weight", None),
)


class Parts(dict):
    """Tensors by their places in a whole, and what they are called."""

    def __init__(self, match: re.Match, order: str | None):
        self.stem, self.end = (
            match.string[: match.start(2)],
            match.string[match.end(2) :],
        )
        self.order = order

    def name(self, place: int) -> str:
        return f"{self.stem}{self.order[place] if self.order else place}{self.end}"

    def join(self, count: int) -> mx.array:
        """All, one below the other. Raises Misfit where one is missing, or has another
        shape than most."""
        count = len(self.order) if self.order else count
        if missing := set(range(count)) - self.keys():
            raise Misfit(self.name(min(missing)), "is missing")
        shapes = [self[place].shape for place in range(count)]
        usual = max(shapes, key=shapes.count)
        for place, shape in enumerate(shapes):
            if shape != usual:
                why = f"must have the shape of its like, {usual}, got {shape}"
                raise Misfit(self.name(place), why)
        return mx.concatenate([self[place] for place in range(count)])


def fuse(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Stack the matrices that are applied to the same input."""
    fused, wholes = {}, {}
    for name, weight in weights.items():
        for pattern, whole, order in FUSED:
            if match := re.fullmatch(pattern, name):
                parts = wholes.setdefault(match.expand(whole), Parts(match, order))
                parts[order.index(match[2]) if order else int(match[2])] = weight
                break
        else:
            fused[name] = weight
    tables = [parts for parts in wholes.values() if not parts.order]
    codebooks = max((max(parts) + 1 for parts in tables), default=0)  # in each of both
    for name, parts in wholes.items():
        add(fused, name, parts.join(codebooks))
    return fused
