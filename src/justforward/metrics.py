"""What a set of predictions is worth: accuracy, F1 and the rest, as the tasks publish them. No torch in here.

A prediction is a label (classification), an option (choice) or a text (generation). Answers of the last two are
alternatives, each a bag of spans: nearly always one, in DROP sometimes several.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from justforward.data import Example
from justforward.tasks import Task

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def figures(
    task: Task, examples: Sequence[Example], predictions: Sequence[str]
) -> dict[str, float]:
    """The metrics of a task, each in [0, 1] (matthews: [-1, 1]); its first is what chooses a step.

    Args:
        task: names the metrics.
        examples: the rows, with their answers.
        predictions: one a row, as `evaluate.Evaluation` has them.
    """
    names = task.metrics or (task.metric,)
    if task.kind == "classification":
        pairs = Counter(zip((e.label for e in examples), predictions, strict=True))
        return {name: _of_labels(name, task, pairs, examples, predictions) for name in names}
    return {
        name: math.fsum(
            BY_ROW[name](predicted, example.answers)
            for example, predicted in zip(examples, predictions, strict=True)
        )
        / len(examples)
        for name in names
    }


# ------------------------------------------------------------------------------------ of whole sets


def _of_labels(
    name: str,
    task: Task,
    pairs: Counter[tuple[str, str]],
    examples: Sequence[Example],
    predictions: Sequence[str],
) -> float:
    if name == "accuracy":
        right = sum(count for (truth, predicted), count in pairs.items() if truth == predicted)
        return right / len(examples)
    if name == "f1":
        assert task.positive is not None
        return _f1(pairs, task.positive)
    if name == "f1_macro":  # over the labels that there are, as scikit-learn has it
        labels = {label for pair in pairs for label in pair}
        return math.fsum(_f1(pairs, label) for label in labels) / len(labels)
    if name == "matthews":
        return _matthews(pairs, *task.labels)
    right_groups: dict[tuple[str, ...], bool] = {}
    for example, predicted in zip(examples, predictions, strict=True):
        key = tuple(example.fields.get(field, "") for field in task.group)
        right_groups[key] = right_groups.get(key, True) and predicted == example.label
    return sum(right_groups.values()) / len(right_groups)


def _f1(pairs: Counter[tuple[str, str]], label: str) -> float:
    hits = pairs[label, label]
    told = sum(count for (_, predicted), count in pairs.items() if predicted == label)
    real = sum(count for (truth, _), count in pairs.items() if truth == label)
    return 2 * hits / (told + real) if told + real else 0.0


def _matthews(pairs: Counter[tuple[str, str]], a: str, b: str) -> float:
    aa, ab, ba, bb = pairs[a, a], pairs[a, b], pairs[b, a], pairs[b, b]
    scale = math.sqrt((aa + ab) * (aa + ba) * (bb + ab) * (bb + ba))
    return (aa * bb - ab * ba) / scale if scale else 0.0


# --------------------------------------------------------------------------------------- of one row

Answers = Sequence[tuple[str, ...]]


def accuracy(predicted: str, answers: Answers) -> float:
    """Whether the option is a right one, letter by letter."""
    return float(any(predicted == joined(answer) for answer in answers))


def exact_match(predicted: str, answers: Answers) -> float:
    """SQuAD's: equal to an answer but for case, punctuation, articles and spaces (arXiv 1606.05250)."""
    told = normalised(predicted)
    return float(any(told == normalised(joined(answer)) for answer in answers))


def f1(predicted: str, answers: Answers) -> float:
    """SQuAD's: overlap of words with the nearest answer (arXiv 1606.05250)."""
    return max(_overlap(normalised(predicted), normalised(joined(a))) for a in answers)


def drop_exact_match(predicted: str, answers: Answers) -> float:
    """DROP's (arXiv 1903.00161): all spans, numbers by value; see `_readings`."""
    return max(
        float(_same_bags(told, answer)) for told in _readings(predicted) for answer in answers
    )


def drop_f1(predicted: str, answers: Answers) -> float:
    """DROP's (arXiv 1903.00161): mean over spans, matched one to one; a wrong number counts nothing.

    A row's is not rounded to two places, as the published evaluator rounds it.
    """
    return max(_bags_f1(told, answer) for told in _readings(predicted) for answer in answers)


BY_ROW: dict[str, Callable[[str, Answers], float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "f1": f1,
    "drop_exact_match": drop_exact_match,
    "drop_f1": drop_f1,
}


def joined(answer: tuple[str, ...]) -> str:
    """An answer as text: of several spans a list with commas."""
    return ", ".join(answer)


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and doubled spaces."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _overlap(told: str, real: str) -> float:
    mine, theirs = told.split(), real.split()
    if not mine or not theirs:  # an answer of articles alone, or none
        return float(mine == theirs)
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs))


def _readings(predicted: str) -> list[tuple[str, ...]]:
    """Text as one span, and as the spans between its commas: a text does not say which it means."""
    spans = tuple(span.strip() for span in predicted.split(",") if span.strip())
    return [(predicted,), spans] if len(spans) > 1 else [(predicted,)]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _drop_words(text: str) -> list[str]:
    """DROP's tokens: split at spaces and hyphens, numbers by value, other words as SQuAD's.

    A word is a number as it is ("2.50") or without its punctuation ("1,000").
    """
    words: list[str] = []
    for word in re.split(r"[ \-]", text.lower()):
        number = _number(word)
        if number is None:
            number = _number(word.translate(_PUNCTUATION))
        words += normalised(word).split() if number is None else [str(number)]
    return words


def _same_bags(told: Sequence[str], real: Sequence[str]) -> bool:
    a, b = ([" ".join(_drop_words(span)) for span in bag] for bag in (told, real))
    return set(a) == set(b) and len(a) == len(b)


def _span_f1(told: list[str], real: list[str]) -> float:
    a, b = set(told), set(real)  # DROP compares bags of different words
    numbers = {word for word in b if _number(word) is not None}
    if numbers and not numbers & a:
        return 0.0
    common = len(a & b)
    return 2 * common / (len(a) + len(b)) if common else float(not a and not b)


def _bags_f1(told: Sequence[str], real: Sequence[str]) -> float:
    """Mean F1 over the spans of the longer bag, matched so that the sum is greatest."""
    from scipy.optimize import linear_sum_assignment

    scores = [[_span_f1(_drop_words(a), _drop_words(b)) for b in real] for a in told]
    rows, columns = linear_sum_assignment(scores, maximize=True)
    total = math.fsum(scores[row][column] for row, column in zip(rows, columns, strict=True))
    return total / max(len(told), len(real))
