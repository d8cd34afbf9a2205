"""Answers in the model's own words: a prompt is read once, then a token at a time, all rows together.

Greedy, or sampled with keyed randomness: the token at a place of a row depends on the seed, the row's key and the
place, so that two looks along one direction draw the same luck, and a rerun the same text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from justforward import noise
from justforward.cached import Encoded
from justforward.errors import UserError
from justforward.seq2seq import Answering

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest (greedy); else tokens are drawn from softmax(logits / temperature).
        seed: of the draws.
    """

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise UserError(f"temperature is {self.temperature}: it must be finite and at least 0")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}: it must be at least 0 and below 2^64")


GREEDY = Sampling()


@dataclass(frozen=True)
class Generated:
    """Texts, one a row, without what ended them and without special tokens; and how many forward passes of the batch they took."""

    texts: list[str]
    forwards: int


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, Tensor],
    accepts: set[str],
    *,
    stop: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    keys: Sequence[int] | None = None,
) -> Generated:
    """Continue each prompt until a stop string, the end-of-text token, or max_new_tokens.

    Args:
        batch: ``input_ids``, ``attention_mask``, ``position_ids`` [N, L], padded on the left; or as
            `Seq2SeqPrompts.batch` has it, each row with one sequence of the decoder's.
        accepts: names of the arguments that the model's forward takes.
        stop: strings that end a text; they are not part of it, nor is what follows.
        keys: of each row's randomness (default its place in the batch).

    Raises:
        UserError: the model keeps no keys and values; or its logits are not finite.
    """
    read = _begun(model, batch, accepts)
    keys = range(len(batch["input_ids"])) if keys is None else keys
    ends = _end_tokens(model, tokenizer)
    tokens: list[list[int]] = [[] for _ in keys]
    texts: list[str | None] = [None] * len(tokens)
    ones = batch["attention_mask"].new_ones(len(tokens), 1)
    forwards = 1
    for place in range(max_new_tokens):
        chosen = _next(read.logits[:, -1].float(), sampling, keys, place)
        for row, token in enumerate(chosen.tolist()):
            if texts[row] is None:
                texts[row] = _ended(tokens[row], token, ends, tokenizer, stop)
        if all(text is not None for text in texts) or place == max_new_tokens - 1:
            break
        # rows that have ended go on unread: the batch keeps its rows, each with its own direction
        read.advanced(chosen[:, None], ones)
        forwards += 1
    finished = [
        str(tokenizer.decode(tokens[row])) if text is None else text
        for row, text in enumerate(texts)
    ]
    special = _special_words(tokenizer)
    return Generated([_without(text, special).strip() for text in finished], forwards)


def _begun(
    model: PreTrainedModel, batch: dict[str, Tensor], accepts: set[str]
) -> Encoded | Answering:
    """The prompts, read."""
    if "decoder_input_ids" in batch:
        return Answering.begun(model, batch)
    if not {"past_key_values", "use_cache", "position_ids"} <= accepts:
        raise UserError(
            f"{type(model).__name__} keeps no keys and values to write texts with: give another model"
        )
    return Encoded.after(model, batch, accepts)


def _ended(
    tokens: list[int],
    token: int,
    ends: set[int],
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[str],
) -> str | None:
    """Append a token; the whole text if that has ended it."""
    if token in ends:
        return str(tokenizer.decode(tokens))
    tokens.append(token)
    text = str(tokenizer.decode(tokens))
    found = [at for at in (text.find(one) for one in stop) if at >= 0]
    return text[: min(found)] if found else None


def _special_words(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names of tokens that are no text, such as T5's <extra_id_0>; those of their own that a tokenizer has besides, too."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(each.content for each in added if each.special)}


def _without(text: str, words: set[str]) -> str:
    """A text without these. They are taken out last: what ends a text may be one of them, or hold one."""
    for word in words:
        if word:
            text = text.replace(word, "")
    return text


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    of_model: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
    return {end for end in ends if isinstance(end, int)}


def _next(logits: Tensor, sampling: Sampling, keys: Sequence[int], place: int) -> Tensor:
    """[N]: the next token of each row, from logits [N, V]."""
    if not bool(logits.isfinite().any(dim=-1).all()) or bool(logits.isnan().any()):
        raise UserError(
            "the logits are not finite: the model's weights are broken: load another model or replay to an "
            "earlier step"
        )
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    # argmax of logits / T + Gumbel noise is a draw from the softmax; a normal z has a uniform Phi(z)
    count = logits.shape[-1]
    drawn = torch.stack(
        [
            noise.normal(sampling.seed, key % 2**32, place * count, count).to(logits.device)
            for key in keys
        ]
    ).double()
    uniform = torch.special.ndtr(drawn).clamp(1e-12, 1.0 - 1e-12)
    gumbel = -(-uniform.log()).log()
    scores: Tensor = logits.double() / sampling.temperature + gumbel
    return scores.argmax(dim=-1)
