"""What is raced on: upper layers of an encoder over kept outputs of those below, and labelled rows.

A free problem has no prompt: the mean over the tokens, or the first token, goes into a linear head of zeros. A prompted
one is asked at its mask for the label's word. Where one token alone is read, the last layer runs for that one only.
Everything above `below` is tuned, the head included; what is below is run once a row.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contenders import Piece, Walk
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

Rows = list[tuple[list[str], int]]


class Layer(nn.Module):
    """A layer of BERT or RoBERTa with its weights, and no more than it needs."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        inner, outer = source.attention.self, source.attention.output
        width, self.heads = inner.query.in_features, inner.num_attention_heads
        self.query, self.both, self.out = inner.query, nn.Linear(width, 2 * width), outer.dense
        with torch.no_grad():
            for name in ("weight", "bias"):
                parts = [getattr(m, name) for m in (inner.key, inner.value)]
                getattr(self.both, name).copy_(torch.cat(parts))
        self.norm, self.up = outer.LayerNorm, source.intermediate.dense
        self.down, self.last = source.output.dense, source.output.LayerNorm

    def attended(self, x: Tensor, mask: Tensor, place: Tensor | None = None) -> Tensor:
        """Before the MLP."""
        rows, tokens, _ = x.shape
        k, v = self.both(x).view(rows, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        if place is not None:
            x = x[torch.arange(rows), place][:, None]
        q = self.query(x).view(rows, x.shape[1], self.heads, -1).transpose(1, 2)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.norm(x + self.out(seen.transpose(1, 2).reshape(x.shape)))

    def forward(self, x: Tensor, mask: Tensor, place: Tensor | None = None) -> Tensor:
        """For all tokens [B, T, width], or that at the place alone [B, 1, width]."""
        x = self.attended(x, mask, place)
        return self.last(x + self.down(F.gelu(self.up(x))))


class Mlp(nn.Module):
    """The second half of a layer, over what its attention gives."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.up, self.down, self.last = layer.up, layer.down, layer.last

    def forward(self, x: Tensor, mask: Tensor, place: Tensor | None = None) -> Tensor:
        return self.last(x + self.down(F.gelu(self.up(x))))


class Hidden(nn.Module):
    """A layer from nothing, over features that stay."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(inputs, width)

    def forward(self, x: Tensor, mask: Tensor, place: Tensor | None = None) -> Tensor:
        return F.gelu(self.map(x))


class Free(nn.Module):
    """A linear head of zeros."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, labels)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


class Prompted(nn.Module):
    """The masked head, for the words of the labels only; these stay."""

    def __init__(self, source: Any, words: list[int]) -> None:
        super().__init__()
        head = source.cls.predictions
        self.dense, self.norm = head.transform.dense, head.transform.LayerNorm
        self.register_buffer("words", head.decoder.weight[words].detach().clone())
        self.register_buffer("bias", head.decoder.bias[words].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), self.words, self.bias)


class Upper(nn.Module):
    """Layers and head, which reads the mean of all tokens or the one at the place."""

    def __init__(self, layers: Sequence[nn.Module], head: nn.Module, mean: bool) -> None:
        super().__init__()
        self.layers, self.head, self.mean = nn.ModuleList(layers), head, mean

    def features(self, x: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        """What the head reads, [B, width]."""
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        if not self.mean:
            return self.layers[-1](x, mask, place)[:, 0]
        x = self.layers[-1](x, mask)
        return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, x: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        return self.head(self.features(x, mask, place))


@dataclass
class Problem:
    """A task on a model.

    Attributes:
        hidden [N, T, width], mask [N, T], place [N], labels [N]: of all rows; train, validation and test are ranges.
    """

    model: Upper
    hidden: Tensor
    mask: Tensor
    place: Tensor
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model is given, without needless padding."""
        mask = self.mask[rows]
        longest = int(mask.sum(1).max())
        return self.hidden[rows, :longest], mask[:, :longest], self.place[rows]

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """One a row."""
        return F.cross_entropy(model(*self.batch(rows)), self.labels[rows], reduction="none")

    @torch.no_grad()
    def score(self, model: nn.Module, rows: Tensor) -> tuple[float, float]:
        """Mean loss and accuracy."""
        loss = right = 0.0
        for part in rows.split(64):
            logits = model(*self.batch(part))
            loss += float(F.cross_entropy(logits, self.labels[part], reduction="sum"))
            right += int((logits.argmax(1) == self.labels[part]).sum())
        return loss / len(rows), right / len(rows)


def flatten(model: nn.Module) -> tuple[Tensor, list[Piece]]:
    """Make all parameters views of one vector."""
    named = list(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for _, p in named])
    pieces, at = [], 0
    for name, p in named:
        piece = Piece(name, at, tuple(p.shape))
        p.data = flat[piece.place].view(p.shape)
        pieces.append(piece)
        at += p.numel()
    return flat, pieces


class Draws:
    """Rows of training examples, epoch by epoch in an order of the seed's."""

    def __init__(self, train: Tensor, seed: int) -> None:
        self.train, self.generator = train, torch.Generator().manual_seed(seed)
        self.waiting = train[:0]

    def __call__(self, size: int) -> Tensor:
        while len(self.waiting) < size:
            order = torch.randperm(len(self.train), generator=self.generator)
            self.waiting = torch.cat([self.waiting, self.train[order]])
        rows, self.waiting = self.waiting[:size], self.waiting[size:]
        return rows


def walk_on(problem: Problem, model: nn.Module, seed: int, size: int) -> Walk:
    """A walk whose losses are those of the problem."""
    buffer, pieces = flatten(model)

    @torch.no_grad()
    def losses(at: Tensor, rows: Tensor) -> Tensor:
        buffer.copy_(at)
        return problem.losses(model, rows)

    def inputs(at: Tensor, rows: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen[f"{name}.weight"] = given[0].flatten(0, -2)

        hooks = [
            module.register_forward_pre_hook(functools.partial(keep, name))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        losses(at, rows)
        for hook in hooks:
            hook.remove()
        return seen

    generator = torch.Generator().manual_seed(seed + 1_000_000)
    draw = Draws(problem.train, seed)
    return Walk(buffer.clone(), pieces, losses, draw, inputs, generator, size)


def read(task: dict[str, Any], file: str) -> Rows:
    """Texts and labels of a published file, in a fixed shuffled order."""
    lines = (Path(task["folder"]) / file).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    labels = task["labels"]
    rows = [([str(r[f]) for f in task["fields"]], labels.index(r["label"])) for r in found]
    random.Random(0).shuffle(rows)
    return rows


def load(model: dict[str, Any], task: dict[str, Any]) -> Problem:
    """Read the model, run what is below once over all rows."""
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(model["folder"], local_files_only=True)
    whole: Any = AutoModelForMaskedLM.from_pretrained(model["folder"], local_files_only=True)
    whole.eval().requires_grad_(False)
    rows: Rows = []
    ranges = []
    sources = (("train.jsonl", task["rows"][0] + task["rows"][1]), ("test.jsonl", task["rows"][2]))
    for file, count in sources:
        rows += read(task, file)[:count]
    first, second, third = (sum(task["rows"][: i + 1]) for i in range(3))
    ranges = [range(first), range(first, second), range(second, third)]
    prompted = model["reads"] == "mask"
    if prompted:
        texts = []
        for fields, _ in rows:
            named = dict(zip(task["fields"], map(str.strip, fields), strict=True))
            texts.append([task["template"].format(mask=tokenizer.mask_token, **named)])
    else:
        texts = [fields for fields, _ in rows]
    coded = tokenizer(
        *[list(part) for part in zip(*texts, strict=True)],
        truncation=True,
        max_length=model["longest"],
        padding="longest",
        return_tensors="pt",
    )
    ids, mask = coded["input_ids"], coded["attention_mask"]
    place = (ids == tokenizer.mask_token_id).int().argmax(1)  # the first token where there is none
    labels = torch.tensor([label for _, label in rows])
    layers: Sequence[nn.Module] = [
        Layer(source) for source in whole.base_model.encoder.layer[model["below"] :]
    ]
    what = {k: v for k, v in model.items() if k not in ("calibrated", "width")}
    key = hashlib.sha256(json.dumps([what, task], sort_keys=True).encode()).hexdigest()[:16]
    kept = Path(model["folder"], f"race-{key}.safetensors")
    if not kept.exists():
        save_file({"hidden": lower(whole, layers, model, ids, mask, place)}, kept)
    hidden = load_file(kept)["hidden"]
    if model["part"] != "layers":  # one token is left
        mask, place = mask[:, :1], place * 0
    if model["part"] == "mlp":
        layers = [Mlp(*layers)]
    if model["part"] == "features":
        first_rows = hidden[: task["rows"][0]]
        hidden = (hidden - first_rows.mean(0)) / first_rows.std(0)
        layers = [Hidden(hidden.shape[-1], model["width"])]
    if prompted:
        words = [tokenizer(w, add_special_tokens=False)["input_ids"] for w in task["words"]]
        assert all(len(w) == 1 for w in words), f"not one token each: {task['words']}"
        head: nn.Module = Prompted(whole, [w[0] for w in words])
    else:
        head = Free(model.get("width") or hidden.shape[-1], len(task["labels"]))
    upper = Upper(
        layers, head, model["reads"] == "mean" and model["part"] == "layers"
    ).requires_grad_(True)
    parts = [torch.tensor(r) for r in ranges]
    parts[1:] = [part[mask[part].sum(1).argsort()] for part in parts[1:]]  # less padding
    problem = Problem(upper, hidden, mask.bool(), place, labels, *parts)
    if model.get("calibrated"):
        calibrate(problem)
    return problem


@torch.no_grad()
def calibrate(problem: Problem) -> None:
    """Let no word be likelier than another on the average of the training rows, of which no label is read."""
    logits = torch.cat([problem.model(*problem.batch(r)) for r in problem.train.split(64)])
    head: Any = problem.model.head
    head.bias -= logits.mean(0)


@torch.no_grad()
def lower(
    whole: Any,
    layers: Sequence[Any],
    model: dict[str, Any],
    ids: Tensor,
    mask: Tensor,
    place: Tensor,
) -> Tensor:
    """What enters the part that is tuned, of every row."""
    out = []
    for start in range(0, len(ids), 64):
        part = slice(start, start + 64)
        states = whole.base_model(
            input_ids=ids[part], attention_mask=mask[part], output_hidden_states=True
        ).hidden_states[model["below"]]
        if model["part"] == "mlp":
            states = layers[0].attended(states, mask[part].bool(), place[part])
        if model["part"] == "features":
            seen = mask[part][:, :, None]
            states = (states * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        out.append(states.clone())
    return torch.cat(out)


def fit_head(problem: Problem, model: Upper, count: int, seed: int) -> int:
    """Start the free head as a logistic regression of so many training rows; returns the example-forwards."""
    from sklearn.linear_model import LogisticRegression

    assert isinstance(model.head, Free)
    rows = Draws(problem.train, seed + 7)(count)
    with torch.no_grad():
        x, mask, place = problem.batch(rows)
        found = model.features(x, mask, place).double().numpy()
        fit = LogisticRegression(C=1.0, max_iter=500).fit(found, problem.labels[rows].numpy())
        weight = torch.as_tensor(fit.coef_, dtype=torch.float32)
        bias = torch.as_tensor(fit.intercept_, dtype=torch.float32)
        if len(fit.classes_) == 2:  # one row says both
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        model.head.map.bias.fill_(-20.0)  # of labels that were not met
        model.head.map.weight[fit.classes_] = weight
        model.head.map.bias[fit.classes_] = bias
    return count
