"""Random weights for tiny models, and what their tests need of them.

Random networks tend to say the same thing whatever they are given. The draws
below keep every layer's output near unit variance, so that each weight matters
to the result. They also fall on a coarse grid: such weights are exact in
float16, and git packs them into a third of their size.
"""

import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor, nn

# Gain over 1 / sqrt(fan in), first match wins.
GAINS = [
    (r"relative_attention_bias", None),
    (r"SelfAttention\.[qk]\.", 1.2),
    (r"(linears|lm_heads)\.", 4.0),
    (r"in_proj_weight|[qk]_proj", 2.2),
    (r"(encoder_attn|cross_attention)\.out_proj", 1.0),
    (r"", 1.3),
]

WORDS = """
a happy rock song with loud guitars and a driving bass line
slow piano ballad, soft strings, melancholic mood
lofi hip hop beat with vinyl crackle and a mellow rhodes
epic orchestral trailer music, big drums, brass and choir
80s synth pop with bright pads and gated reverb on the snare
acoustic folk song with fingerpicked guitar and harmonica
fast techno track at 140 bpm with a heavy kick drum
smooth jazz trio: double bass, brushed drums and warm saxophone
ambient drone with slowly evolving textures
upbeat latin dance music with trumpets, congas and timbales
a sad violin solo in a large cathedral
funky disco groove, slap bass, rhythm guitar and hand claps
dark minimal electronic music with deep sub bass
country tune with banjo, fiddle and pedal steel guitar
energetic drum and bass with chopped breaks
gentle lullaby on a music box
heavy metal riff with double kick drums and distorted guitars
reggae song with an offbeat organ and a dub delay
baroque harpsichord and flute duet
chiptune melody from an old video game, 8 bit square waves
bossa nova with nylon guitar and a soft shaker
cinematic score with tense strings and low percussion
blues shuffle in E with a wailing harmonica
new age music with wind chimes, flutes and running water
"""


def grid_normal(shape: tuple, std: float, generator: torch.Generator) -> Tensor:
    """Draw normal values rounded to a power of two, about an eighth of std."""
    step = 2.0 ** round(math.log2(std / 8))
    return torch.round(torch.randn(shape, generator=generator) * std / step) * step


def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of a text encoder or a decoder, in place."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(draw(name, tensor.shape, generator))


def draw(name: str, shape: tuple, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        offset = 1.0 if name.endswith("weight") else 0.0
        return offset + grid_normal(shape, 0.125, generator)
    if re.search(r"shared|embed_tokens|^emb\.", name):
        return grid_normal(shape, 1.0, generator)
    gain = next(gain for pattern, gain in GAINS if re.search(pattern, name))
    if gain is None:
        return grid_normal(shape, 1.0, generator)
    if re.search(r"SelfAttention\.q", name):
        # T5 does not divide its scores by sqrt(head dim): its queries do.
        gain /= 2.0
    return grid_normal(shape, gain / math.sqrt(shape[-1]), generator)


def fill_codec(model: nn.Module, generator: torch.Generator) -> None:
    """Draw the convolutions, norms and LSTMs of an EnCodec, in place."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
                fill_conv(module, generator)
            elif isinstance(module, (nn.LSTM, nn.GroupNorm)):
                fill_lstm_or_norm(module, generator)


def fill_conv(conv: nn.Module, generator: torch.Generator) -> None:
    conv.bias.copy_(grid_normal(conv.bias.shape, 0.125, generator))
    scale = 1.15
    if isinstance(conv, nn.ConvTranspose1d):
        # Its rows are normalized over (out, kernel), and two taps (kernel =
        # 2 strides) of twice as many inputs as outputs meet in a sample.
        scale *= math.sqrt(conv.kernel_size[0]) / 2
    g, v = weight_norm(conv)
    if v is None:
        fan_in = conv.weight[0].numel()
        conv.weight.copy_(
            grid_normal(conv.weight.shape, scale / fan_in**0.5, generator)
        )
        return
    v.copy_(grid_normal(v.shape, 1.0, generator))
    v[v == 0] = 0.125  # a row may have a single entry, and needs a norm
    g.copy_(scale * (1 + grid_normal(g.shape, 0.25, generator)).abs())


def weight_norm(conv: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return (g, v), whichever of torch's two spellings holds them."""
    if hasattr(conv, "weight_g"):
        return conv.weight_g, conv.weight_v
    if hasattr(conv, "parametrizations"):
        weight = conv.parametrizations.weight
        return weight.original0, weight.original1
    return None, None


def fill_lstm_or_norm(module: nn.Module, generator: torch.Generator) -> None:
    for name, tensor in module.named_parameters():
        if tensor.dim() == 1:
            offset = 1.0 if name == "weight" else 0.0
            tensor.copy_(offset + grid_normal(tensor.shape, 0.25, generator))
        else:
            std = 1.5 / math.sqrt(tensor.shape[1])
            tensor.copy_(grid_normal(tensor.shape, std, generator))


def fit_codebooks(codebooks: list, latents: Tensor, generator: torch.Generator) -> None:
    """Draw residual codebooks around the encoder's output (B, D, T).

    `codebooks` have the buffers `embed`, `embed_avg`, `cluster_size` and
    `inited`. The average is set apart from `embed`, so that reading the wrong
    one shows.
    """
    residual = latents.transpose(1, 2).reshape(-1, latents.shape[1])
    for codebook in codebooks:
        std = residual.std(0).mean().item()
        embed = residual.mean(0) + grid_normal(codebook.embed.shape, std, generator)
        step = 2.0 ** round(math.log2(std / 8))
        codebook.embed.copy_(torch.round(embed / step) * step)
        codebook.embed_avg.copy_(codebook.embed * 4)
        codebook.cluster_size.fill_(4)
        codebook.inited.fill_(1)
        nearest = torch.cdist(residual, codebook.embed).argmin(-1)
        residual = residual - codebook.embed[nearest]


def music(channels: int, samples: int, generator: torch.Generator) -> Tensor:
    """Make up (2, channels, samples) of gliding tones, noise and silence."""
    time = torch.linspace(0, 1, samples)
    start, end = torch.rand(2, 2, channels, 1, generator=generator) * 400 + 20
    tones = torch.sin(2 * math.pi * time * (start + (end - start) * time))
    loudness = torch.rand(2, channels, 6, generator=generator) ** 2
    loudness = nn.functional.interpolate(loudness, samples, mode="linear")
    noise = torch.randn(2, channels, samples, generator=generator)
    return loudness * (0.5 * tones + 0.2 * noise)


def smallest_gap(scores: Tensor) -> float:
    """How far the best score is ahead of the second, at the closest call."""
    best, second = scores.topk(2, dim=-1).values.unbind(-1)
    return (best - second).min().item()


def tokenizer(normalization: str) -> bytes:
    """Train a SentencePiece model with T5's special ids: pad 0, eos 1, unk 2.

    T5's own normalization, nmt_nfkc, makes a file of 240 KB whatever the
    number of pieces; "identity" makes one of 2 KB.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS.strip().splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=100,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name=normalization,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def int32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()


def float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


@contextmanager
def watch_codebooks(codebook_class: type) -> Iterator[list[float]]:
    """Collect, relative to the mean, how close each choice of a code was."""
    gaps, original = [], codebook_class.quantize

    def quantize(self, states: Tensor) -> Tensor:
        distances = torch.cdist(states.float(), self.embed).square()
        first, second = distances.topk(2, largest=False).values.unbind(-1)
        gaps.append(((second - first) / distances.mean()).min().item())
        return original(self, states)

    codebook_class.quantize = quantize
    try:
        yield gaps
    finally:
        codebook_class.quantize = original
