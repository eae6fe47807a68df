"""Models without text, such as micro-musicgen: what can be asked of them.

They were trained on music alone. audiocraft makes one row of logits for each take then,
whatever `cfg_coef` is, for there is nothing that guidance could move away from. Needs
options.py beside it.

    options = without_text("my-jungle", [""], Options(guidance_coef=3.0))
    options.copies  # 1
"""

from dataclasses import replace

from options import Options


def without_text(model: str, prompts: list[str], options: Options) -> Options:
    """The options that a model without text follows: one row a take, no guidance.

    Raises ValueError for a text, which it could not follow.
    """
    for name, texts in (
        ("prompt", prompts),
        ("negative_prompt", [options.negative_prompt]),
    ):
        for text in filter(None, texts):
            raise ValueError(
                f"{name} must be empty, got {text!r:.80}: {model or 'this model':.100} was trained "
                'without texts and follows none. Leave it out, or give "".'
            )
    return replace(options, guidance_coef=1.0)
