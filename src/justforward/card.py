"""The model card that Trainer writes, with the recipe that was followed: its own names AdamW's, whatever steps were taken."""

from __future__ import annotations

from pathlib import Path

from justforward.groups import family_of
from justforward.loop import LOG
from justforward.training_arguments import MeZOConfig

_FIRST = "- optimizer: "


def recipe(args: MeZOConfig, beside: bool) -> str:
    """How a model was tuned, as a line of its card.

    Args:
        beside: the log is beside the card.
    """
    given = args.mezo()
    given["family"] = family_of(args.family, args.estimator)
    names = ("rule", "estimator", "looks", "family", "eps", "num_samples", "weight_decay", "seed")
    said = [f"{name}={given[name]!r}" for name in names]
    said += [f"{name}={value!r}" for name in ("modified", "blocks") if (value := getattr(args, name))]  # fmt: skip
    text = f"MeZO (forward passes only, justforward) with {', '.join(said)}"
    if beside:
        text += f". Its steps are in `{LOG}` beside this: `justforward.replay(base, '{LOG}')` makes the tuned weights of the base"
    return text


def correct(card: Path, args: MeZOConfig) -> None:
    """Let a card that Trainer has written say what the optimizer was."""
    lines = card.read_text(encoding="utf-8").splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith(_FIRST)]
    text = _FIRST + recipe(args, (card.parent / LOG).is_file())
    if places:
        lines[places[0]] = text
    else:  # another version's card names none
        lines += ["", text]
    card.write_text("\n".join(lines) + "\n", encoding="utf-8")
