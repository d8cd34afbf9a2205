"""The two errors a user of this package may meet by name."""

from __future__ import annotations


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
