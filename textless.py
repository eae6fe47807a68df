"""Models without text, such as micro-musicgen: what can be asked of them.

They were trained on music alone. audiocraft makes one row of logits for each take then,
whatever `cfg_coef` is, for there is nothing that guidance could move away from. Needs
options.py beside it.

    prompts, options = without_text("my-jungle", None, Options())
    prompts, options.copies  # [""], 1
"""

from dataclasses import replace

from options import Options, check_prompts


def without_text(
    model: str, prompts: str | list[str] | None, options: Options
) -> tuple[list[str], Options]:
    """The prompts and options that a model without text follows: empty texts, one for
    None; one row a take, no guidance.

    Raises ValueError for a text, which it could not follow, and for a guidance that is
    asked for.
    """
    prompts = check_prompts("" if prompts is None else prompts)
    model = f"{model or 'this model':.100}"
    negative = options.negative_prompt
    for name, texts in (("prompt", prompts), ("negative_prompt", [negative])):
        for text in filter(None, texts):
            raise ValueError(
                f"{name} must be empty, got {text!r:.80}: {model} was trained without "
                'texts and follows none. Leave it out, or give "".'
            )
    if (coef := options.guidance_coef) not in (1.0, Options.guidance_coef):
        raise ValueError(
            f"guidance_coef must be left out, got {coef:g}: {model} was trained without "
            "texts, and there is nothing that guidance could move away from."
        )
    return prompts, replace(options, guidance_coef=1.0)
