"""What a private run may spend and has spent: noise for the planned steps, epsilon so far, what may be shown to others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from justforward.accounting import delta_for, epsilon_of, library, noise_for
from justforward.config import TrainConfig
from justforward.errors import UserError
from justforward.private import Private
from justforward.schedules import planned_steps

if TYPE_CHECKING:
    from justforward.trajectory import Log

SHARED = "trajectory.jfl, config.yaml, and the model that replay makes of them"
KEPT = (
    "metrics.jsonl, result.json, plot.png, environment.json, seen.txt, and what the command prints"
)


def with_delta(config: TrainConfig, rows: int) -> TrainConfig:
    """`config` with a delta for so many training rows, if it is a private run's.

    Raises:
        UserError: the delta is no protection, or a step would have more rows than there are.
    """
    if not config.private:
        return config
    delta = delta_for(rows, config.target_delta, "--target-delta")
    if config.batch_size > rows:
        raise UserError(
            f"--batch-size is {config.batch_size}: with --private it is how many of the {rows} training rows a step has on "
            "average: choose at most that"
        )
    return replace(config, target_delta=delta)


class Budget:
    """Of one private run.

    Args:
        config: of the run, with a delta.
        rows: how many training rows it has.
        log: of a run that goes on: the noise stays what it was.

    Raises:
        UserError: dp-accounting is not installed, or no noise keeps to the target.
    """

    def __init__(self, config: TrainConfig, rows: int, log: Log | None) -> None:
        library()
        assert config.target_delta is not None
        self.delta = config.target_delta
        self._planned = planned_steps(config)
        self._target = config.target_epsilon
        noise = config.noise_multiplier
        if log is not None:
            noise = _settings_of(log)["noise_multiplier"]
        elif noise is None:
            assert self._target is not None
            noise = noise_for(
                epsilon=self._target,
                delta=self.delta,
                rate=config.batch_size / rows,
                answers=self._planned,
            )
        assert noise is not None
        self.private = Private(rows, config.batch_size, noise, config.clip)

    def spent(self, answers: int) -> float:
        """Epsilon of so many answers, one a step."""
        private = self.private
        return epsilon_of(
            noise_multiplier=private.noise_multiplier,
            rate=private.rate,
            answers=answers,
            delta=self.delta,
        )

    def so_far(self) -> dict[str, Any]:
        """What result.json says of it."""
        return {
            "epsilon": self.spent(self.private.answers),
            "delta": self.delta,
            "answers": self.private.answers,
            **self.private.settings(),
            "share": SHARED,
            "keep": KEPT,
        }

    def spell(self, answers: int) -> str:
        """How epsilon stands after so many, in a sentence."""
        return f"epsilon {self.spent(answers):.3f} at delta {self.delta:g} after {answers} private answers"

    def plan(self, config: TrainConfig) -> list[str]:
        """What there is to know before the first step."""
        private = self.private
        chosen = [
            f"--{name.replace('_', '-')} {value}"
            for name, value, other in (
                ("keep", config.keep, "last"),
                ("patience", config.patience, 0),
                ("target_accuracy", config.target_accuracy, None),
            )
            if value != other
        ]
        covered = "validation and test rows are not protected, their scores are exact"
        if chosen:
            covered += (
                f"; {' and '.join(chosen)} choose by validation rows, so those must be public"
            )
        return [
            f"private: epsilon {self.spent(self._planned):.3f} at delta {self.delta:g} for each of {private.rows} training "
            f"rows after {self._planned} steps, noise multiplier {private.noise_multiplier:.4g}, "
            f"{private.batch_size} rows a step on average",
            f"private: {covered}",
            f"private: may be shared: {SHARED}; keep to yourself: {KEPT}",
        ]


def budget_of(config: TrainConfig, rows: int, log: Log | None) -> Budget | None:
    """The budget of a private run; of others None. Raises as `Budget`."""
    return Budget(config, rows, log) if config.private else None


def spent_by(log: Log, delta: float) -> float:
    """Epsilon of a private run's log, from the log alone.

    Raises:
        UserError: as `epsilon_of`.
    """
    said = _settings_of(log)
    return epsilon_of(
        noise_multiplier=said["noise_multiplier"],
        rate=said["batch_size"] / said["rows"],
        answers=len(log.steps),
        delta=delta,
    )


def _settings_of(log: Log) -> dict[str, Any]:
    settings: dict[str, Any] = log.header["settings"]["private"]
    return settings
