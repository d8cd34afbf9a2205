"""Layers that do not move are run once a text, and not once a sign, a direction, a step and an epoch.

Where only layers from number k on are tuned, what enters layer k is a function of the text alone. Inside
`Trunk.reused()` the model's own forward runs with the layers below k replaced by what they gave before: no
architecture is spelled out here, any model of transformers with one stack of layers will do. Each text is run by
itself, without padding (several short ones at once, each on a thread of its own), so that its outputs do not depend on the batch or the step in which it was first met: a run
that is resumed meets the very same numbers, and so does another run that shares the `store`. Rows that are scored again
and again come in the same batches each time: those are run and kept whole, padding and all, to the bits of the model's own forward.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from justforward.alone import in_turn, workers
from justforward.errors import UserError
from justforward.models import inner_model
from justforward.playback import fingerprint
from justforward.store import Store

# Arguments with which a text's outputs depend on its tokens alone.
KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict"}  # fmt: skip

# Products of a short text with a small layer are too small for several threads: then each thread has a text of its own.
SHORT = 128  # tokens
SMALL = 10_000_000  # weights of a layer


class _Reached(Exception):
    """A text has come through the trunk; what is above need not run."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def stack_of(model: nn.Module) -> nn.ModuleList | None:
    """The layers of a model that has one stack of them."""
    inner = inner_model(model)
    config = getattr(inner, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    found = [m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    within = {id(part) for each in found for part in each.modules() if part is not each}
    outermost = [each for each in found if id(each) not in within]
    return outermost[0] if len(outermost) == 1 else None


def frozen_layers(model: nn.Module) -> int:
    """How many layers, counted from the first, have nothing to tune in them or before them.

    0 also where that cannot be told: more stacks than one, or a tuned parameter that is used by no module.
    """
    return _divided(model, stack_of(model))[0]


def first_above(layers: nn.ModuleList, share: float) -> int:
    """The number of the first of the last layers, this share of all; one at least."""
    return len(layers) - max(1, round(share * len(layers)))


def rest_below(model: nn.Module, share: float) -> None:
    """Freeze all but the last layers, this share of all, and what is behind them; what is frozen already stays so.

    Raises:
        UserError: the model has no single stack of layers, or nothing is left to tune.
    """
    layers = stack_of(model)
    if layers is None:
        raise UserError(
            f"--layers is {share}: {type(inner_model(model)).__name__} has no single stack of layers: say what is tuned "
            "with --tune"
        )
    first = first_above(layers, share)
    above = {id(part) for layer in layers[first:] for part in layer.modules()}
    above |= _behind(model, layers)
    below = [p for m in model.modules() if id(m) not in above for p in m.parameters(recurse=False)]
    for parameter in below:  # also what is used above, too: a head that is tied to the embeddings
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--layers is {share}: nothing is left to tune: give more, or leave it out")


def _divided(model: nn.Module, layers: nn.ModuleList | None) -> tuple[int, set[int]]:
    """How many layers have nothing to tune in or before them; ids of the modules behind the stack."""
    if layers is None:
        return 0, set()
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                owners.setdefault(id(parameter), []).append(module)
    place = {id(part): i for i, layer in enumerate(layers) for part in layer.modules()}
    behind = _behind(model, layers)
    lowest = len(layers)
    for module in (module for several in owners.values() for module in several):
        if id(module) in place:
            lowest = min(lowest, place[id(module)])
        elif id(module) not in behind:
            return 0, behind
    return lowest, behind


def _behind(model: nn.Module, layers: nn.ModuleList) -> set[int]:
    """Ids of the modules outside the stack that are first called when all layers have run."""
    inner = inner_model(model)
    before: set[int] = set()
    after: set[int] = set()
    ran = 0

    def layer_ends(*_: Any) -> None:
        nonlocal ran
        ran += 1

    def called(module: nn.Module, _: Any) -> None:
        (after if ran >= len(layers) else before).add(id(module))

    inside = {id(part) for part in layers.modules()}
    outside = [m for m in inner.modules() if id(m) not in inside]
    handles = [layer.register_forward_hook(layer_ends) for layer in layers]
    handles += [module.register_forward_pre_hook(called) for module in outside]
    try:
        with torch.no_grad():
            inner(input_ids=_sample(inner))
    finally:
        for handle in handles:
            handle.remove()
    return after - before


def _sample(inner: Any) -> Tensor:
    """[1, 4] tokens, whichever."""
    count = inner.get_input_embeddings().weight.shape[0]
    return torch.arange(5, 9, device=inner.device).remainder(count)[None]


def is_small(model: nn.Module) -> bool:
    """Whether passes of a model run best side by side (`alone`): on a CPU, layers of few weights, all of them plain float32."""
    layers = [*(stack_of(model) or ())]
    plain = all(
        p.device.type == "cpu" and p.dtype == torch.float32 and type(p) is nn.Parameter
        for p in model.parameters()
    )
    return bool(layers) and plain and _are_light(layers)


def _are_light(layers: Sequence[nn.Module]) -> bool:
    weights = sum(p.numel() for layer in layers for p in layer.parameters())
    return weights <= SMALL * len(layers)


def _bytes(hidden: Tensor) -> bytes:
    data: bytes = hidden.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return data


class Trunk:
    """The layers of a model below the lowest one with something to tune.

    Args:
        model: a language model, or an adapter around one; what is tuned has `requires_grad`.
        store: makes the file in which outputs are kept, given what they depend on besides the text.

    Attributes:
        depth: how many layers are not run again; 0 where none can be spared.
        layers: how many there are.
        share: of them, what is run again, in [0, 1].
        name: digest of all that outputs depend on besides the text.
        texts: how many were run through the trunk.
    """

    def __init__(self, model: nn.Module, store: Callable[[str], Store]) -> None:
        found = stack_of(model)
        self.depth, behind = _divided(model, found)
        self.texts = 0
        self._model = inner_model(model)
        self._layers: list[Any] = [*(found or ())]
        self.layers = len(self._layers)
        self.share = 1.0 - self.depth / max(1, self.layers)
        self._own = (
            threading.local()
        )  # hidden: of this thread's call; running: it takes a text through the trunk
        self._whole = False
        self._small = _are_light(self._layers) and self._model.device.type == "cpu"
        self._tuple = 0  # values that the last layer of the trunk returns; 0: a bare tensor
        self.name = self._name(behind) if self.depth else ""
        self.store = store(self.name) if self.depth else None

    @contextmanager
    def reused(self, whole: bool = False) -> Iterator[None]:
        """While inside, the model's forward passes spare the trunk where they can; the others run as ever.

        They can where a call has tokens, mask and positions and nothing else, in eval mode: not while writing
        with a cache of keys and values.

        Args:
            whole: batches come again as they are, and are kept so.
        """
        if self.depth == 0:
            yield
            return
        self._whole = whole
        handles = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after, always_call=True),
        ]
        for i in range(self.depth):
            self._layers[i].forward = self._spared(self._layers[i].forward, i == self.depth - 1)
        try:
            with nullcontext() if whole else in_turn():
                yield
        finally:
            for i in range(self.depth):
                del self._layers[i].forward  # the class's own again
            for handle in handles:
                handle.remove()

    # ----------------------------------------------------------------------------------- the model's calls

    @property
    def _running(self) -> bool:
        return getattr(self._own, "running", False)

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._running and self._can(module, args, kwargs):
            self._own.hidden = self._batch(kwargs) if self._whole else self._outputs(kwargs)

    def _after(self, *_: Any) -> None:
        if not self._running:
            self._own.hidden = None

    def _spared(self, forward: Callable[..., Any], last: bool) -> Callable[..., Any]:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden = getattr(self._own, "hidden", None)
            if hidden is not None and not self._running:
                return self._packed(hidden if last else hidden_states)
            output = forward(hidden_states, *args, **kwargs)
            if last and self._running:
                self._tuple = len(output) if isinstance(output, tuple) else 0
                raise _Reached(output[0] if self._tuple else output)
            return output

        return run

    def _packed(self, hidden: Tensor) -> Any:
        return (hidden, *[None] * (self._tuple - 1)) if self._tuple else hidden

    def _can(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = {name for name, value in kwargs.items() if value is not None}
        if (
            args
            or module.training
            or not {"input_ids"} <= given <= KNOWN
            or kwargs.get("use_cache")
        ):
            return False
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is None or mask.shape != kwargs["input_ids"].shape:
            return False
        return positions is None or bool(((mask.cumsum(1) - 1 == positions) | (mask == 0)).all())

    # ----------------------------------------------------------------------------------- batches, texts

    def _batch(self, kwargs: dict[str, Any]) -> Tensor:
        """[N, L, n]: what enters layer k, of a batch as it is."""
        assert self.store is not None
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        # how many threads compute may change the last bits
        key = f"batch {tuple(ids.shape)} {torch.get_num_threads()} ".encode()
        key += ids.cpu().numpy().tobytes() + mask.bool().cpu().numpy().tobytes()
        data = self.store.get(key) if self._known_shape() else None
        if data is not None:
            kept = torch.frombuffer(data, dtype=self._model.dtype)
            return kept.view(*ids.shape, -1).to(ids.device)
        given = {**kwargs, "use_cache": False} if "use_cache" in kwargs else kwargs
        out = self._through(given)
        self.store.put(key, _bytes(out))
        self.texts += len(ids)
        return out

    def _outputs(self, kwargs: dict[str, Any]) -> Tensor:
        """[N, L, n]: what enters layer k, zero where the mask is."""
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"].bool()
        rows = ids.cpu().numpy()
        shown = mask.cpu().numpy()
        known: dict[bytes, Tensor] = {}
        out: Tensor | None = None
        texts = {tokens.tobytes(): tokens for tokens in map(np.extract, shown, rows)}
        for key, tokens in texts.items():
            one = self._kept(key, len(tokens), ids.device)
            if one is not None:
                known[key] = one
        self._run_all(
            {key: tokens for key, tokens in texts.items() if key not in known}, known, kwargs
        )
        for row in range(len(rows)):
            one = known[rows[row, shown[row]].tobytes()]
            if out is None:
                out = one.new_zeros(*ids.shape, one.shape[-1])
            out[row, mask[row]] = one
        assert out is not None
        return out

    def _kept(self, key: bytes, length: int, device: torch.device) -> Tensor | None:
        """[length, n] of one text, if it was run before."""
        assert self.store is not None
        data = self.store.get(key)
        if data is None or not self._known_shape():
            return None
        return torch.frombuffer(data, dtype=self._model.dtype).view(length, -1).to(device)

    def _known_shape(self) -> bool:
        """What the layer returns is seen when it runs: the first text of a session is always run."""
        return self.texts > 0

    def _run_all(
        self, texts: dict[bytes, np.ndarray], known: dict[bytes, Tensor], kwargs: dict[str, Any]
    ) -> None:
        """Run texts and keep what they give. Which way a text is run follows from it and the model alone, and so its bits."""
        assert self.store is not None
        device = kwargs["input_ids"].device
        ids = {key: torch.from_numpy(tokens)[None].to(device) for key, tokens in texts.items()}
        short = [key for key in ids if self._small and ids[key].shape[1] <= SHORT]
        if short:
            given = workers().map(lambda key: self._run(ids[key], kwargs), short)
            known.update(zip(short, given, strict=True))
        for key in ids:
            if key not in known:
                known[key] = self._run(ids[key], kwargs)
            self.store.put(key, _bytes(known[key]))
        self.texts += len(ids)

    def _run(self, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kwargs.get("position_ids") is not None:
            arguments["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
        if "use_cache" in kwargs:
            arguments["use_cache"] = False
        return self._through(arguments)[0]

    def _through(self, arguments: dict[str, Any]) -> Tensor:
        """[N, L, n]: what enters layer k, of a call of the model."""
        self._own.running = True
        try:
            with torch.no_grad():
                self._model(**arguments)
        except _Reached as reached:
            return reached.hidden
        finally:
            self._own.running = False
        raise AssertionError("a forward pass went round the layers")

    def _name(self, behind: set[int]) -> str:
        """Digest of all that outputs depend on besides the text, down to the last bit."""
        above = {id(part) for layer in self._layers[self.depth :] for part in layer.modules()}
        digest = hashlib.sha256()
        config = self._model.config.to_dict()
        for name in ("_name_or_path", "name_or_path"):
            config.pop(name, None)
        alone = SHORT if self._small else 0  # texts up to here have one thread each
        said = [
            torch.__version__,
            torch.get_num_threads(),
            alone,
            str(self._model.device),
            self.depth,
        ]
        digest.update(json.dumps([*said, config], sort_keys=True, default=str).encode())
        for name, module in self._model.named_modules():
            own = [*module._parameters.values(), *module._buffers.values()]
            kept = [tensor for tensor in own if tensor is not None]
            if id(module) not in above | behind and kept and not any(t.requires_grad for t in kept):
                digest.update(f"{name}\0{fingerprint(module)}\0".encode())
        return digest.hexdigest()
