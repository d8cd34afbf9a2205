"""The two errors a user of this package may meet by name; memory that ran out as one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something in the user's input cannot be used; the message is one line that says what to do."""


class NonFiniteLoss(ArithmeticError):
    """A loss came out as NaN or infinite while looking; the weights have been restored.

    Attributes:
        step: index of the step that was being estimated.
        loss: the value that came out.
        where: along which look, and of which row where that is known.
    """

    def __init__(self, step: int, loss: float, where: str) -> None:
        super().__init__(
            f"step {step}: the loss is {loss} {where}; the weights are as before the step: "
            "lower lr or eps, or look for a bad row in the batch"
        )
        self.step = step
        self.loss = loss
        self.where = where


@contextmanager
def memory_errors(said: Callable[[], str]) -> Iterator[None]:
    """Turns memory that ran out, in Python or in torch on any device, into one line.

    Args:
        said: where that was, and what to do.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        # torch has a class for devices' memory only
        if not (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in text
        ):
            raise
        first = " ".join(text.split("\n")[0].split()) or "no room left"
        raise UserError(f"out of memory ({first}): {said()}") from error
