"""`MeZOTrainer`: transformers' `Trainer` with `MeZO` in place of backpropagation. Its loop is theirs.

The loop calls `training_step` for each micro-batch of a step. All but the last are kept; with the last the step is taken:
one estimate over all of them, and the weights move. What the loop does next (clip the gradients, `optimizer.step()`,
zero the gradients) then has nothing left to do.

Several processes take a step together (`Workers`): a row of it is a micro-batch, in activation space a row of one.

Every step goes to `trajectory.jfl` in the output folder. A checkpoint has a copy of it, so what is resumed is a position in
a log: base + log = the trained weights, bit for bit, however often training was stopped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Seq2SeqTrainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, sort_checkpoints
from transformers.utils import logging

from justforward.beside import is_whole, load_beside, save_beside
from justforward.card import correct
from justforward.drawn import DrawnTrainer, noise_of
from justforward.errors import NonFiniteLoss, UserError
from justforward.loop import (
    LOG,
    LoopMeZO,
    SavesAtStepEnd,
    check_settings,
    put_log,
    set_aside,
    what_lacks,
)
from justforward.rowwise import MicroBatches
from justforward.stored import as_stored, is_half
from justforward.training_arguments import MeZOConfig, MeZOSeq2SeqConfig
from justforward.trajectory import read_log
from justforward.variants import check_shared, forwards_of
from justforward.workers import Workers

__all__ = ["MeZOConfig", "MeZOSeq2SeqConfig", "MeZOSeq2SeqTrainer", "MeZOTrainer"]

logger = logging.get_logger(__name__)


def check_workers(args: MeZOConfig) -> None:
    """Refuse processes that would each go its own way, and what several cannot do together.

    Raises:
        UserError: there are more processes than transformers knows of, or torch.distributed; or several GPUs in this one; or
            several processes, and looks of which they cannot do a part each, or unlike numbers of micro-batches.
    """
    grouped = dist.is_available() and dist.is_initialized()
    counts = [args.world_size, dist.get_world_size() if grouped else 1]
    said = os.environ.get("WORLD_SIZE", "")
    if said.isdecimal():
        counts.append(int(said))
    if min(counts) != max(counts):
        # Without a GPU transformers asks for the others with use_cpu only.
        raise UserError(
            f"MeZOTrainer: {max(counts)} processes were started, and transformers ({counts[0]}) or torch.distributed ({counts[1]}) "
            "sees fewer, so that each would train by itself: start the script with torchrun, on CPUs say use_cpu=True; or "
            "start it with python"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"MeZOTrainer uses one GPU a process, this one sees {args.n_gpu}: set CUDA_VISIBLE_DEVICES=0, or start one process a "
            "GPU with torchrun"
        )
    if args.world_size > 1:
        check_shared(args.looks, args.mezo()["modified"], None)
        even = getattr(args.accelerator_config, "even_batches", True)
        if not even and not args.dataloader_drop_last:
            raise UserError(
                "MeZOConfig: accelerator_config has even_batches=False, so that one process has a last micro-batch that others "
                "have not: leave it out, or say dataloader_drop_last=True"
            )


class MeZOTrainer(DrawnTrainer):
    """`transformers.Trainer` that tunes with forward passes: its arguments, callbacks, evaluation, checkpoints and logs.

    `args` is a `MeZOConfig`. The optimizer is a `MeZO` of the whole model, made from it; only parameters that require
    gradients are tuned, so a peft model's adapter is. With accumulation the loss of a step is that of all its micro-batches,
    weighted as Trainer weights them, seen along the same direction.

    In the logs `grad_norm` is the root mean square of the step's projected gradients, before any clipping: its square is an
    estimate of the gradient's squared norm, right on average. A step whose loss is NaN or infinite is not taken, as with
    Trainer's own loss scaling: the weights and the learning rate stay, the loss is shown as it is, `skipped_steps` counts.

    Processes of torchrun take each step together: every one looks with the micro-batches that Trainer gives it, they send each other
    scalars, and each moves its own copy of the weights, which is not wrapped. The process that saves writes the log. They wait
    `ddp_timeout` seconds for each other.

    With `private` the rows of a step are drawn in secret and looked at one by one, their losses are nowhere, and `epsilon` is in the logs;
    training ends before it is more than was planned. What of it may be shown to others is in docs/privacy.md.

    The model is in train mode, as with Trainer, and `compute_loss` sees it so (trl files its metrics by that), but it computes in
    eval mode, without dropout, while it looks.

    The weights move in `training_step`, so `on_pre_optimizer_step` comes after that. `optimizer.step()` changes nothing. Between
    them and `on_step_end` the step is not counted yet, so a checkpoint that a callback saves there itself is refused.

    Raises:
        UserError: an argument has no meaning here; the reason is said before anything moves.
    """

    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, MeZOConfig):
            raise UserError(
                f"args is a {type(self.args).__name__}: MeZOTrainer takes a justforward.MeZOConfig, which has the same fields and MeZO's"
            )
        self.args.check()
        check_workers(self.args)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # said to `accelerate launch`
            raise UserError(
                "DeepSpeed and FSDP shard gradients and optimizer states, of which there are none: start the script with python"
            )
        given = (self.optimizer, self.lr_scheduler, self.optimizer_cls_and_kwargs)
        if any(thing is not None for thing in given):
            raise UserError(
                "optimizers: MeZOTrainer makes its own MeZO from args, and a scheduler for it (lr_scheduler_type, or override "
                "create_scheduler): leave it out"
            )
        self.args.mezo()  # what cannot be read is refused now
        self.check_private()
        self._workers: Workers | None = None
        self._micro: list[tuple[Any, Any]] = []
        self._skipped_in_a_row = 0
        self._skipped_since_logged = 0
        self._moved_at = -1  # how many steps Trainer had counted when the last one was taken
        for callback in self.callback_handler.callbacks:
            if type(callback) is JITCheckpointCallback:
                callback.__class__ = SavesAtStepEnd

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's, whose models stay as they are in several processes, too."""
        super().create_accelerator_and_postprocess()
        if self.args.world_size > 1:
            # Not for training: DistributedDataParallel would send weights and buffers round, for gradients that are not there.
            plain = partial(self.accelerator.prepare_model, evaluation_mode=True)
            self.accelerator.prepare_model = plain

    # -- the loop's hooks ---------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A `MeZO` of the model, whose log has no name yet; the one there is, if there is one."""
        if self.optimizer is None:
            whole = self.model if model is None else model
            if self.args.torch_compile and any(
                is_half(p) for p in whole.parameters() if p.requires_grad
            ):
                raise UserError(
                    "torch_compile with weights of 16 bits: there parameters intercept operations, which a compiled model "
                    "does not call: load the model in float32, or leave torch_compile out"
                )
            writes, mezo = bool(self.args.should_save), self.args.mezo()
            if self.args.private:
                mezo["private"] = self._private()
            self.optimizer = LoopMeZO(whole, self._log_folder, writes=writes, **mezo)
        if not isinstance(self.optimizer, LoopMeZO):
            raise UserError(
                f"the optimizer is a {type(self.optimizer).__name__}: MeZOTrainer makes its own MeZO from args"
            )
        return self.optimizer

    @property
    def _log_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Trainer's: the micro-batches of a step. Those of one that the data were too few for are dropped."""
        self._micro.clear()
        found: tuple[list[Any], Any] = super().get_batch_samples(*args, **kwargs)
        return found

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Keep a micro-batch; with a step's last one take the step.

        Returns:
            Mean loss of all looks of the step, with its last micro-batch; 0 with the others.

        Raises:
            NonFiniteLoss: of too many steps in a row.
            UserError: another process is gone or differs, as `Workers.step` says.
        """
        if not self.model.training:
            self.model.train()
        self._micro.append((self._prepare_inputs(inputs), num_items_in_batch))
        loss = 0.0
        if self.accelerator.sync_gradients:
            micro, self._micro = self._micro, []
            loss = self._take_step(model, micro)
            self._moved_at = self.state.global_step
            every = self.args.torch_empty_cache_steps
            if every is not None and self.state.global_step % every == 0:
                clear_device_cache()
        return torch.tensor(loss, device=self.args.device)

    def _take_step(self, model: nn.Module, micro: MicroBatches) -> float:
        optimizer: LoopMeZO = self.optimizer
        by_row = self.args.estimator == "activation"
        optimizer.check_free()
        if self.args.private:
            self._private_step(model)
            return math.nan
        try:
            if by_row:
                self._rows_checked = self._rows_checked or self._check_rows(model, micro)
            if self._workers is not None:
                losses, rows = (self._row_losses if by_row else self._micro_losses)(model, micro)
                whole = len(rows) * self._workers.size
                loss = self._workers.step(lambda: losses(rows), of=whole)
            elif by_row:
                loss = optimizer.step(*self._row_losses(model, micro))
            else:
                loss = optimizer.step(
                    lambda: sum(self._part_of_loss(model, *part) for part in micro)
                )
        except NonFiniteLoss as error:
            optimizer.step_was_skipped = True
            self._skipped_since_logged += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row > self.args.max_skipped_steps:
                raise
            return error.loss
        optimizer.step_was_skipped = False
        self._skipped_in_a_row = 0
        return loss

    def _micro_losses(
        self, model: nn.Module, micro: MicroBatches
    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """A function of the micro-batches' numbers: losses whose mean, over all processes, is the loss of the step; and these.

        Trainer takes the mean of the processes' losses, each the sum of its micro-batches' parts; all have as many of them.
        """

        def losses(numbers: Tensor) -> Tensor:
            parts = [self._part_of_loss(model, *part, times=len(numbers)) for part in micro]
            return torch.tensor(parts, dtype=torch.float64)

        return losses, torch.arange(len(micro))

    def _clip_grad_norm(self, model: nn.Module) -> float:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Root mean square of the projected gradients of the step; NaN if it was not taken."""
        last = self.optimizer.last
        if last is None or self.optimizer.step_was_skipped:
            return math.nan
        return math.hypot(*last.projected_grads) / math.sqrt(len(last.projected_grads))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the steps that were skipped since the last time."""
        self._told(logs)
        if "loss" in logs and self._skipped_since_logged:
            logs["skipped_steps"] = self._skipped_since_logged
            self._skipped_since_logged = 0
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            tr_loss.zero_()  # Trainer subtracts it from itself, which leaves a NaN there for good

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Those of the looks: Trainer's count is that of three forwards."""
        if self.args.private:
            return 0  # it would tell how long the rows of a step were
        looks = forwards_of(self.args.looks, self.args.num_samples)
        return int(super().floating_point_ops(inputs)) * looks // 3

    # -- checkpoints and the log ------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Trainer's; with `resume_from_checkpoint=True` from the newest checkpoint that is whole, to the same bits.

        Raises:
            UserError: the checkpoint is not one of MeZOTrainer's, or of other settings; or an argument that has been set since
                has no meaning here.
        """
        self.args.check()
        self.check_private(trial)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_checkpoint()
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            lacks = what_lacks(Path(resume_from_checkpoint))
            if lacks:
                raise UserError(
                    f"{resume_from_checkpoint}: cannot be resumed: {lacks}: take another checkpoint"
                )
            check_settings(Path(resume_from_checkpoint) / LOG, self.args.mezo())
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._micro.clear()
            self._workers = None
            if isinstance(self.optimizer, LoopMeZO):
                self.optimizer.close_log()

    def _newest_checkpoint(self) -> str | bool:
        """The newest whole one; True if there is none, of which Trainer says so."""
        for folder in reversed(sort_checkpoints(str(self._log_folder), PREFIX_CHECKPOINT_DIR)):
            lacks = what_lacks(Path(folder))
            if not lacks:
                return str(folder)
            logger.warning(f"{folder} is left out: {lacks}")
        return True

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        self._moved_at = -1
        old = self.optimizer
        if (
            resume_from_checkpoint is None
            and isinstance(old, LoopMeZO)
            and not old.was_left_alone()
        ):
            changed = "the tuned weights were changed since train() ended"
            if self.args.private:
                raise UserError(
                    f"private: {changed}, and a new log would not know what the answers in {old.path} have cost: make a trainer "
                    "with another output_dir, and add its epsilon to that of this one"
                )
            logger.warning(f"{changed}: a new log begins with them")
            self.optimizer = None  # its grid and its log are of the others
        saved = None if resume_from_checkpoint is None else Path(resume_from_checkpoint) / LOG
        self._noise = noise_of(saved) if self.args.private and saved else None
        self._planned = max_steps
        self.create_optimizer()
        with as_stored(self.model):  # accelerate puts the weights where they are to be
            prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]
                max_steps, train_dataloader, resume_from_checkpoint
            )
        path = self._log_folder / LOG
        if resume_from_checkpoint is None:
            self.optimizer.open_log(path)
        else:
            self.optimizer.take_log(path, Path(resume_from_checkpoint) / LOG)
        if self.args.world_size > 1:
            self._workers = Workers(
                self.optimizer, timeout=float(self.args.ddp_timeout), data=self._said_of_data()
            )
        if self.args.private:
            self._plan(max_steps - self.state.global_step)
        return prepared

    def _said_of_data(self) -> str:
        """What processes must agree in, in words."""
        rows = len(self.train_dataset) if has_length(self.train_dataset) else "unknown"
        args = self.args
        return f"{rows} rows, {args.train_batch_size} x {args.gradient_accumulation_steps} a step"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's.

        Raises:
            UserError: the last step has been taken and is not counted.
        """
        step = self.state.global_step
        if step == self._moved_at:
            raise UserError(
                f"a checkpoint of step {step} was asked for when step {step + 1} had moved the weights, and would be resumed with "
                "that step once more: save in on_step_end, or set control.should_save there"
            )
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; a checkpoint gets a copy of the log."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.optimizer.writes:
            self.optimizer.copy_log(Path(output_dir) / LOG)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with as_stored(self.model):
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                save_beside(self.model, Path(output_dir or str(self.args.output_dir)))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, which says how the model was tuned."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            correct(self._log_folder / "README.md", self.args)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder, model = Path(resume_from_checkpoint), self.model if model is None else model
        with as_stored(self.model):
            if not is_whole(model, folder):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_beside(model, folder)

    def _load_best_model(self) -> None:
        """Trainer's; the log becomes that of the best step, and the whole one is kept beside it."""
        best, optimizer = str(self.state.best_model_checkpoint), self.optimizer
        with as_stored(self.model):
            if not is_whole(self.model, Path(best)):
                super()._load_best_model()
            load_beside(self.model, Path(best))
        log = read_log(Path(best) / LOG)
        if len(log.steps) == optimizer.steps:
            return
        self._load_optimizer_and_scheduler(best)
        optimizer.let_go()
        if optimizer.writes:
            set_aside(optimizer.path)
        if len(log.steps) == optimizer.steps:
            optimizer.take_log(optimizer.path, log.path)
            return
        if optimizer.writes:  # save_only_model: there was no state
            put_log(log, optimizer.path)
        self.optimizer = None


class MeZOSeq2SeqTrainer(MeZOTrainer, Seq2SeqTrainer):
    """`MeZOTrainer` that evaluates by generating: `transformers.Seq2SeqTrainer`. `args` is a `MeZOSeq2SeqConfig`.

    A trainer of your own becomes one of these in the same way: class Mine(justforward.MeZOTrainer, TheirTrainer).
    """
