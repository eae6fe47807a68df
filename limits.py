"""Limits of configs, which may come from a stranger: T5's, the codec's, the decoder's.

A config sets the sizes of a model, and absurd ones would fill memory. What is not
ported is refused, too. All is checked before a model is built. Stands alone.
"""

from typing import Any

MODEL_TYPES = ("musicgen", "musicgen_melody")
DTYPES = ("float16", "bfloat16", "float32")


def check_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError unless a `config.json` is that of a MusicGen."""
    kind, dtype = settings.get("model_type"), settings.get("decoder_dtype", DTYPES[0])
    if kind not in MODEL_TYPES:
        listed = " or ".join(map(repr, MODEL_TYPES))
        raise ValueError(f"model_type must be {listed}, got {kind!r:.80}.")
    if dtype not in DTYPES:
        listed = ", ".join(DTYPES)
        raise ValueError(f"decoder_dtype must be one of {listed}, got {dtype!r:.80}.")
    for part in ("decoder", "text_encoder", "audio_encoder"):
        no_text = part == "text_encoder" and settings.get(part, "") is None
        if not (no_text or isinstance(settings.get(part), dict)):
            raise ValueError(f"It must have '{part}', an object, but lacks it.")


def check_parts(config: Any) -> None:
    """Raise ValueError for a `MusicGenConfig` of which a part is refused below."""
    check_decoder(config.decoder)
    if config.text_encoder is not None:
        check_t5(config.text_encoder)
    check_codec(config.audio_encoder)
    check_pair(config.decoder, config.audio_encoder)
    check_lengths(config)
    if config.text_encoder is None and config.conditioner is not None:
        raise ValueError("a model that follows a sound must have a text_encoder.")


def check_lengths(config: Any) -> None:
    """Raise ValueError for windows, takes or strides of absurd lengths, in seconds."""
    longest = config.max_duration
    check_seconds("max_duration", longest, 0.1, 600)
    check_seconds("default_duration", config.default_duration, 0.1, 600)
    if config.default_stride is not None:
        check_seconds("default_stride", config.default_stride, 0.02, longest)


def check_seconds(name: str, seconds: Any, least: float, most: float) -> None:
    if type(seconds) not in (int, float) or not least <= seconds <= most:
        raise ValueError(
            f"{name} must be from {least} to {most} seconds, got {seconds!r:.80}."
        )


T5 = {  # least and largest value of each size
    "vocab_size": (1, 2**20),
    "d_model": (1, 2**14),
    "d_kv": (1, 2**10),
    "d_ff": (1, 2**17),
    "num_layers": (1, 200),
    "num_heads": (1, 200),
    "n_positions": (2, 2**16),
    "relative_attention_num_buckets": (4, 2**10),
    "relative_attention_max_distance": (2, 2**16),
    "layer_norm_epsilon": (0.0, 1.0),
}
FEED_FORWARDS = ("relu", "gated-gelu", "gated-silu")


def check_t5(config: Any) -> None:
    """Raise ValueError for a T5 that is not ported, or that is hostile."""
    check_numbers(config, T5)
    check_choices(config, {"feed_forward_proj": FEED_FORWARDS})
    buckets = config.relative_attention_num_buckets
    if 4 * config.relative_attention_max_distance <= buckets:
        raise ValueError(
            "relative_attention_max_distance must be more than a quarter of "
            f"relative_attention_num_buckets, {buckets}."
        )


CODEC = {  # of a list: of the numbers in it
    **dict.fromkeys(("hidden_size", "num_filters", "compress"), (1, 2**14)),
    **dict.fromkeys(("kernel_size", "last_kernel_size"), (1, 2**10)),
    **dict.fromkeys(("residual_kernel_size", "upsampling_ratios"), (1, 2**10)),
    **dict.fromkeys(("num_residual_layers", "num_lstm_layers"), (0, 64)),
    **dict.fromkeys(("audio_channels", "dilation_growth_rate"), (1, 64)),
    "sampling_rate": (1, 2**20),
    "codebook_size": (2, 2**16),
    "target_bandwidths": (1e-3, 1e5),
    "chunk_length_s": (1e-3, 1e5),
    "overlap": (0.0, 0.99),
    "trim_right_ratio": (0.0, 1.0),
}
CODEC_CHOICES = {
    **dict.fromkeys(("normalize", "use_causal_conv"), (False, True)),
    "use_conv_shortcut": (False, True),
    "norm_type": ("weight_norm", "time_group_norm"),
    "pad_mode": ("reflect", "constant"),
}


def check_codec(config: Any) -> None:
    """Raise ValueError for an EnCodec that is not ported, or that is hostile."""
    for name in ("upsampling_ratios", "target_bandwidths"):
        numbers = getattr(config, name)
        if not isinstance(numbers, tuple) or not 1 <= len(numbers) <= 8:
            raise ValueError(f"{name} must be a list of 1 to 8, got {numbers!r:.80}.")
    check_numbers(config, CODEC, optional=("chunk_length_s", "overlap"))
    check_choices(config, CODEC_CHOICES)
    if config.compress > config.num_filters:
        raise ValueError(
            f"compress must be at most num_filters, {config.num_filters}, got "
            f"{config.compress}."
        )
    if (count := config.num_codebooks()) > 128:
        raise ValueError(
            f"target_bandwidths must be those of at most 128 codebooks, got {count}."
        )
    seconds = config.chunk_length_s
    if seconds is not None and seconds * config.sampling_rate < 1:
        raise ValueError(f"chunk_length_s must be at least a sample, got {seconds}.")


DECODER = {
    "vocab_size": (1, 2**16),
    "hidden_size": (4, 2**14),
    "num_hidden_layers": (1, 200),
    "num_attention_heads": (1, 2**10),
    "ffn_dim": (1, 2**17),
    "num_codebooks": (1, 64),
    "audio_channels": (1, 2),
}


def check_decoder(config: Any) -> None:
    """Raise ValueError for a decoder that is not ported, or that is hostile."""
    check_numbers(config, DECODER)
    width, heads = config.hidden_size, config.num_attention_heads
    if width % (2 * heads):
        raise ValueError(
            "num_attention_heads must split hidden_size into even widths, got "
            f"{heads} for {width}."
        )
    K, delays = config.num_codebooks, config.delays
    if K % config.audio_channels:
        raise ValueError(
            f"num_codebooks must be even where audio_channels are 2, got {K}."
        )
    numbers = isinstance(delays, list | tuple) and all(
        type(delay) is int and 0 <= delay <= 100 for delay in delays
    )
    if not (numbers and len(delays) == K and min(delays) == 0):
        raise ValueError(
            f"delays must give {K} numbers of steps, the least 0 and none above 100, "
            f"got {delays!r:.80}."
        )


def check_pair(decoder: Any, codec: Any) -> None:
    """Raise ValueError unless the decoder's codes can be the codec's."""
    K, V = -(-decoder.num_codebooks // decoder.audio_channels), decoder.vocab_size
    for name, fits, least in (
        ("audio_channels", codec.audio_channels == 1, 1),
        ("normalize", not codec.normalize, False),
        ("codebook_size", codec.codebook_size >= V, V),
        ("target_bandwidths", codec.num_codebooks() >= K, f"enough for {K} codebooks"),
    ):
        if not fits:
            raise ValueError(
                f"The codec does not belong to the decoder: its {name} must be "
                f"{least}, got {getattr(codec, name)}."
            )


def check_numbers(
    config: Any, limits: dict[str, tuple], optional: tuple[str, ...] = ()
) -> None:
    """Raise ValueError unless each value, or each in a tuple, lies in its limits.

    Integer limits ask for integers. Optional ones may be None.
    """
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        kinds = (int,) if type(low) is int else (int, float)
        for number in value if isinstance(value, tuple) else (value,):
            fits = type(number) in kinds and low <= number <= high
            if not (fits or number is None and name in optional):
                raise ValueError(
                    f"{name} must be from {low} to {high}, got {value!r:.80}."
                )


def check_choices(config: Any, choices: dict[str, tuple]) -> None:
    """Raise ValueError unless each value is one that is ported."""
    for name, values in choices.items():
        if (value := getattr(config, name)) not in values:
            listed = ", ".join(map(str, values))
            raise ValueError(f"{name} must be one of {listed}, got {value!r:.80}.")
