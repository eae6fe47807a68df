"""The `xp.cfg` texts of checkpoints in audiocraft's layout.

The parts of a released one that building the models needs, and a few that a reader
has to step over. "${...}" is left for the reader to resolve.
"""

LM_CFG = """
autocast: true
autocast_dtype: float16
solver: musicgen
sample_rate: 32000
channels: {channels}
compression_model_checkpoint: //pretrained/facebook/encodec_32khz
compression_model_n_q: null
tokens:
  padding_with_special_token: false
interleave_stereo_codebooks:
  use: {stereo}
  per_timestep: false
dataset:
  batch_size: 192
  segment_duration: 30
metrics:
  chroma_cosine:
    chroma_base:
      sample_rate: ${{sample_rate}}
      n_chroma: 12
optim:
  adam:
    betas:
    - 0.9
    - 0.95
    eps: 1.0e-08
lm_model: transformer_lm
codebooks_pattern:
  modeling: delay
  delay:
    delays: {delays}
    flatten_first: 0
    empty_initial: 0
  unroll:
    flattening: [0, 1, 2, 3]
    delays: [0, 0, 0, 0]
transformer_lm:
  dim: {dim}
  num_heads: {heads}
  num_layers: {layers}
  hidden_scale: {hidden_scale}
  n_q: {codebooks}
  card: {card}
  dropout: 0.0
  emb_lr: null
  activation: gelu
  norm_first: true
  bias_ff: false
  bias_attn: false
  bias_proj: false
  past_context: null
  causal: true
  custom: false
  memory_efficient: true
  attention_as_float32: false
  layer_scale: null
  positional_embedding: sin
  xpos: false
  checkpointing: none
  weight_init: gaussian
  depthwise_init: current
  zero_bias_init: true
  norm: layer_norm
  cross_attention: false
  qk_layer_norm: false
  qk_layer_norm_cross: false
  attention_dropout: null
  kv_repeat: 1
  two_step_cfg: false
classifier_free_guidance:
  training_dropout: 0.3
  inference_coef: 3.0
attribute_dropout: {{}}
fuser:
  cross_attention_pos_emb: false
  cross_attention_pos_emb_scale: 1
  sum: []
  prepend: []
  cross:
  - description
  input_interpolate: []
conditioners:
  args:
    merge_text_conditions_p: 0.25
    drop_desc_p: 0.5
  description:
    model: t5
    t5:
      name: t5-base
      finetune: false
      word_dropout: 0.3
      normalize_text: false
device: cuda
dtype: float16
"""

CODEC_CFG = """
solver: compression
sample_rate: 32000
channels: 1
compression_model: encodec
encodec:
  autoencoder: seanet
  quantizer: rvq
  sample_rate: ${{sample_rate}}
  channels: ${{channels}}
  causal: false
  renormalize: false
seanet:
  dimension: {dimension}
  channels: ${{channels}}
  causal: ${{encodec.causal}}
  n_filters: {filters}
  n_residual_layers: 1
  ratios: [8, 5, 4, 4]
  activation: ELU
  activation_params:
    alpha: 1.0
  norm: weight_norm
  norm_params: {{}}
  kernel_size: 7
  residual_kernel_size: 3
  last_kernel_size: 7
  dilation_base: 2
  pad_mode: constant
  true_skip: true
  compress: 2
  lstm: 2
  disable_norm_outer_blocks: 0
  decoder:
    trim_right_ratio: 1.0
    final_activation: null
    final_activation_params: null
  encoder: {{}}
rvq:
  n_q: 4
  q_dropout: false
  bins: {bins}
  decay: 0.99
  kmeans_init: true
  kmeans_iters: 50
  threshold_ema_dead_code: 2
  orthogonal_reg_weight: 0.0
  orthogonal_reg_active_codes_only: false
no_quant: {{}}
device: cuda
"""


def lm_cfg(
    stereo: bool, layers: int, dim: int, heads: int, hidden_scale: float, card: int
) -> str:
    """Text for a text-to-music decoder of 4 codebooks, 8 in stereo."""
    return LM_CFG.format(
        channels=2 if stereo else 1,
        stereo=str(stereo).lower(),
        codebooks=8 if stereo else 4,
        delays=[0, 0, 1, 1, 2, 2, 3, 3] if stereo else [0, 1, 2, 3],
        layers=layers,
        dim=dim,
        heads=heads,
        hidden_scale=hidden_scale,
        card=card,
    )


def codec_cfg(dimension: int, filters: int, bins: int) -> str:
    """Text for a mono 32 kHz EnCodec of 4 codebooks, padding with zeros."""
    return CODEC_CFG.format(dimension=dimension, filters=filters, bins=bins)
