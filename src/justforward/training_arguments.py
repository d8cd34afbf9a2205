"""`MeZOConfig`: transformers' `TrainingArguments` with what `MeZO` is told besides, and what of theirs cannot be.

What backpropagation has and looks have not is refused here, with the reason, before anything is loaded or moved.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.utils import logging

from justforward.errors import UserError
from justforward.variants import Blocks, Modified

logger = logging.get_logger(__name__)

_SCALER = (
    "autocast rounds the two losses whose difference is looked for, and fp16's scaler scales gradients, of which there "
    "are none: say bf16=False and fp16=False, or load the model in 16 bits (from_pretrained(..., dtype=torch.bfloat16))"
)
_CAST = "evaluation would round the weights themselves: leave it out"
_SHARDED = "it shards gradients and optimizer states, of which there are none: leave it out"
_OTHER = "the optimizer is MeZO: leave it out (moments: rule='adam' or 'rmsprop')"
# Fields that must be as they are by default, and why.
REFUSED = {
    "bf16": _SCALER,
    "fp16": _SCALER,
    "bf16_full_eval": _CAST,
    "fp16_full_eval": _CAST,
    "deepspeed": _SHARDED,
    "fsdp": _SHARDED,
    "parallelism_config": "a model in shards is not looked along yet: leave it out",
    "auto_find_batch_size": "a second try would start from weights that the first has moved: choose the batch size; a "
    "look takes the memory of evaluation",
    "neftune_noise_alpha": "a look is taken in eval mode, where there is no such noise: leave it out",
    "optim": _OTHER,
    "optim_args": _OTHER,
    "optim_target_modules": "freeze parameters (requires_grad_(False)) instead: MeZO tunes all that require gradients",
    "adam_beta1": "say it in the rule: rule='adam(beta1=...)'",
    "adam_beta2": "say it in the rule: rule='adam(beta2=...)' or 'rmsprop(beta2=...)'",
    "adam_epsilon": "say it in the rule: rule='adam(eps=...)' or 'rmsprop(eps=...)'",
}
PRIVATE = ("target_epsilon", "target_delta", "noise_multiplier", "clip")
# Fields that must be so in a private run, and why.
VOIDING: dict[str, tuple[Any, str]] = {
    "estimator": (
        "weight",
        "in activation space each row has directions of its own, so the log would show which rows took part: use "
        "estimator='weight'",
    ),
    "modified": (
        None,
        "it measures layers by the losses of training rows, without noise: leave it out",
    ),
    "load_best_model_at_end": (
        False,
        "the log would become that of the best step, and say less than was spent: leave it out; each checkpoint has its log, choose "
        "one by public rows",
    ),
    "train_sampling_strategy": (
        "random",
        "the rows of a private step are a Poisson sample: leave it out",
    ),
    "include_num_input_tokens_seen": (
        "no",
        "how many tokens a step has tells which rows it had: leave it out",
    ),
    "save_on_each_node": (False, "what was spent is counted in one log: leave it out"),
}
# Fields that save memory of backpropagation: without effect, so scripts may keep them.
NEEDLESS = ("gradient_checkpointing", "activation_checkpointing")


def _said(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class MeZOConfig(TrainingArguments):
    """`transformers.TrainingArguments`, and the settings of `MeZO`.

    Of the fields that are there anyway `learning_rate`, `weight_decay` and `seed` go to `MeZO`, and `max_grad_norm` puts
    `clip(max_grad_norm)` before the rule: the root mean square of the projected gradients, an estimate of the gradient's norm,
    is clipped. By default there is no clipping, and a loss that is NaN is shown as such (`logging_nan_inf_filter=False`).

    Args:
        estimator: as for `MeZO`: weight, the paper's, for any loss; or activation, faster where each row has a loss of its own.
        rule: as for `MeZO`. The default divides by the running size of the projected gradients.
        family: as for `MeZO`.
        looks: as for `MeZO`.
        eps: as for `MeZO`.
        num_samples: directions a step (for each row in activation space).
        modified: "variance" or "expectation", with parameters as in "variance(by=looks, every=100)" (`Modified`).
        blocks: "layers", or regular expressions with spaces between them, one a block (`Blocks`).
        block_order: cyclic, or random.
        private: protect the training rows by differential privacy (docs/privacy.md): with target_epsilon or noise_multiplier, in weight
            space. Rows are a Poisson sample, and the batch size, with accumulation, is how many a step has on average; each row's loss is what
            Trainer says of a batch of it alone.
        target_epsilon: private: find the noise with which all planned steps cost no more than this.
        target_delta: private: at which delta epsilon is counted (default 1e-5, or a tenth of 1 / training rows if that is less).
        noise_multiplier: private: standard deviation of the noise, in units of what one row can change.
        clip: private: the length that a row's projected gradients are clipped to (default: they are scaled to length 1).
        max_skipped_steps: a step whose loss is NaN or infinite is not taken; after more than so many in a row training ends with
            `NonFiniteLoss`.

    Raises:
        UserError: a field has no meaning without gradients (`REFUSED`), or is out of range.
    """

    learning_rate: float = _said(
        1e-3, "With rules that normalise (rms, sign), the distance a coordinate moves in a step."
    )
    max_grad_norm: float = _said(
        0.0, "Clip the size of the projected gradients before the rule; 0: do not."
    )
    logging_nan_inf_filter: bool = _said(False, "Show the mean of other losses in place of NaN.")
    estimator: str = _said("weight", "weight, or activation.")
    rule: str = _said(
        "rms", "sgd, rms, sign, spread, clip(3), momentum, adam, rmsprop, joined by +."
    )
    family: str | None = _said(None, "gaussian, rademacher, rank1 or rank1-rademacher.")
    looks: str = _said("two-sided", "two-sided, one-sided or one-point.")
    eps: float = _said(1e-3, "How far to look.")
    num_samples: int = _said(1, "Directions a step.")
    modified: str | None = _said(None, "Look along unlike layers at unlike lengths.")
    blocks: str | None = _said(None, "Look along and move one block a step.")
    block_order: str = _said("cyclic", "cyclic, or random.")
    private: bool = _said(False, "Protect the training rows by differential privacy.")
    target_epsilon: float | None = _said(None, "Private: what all steps may cost.")
    target_delta: float | None = _said(None, "Private: at which delta epsilon is counted.")
    noise_multiplier: float | None = _said(None, "Private: deviation of the noise.")
    clip: float | None = _said(None, "Private: length that a row's answers are clipped to.")
    max_skipped_steps: int = _said(10, "So many steps in a row may have a loss that is NaN.")

    def __post_init__(self) -> None:
        self._check_given()
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.check()

    def _check_given(self) -> None:
        defaults = {f.name: f.default for f in fields(TrainingArguments)}
        for name, reason in REFUSED.items():
            value = getattr(self, name)
            # a beta of 0.0 is equal to False, and is something
            nothing = value is None or value is False or (isinstance(value, str | list) and not value)  # fmt: skip
            if value != defaults[name] and not nothing:
                shown = getattr(value, "value", value)
                raise UserError(f"MeZOConfig: {name} is {shown!r}: {reason}")
        for name in NEEDLESS:
            if getattr(self, name):
                logger.warning(
                    f"{name} is for backpropagation: a look keeps no activations, so it has no effect"
                )
            setattr(self, name, None)

    def check(self) -> None:
        """Refuse what has no meaning here, as when it was made: fields can be set later, and `set_optimizer` and kin do.

        Raises:
            UserError: as the class says.
        """
        self._check_given()
        if self.mixed_precision != "no":  # said to `accelerate launch`
            raise UserError(f"mixed precision is {self.mixed_precision!r}: {_SCALER}")
        if self.torch_compile and self.estimator == "activation":
            raise UserError(
                "MeZOConfig: torch_compile with estimator='activation': there parameters intercept operations, which a "
                "compiled model does not call: use estimator='weight' or leave it out"
            )
        if self.max_skipped_steps < 0:
            raise UserError(
                f"MeZOConfig: max_skipped_steps is {self.max_skipped_steps}: it must be at least 0"
            )
        self._check_private()

    def _check_private(self) -> None:
        for name in () if self.private else PRIVATE:
            if getattr(self, name) is not None:
                raise UserError(
                    f"MeZOConfig: {name} is {getattr(self, name)!r}: it is for private=True: say that too, or leave it out"
                )
        if not self.private:
            return
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise UserError(
                "MeZOConfig: private takes either target_epsilon or noise_multiplier: give one of them"
            )
        for name, (value, reason) in VOIDING.items():
            if getattr(self, name) != value:
                shown = getattr(self, name)
                raise UserError(f"MeZOConfig: {name} is {shown!r}, with private: {reason}")

    def mezo(self) -> dict[str, Any]:
        """Arguments of `MeZO`.

        Raises:
            UserError: `modified` or `blocks` is not spelled as it must be.
        """
        clip = f"clip({self.max_grad_norm})+" if self.max_grad_norm > 0.0 else ""
        return {
            "lr": self.learning_rate,
            "eps": self.eps,
            "estimator": self.estimator,
            "rule": clip + self.rule,
            "family": self.family,
            "looks": self.looks,
            "num_samples": self.num_samples,
            "modified": Modified.parse(self.modified) if self.modified else None,
            "blocks": Blocks.parse(self.blocks, self.block_order) if self.blocks else None,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
        }


@dataclass
class MeZOSeq2SeqConfig(MeZOConfig, Seq2SeqTrainingArguments):
    """`MeZOConfig` for `MeZOSeq2SeqTrainer`: with the fields of `transformers.Seq2SeqTrainingArguments`."""
