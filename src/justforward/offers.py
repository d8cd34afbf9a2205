"""What `serve` and `join` take: as `config`, and made into a run's own configuration. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from justforward.config import (
    WORKERS,
    Dtype,
    Looks,
    Quantize,
    Samples,
    Schedule,
    TrainConfig,
    Tuner,
)
from justforward.errors import UserError
from justforward.settings import check_same, resolved
from justforward.tasks import Loss, Truncation

CLIPPED = 10.0


@dataclass(frozen=True)
class ServeConfig:
    """Be the hub of a run that others join: it has no model and no rows, gives out work and puts scalars together.

    Args:
        out: the run folder to make.
        model: as for train; it is named to the workers and loaded by none but them.
        key_file: file with the key that hub and workers share, 16 bytes at least (default the variable JUSTFORWARD_KEY).
        host: address to listen at (0.0.0.0: all of this machine's).
        port: to listen at; 0: any that is free.
        folder: a shared folder instead of a port: messages are files in it.
        own_rows: every worker draws rows of its own, which nobody else sees; else all have the same rows and share each batch.
        workers: begin a step once so many are there (and with --own-rows have answered).
        deadline: seconds after which a worker's rows are given to another, on top of what they usually take (default 2); with --own-rows the most that a step takes (default 30).
        part: rows that are looked at together; the bits of the result depend on it, and never on the number of workers (default a quarter of batch_size, with --deviations an eighth).
        deviations: how many median absolute deviations a row's rise of the loss may be from the others' before it is drawn in; 0: any (default 10 with --own-rows, else 0).
        hash_every: steps between two comparisons of the workers' weights.
        most_workers: refuse more.
        task: as for train.
        template: as for train.
        labels: as for train.
        label_field: as for train.
        loss: as for train.
        truncation: as for train.
        max_length: as for train.
        estimator: as for train.
        rule: as for train.
        family: as for train.
        looks: two-sided or one-sided, as for train.
        lr: as for train.
        eps: as for train.
        num_samples: as for train.
        sample_schedule: as for train.
        weight_decay: as for train.
        lr_schedule: as for train.
        batch_size: rows a step; with --own-rows those of each worker.
        seed: as for train.
        tuner: as for train, but for prefix.
        lora_rank: as for train.
        lora_alpha: as for train.
        lora_targets: as for train.
        prompt_length: as for train.
        tune: as for train.
        layers: as for train.
        dtype: as for train.
        quantize: as for train.
        max_forwards: as for train.
        shots: as for train.
        train_size: as for train, with --task.
        split_seed: as for train, with --task.
        resume: go on with the run in `out`, whose options it has.
        json: print the result as one JSON object, the last line on stdout.
    """

    out: str
    model: str | None = None
    key_file: str | None = None
    host: str = "127.0.0.1"
    port: int = 8765
    folder: str | None = None
    own_rows: bool = False
    workers: int = 1
    deadline: float | None = None
    part: int | None = None
    deviations: float | None = None
    hash_every: int = 100
    most_workers: int = 64
    task: str | None = None
    template: str | None = None
    labels: str | dict[str, str] | None = None
    label_field: str = TrainConfig.label_field
    loss: Loss | None = None
    truncation: Truncation = TrainConfig.truncation
    max_length: int | None = None
    estimator: str = TrainConfig.estimator
    rule: str = TrainConfig.rule
    family: str | None = None
    looks: Looks = TrainConfig.looks
    lr: float | None = None
    eps: float | None = None
    num_samples: int = TrainConfig.num_samples
    sample_schedule: Samples = TrainConfig.sample_schedule
    weight_decay: float = TrainConfig.weight_decay
    lr_schedule: Schedule = TrainConfig.lr_schedule
    batch_size: int = TrainConfig.batch_size
    seed: int = TrainConfig.seed
    tuner: Tuner = TrainConfig.tuner
    lora_rank: int = TrainConfig.lora_rank
    lora_alpha: float = TrainConfig.lora_alpha
    lora_targets: str | None = None
    prompt_length: int = TrainConfig.prompt_length
    tune: str | None = None
    layers: float | None = None
    dtype: Dtype = TrainConfig.dtype
    quantize: Quantize | None = None
    max_forwards: int = TrainConfig.max_forwards
    shots: int | None = None
    train_size: int | None = None
    split_seed: int | None = None
    resume: bool = False
    json: bool = False


@dataclass(frozen=True)
class JoinConfig:
    """Take part in a hub's run: look at rows, send scalars, move the weights by the steps that come back.

    Args:
        url: of the hub: http://HOST:PORT, or https://... of a proxy before it.
        model: the base model, as for train: the one that the run is of, by its fingerprint.
        data: the rows, as for train: all of a file are trained on; with a hub's --task the training rows of its folder.
        key_file: as for serve.
        folder: the shared folder of the hub, instead of its address.
        name: what the hub is to call this worker (default worker); some letters are added that no other has.
        wait: seconds to go on trying where the hub does not answer.
        threads: CPU threads (default torch's choice).
        json: print the result as one JSON object, the last line on stdout.
    """

    model: str
    data: str
    url: str | None = None
    key_file: str | None = None
    folder: str | None = None
    name: str = "worker"
    wait: float = 600.0
    threads: int | None = None
    json: bool = False


_KNOWN = {field.name for field in fields(TrainConfig)}
_STEPS = [field.name for field in fields(ServeConfig) if field.name in _KNOWN]


def run_config(config: ServeConfig, old: TrainConfig | None) -> TrainConfig:
    """The configuration of a hub's run.

    Args:
        config: what is asked for.
        old: that of the run to go on with.

    Raises:
        UserError: an option is out of range, or is one that workers cannot share, or differs from the run's.
    """
    given = {name: getattr(config, name) for name in _STEPS if name not in ("resume", "json")}
    if old is not None:
        defaults = {field.name: field.default for field in fields(ServeConfig)}
        asked = {name: value for name, value in given.items() if value != defaults[name]}
        new = resolved(replace(old, **asked))
        check_same(resolved(old), new, config.out)
        return new
    if config.model is None:
        raise UserError("--model is missing: name the base model that workers are to load")
    if config.tuner == "prefix":
        raise UserError(
            "--tuner is 'prefix': a prefix starts from what the model computes, which workers cannot share: choose lora or prompt"
        )
    if config.looks == "one-point":
        raise UserError("--looks is 'one-point': workers cannot share it: choose one-sided")
    return resolved(
        TrainConfig(data=WORKERS, start="base", keep="last", backoff=False, patience=0, **given)
    )


def worker_config(config: JoinConfig, told: dict[str, Any]) -> TrainConfig:
    """The hub's configuration with this worker's model and rows.

    Raises:
        UserError: the hub's is none that this version knows.
    """
    try:
        own = TrainConfig(**{**told, "out": ""})
    except TypeError as error:
        raise UserError(f"the hub's options are not those of this version: {error}") from None
    return replace(own, model=config.model, data=config.data, threads=config.threads)
