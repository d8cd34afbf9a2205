"""Which kernels move a tensor that is not on the CPU: Triton's on an NVIDIA GPU, plain torch's on all else."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from justforward.noise import plain, spec

_LEAST = (7, 0)  # Volta: the oldest that Triton compiles for
_LEAST_TRITON = (3, 6)  # those before flush subnormal numbers in roots and quotients


def kernels(device: torch.device) -> ModuleType:
    """The module with the kernels for a device: `gpu` where Triton works, else `plain`; the bits are equal.

    A GPU that gets `plain` is warned about (UserWarning), once for each reason.
    """
    if device.type != "cuda":
        return plain
    reason = why_not(device)
    if reason is not None:
        _warn(reason)
        return plain
    from justforward.noise import gpu

    return gpu


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why Triton's kernels cannot be used on a GPU, or None: then they have been tried on it."""
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return f"{name} is not an NVIDIA GPU, the only kind that the Triton kernels are written for"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST:
        has, needs = (".".join(map(str, version)) for version in (capability, _LEAST))
        return f"{name} has compute capability {has}, and the Triton kernels need {needs}"
    version = triton_version()
    if version is None:
        return "Triton is not installed (pip install triton, in the version that torch names)"
    if tuple(map(int, version.split(".")[:2])) < _LEAST_TRITON:
        needs = ".".join(map(str, _LEAST_TRITON))
        return (
            f"Triton is {version}, and the kernels need {needs} or newer (a newer torch brings it)"
        )
    try:
        same = agree(device)
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # no C compiler, no driver for this GPU, an old Triton: whatever it is
        text = (str(error).splitlines() or [""])[0]
        return f"Triton does not work on {name} ({type(error).__name__}: {text})"
    return None if same else f"Triton's kernels give other bits on {name}: please report it"


def triton_version() -> str | None:
    """Which Triton there is, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def agree(device: torch.device) -> bool:
    """Whether steps by `gpu` on a device leave the bits that `plain` on the CPU does.

    Of weights in float32 and in 16 bits, subnormal ones among them: two steps with decay, one of a rule with moments whose
    squares are subnormal numbers, and the widening of some of the weights.
    """
    from justforward.noise import gpu

    cpu = torch.device("cpu")
    return all(
        all(map(torch.equal, _trial(gpu, dtype, device), _trial(plain, dtype, cpu)))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def _trial(module: ModuleType, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What is left of some weights, by their bits, and of their grid."""
    theta = torch.linspace(-1.0, 1.0, spec.TILE + 9)
    theta[:99] *= 2.0**-20
    theta = theta.to(device, dtype)
    exponents = torch.zeros(2, dtype=torch.int8, device=device)
    if dtype == torch.float32:
        module.lay_grid(theta, exponents, -29)
    seeds, cs = np.array([1, 2**64 - 1, 3], np.uint64), np.array([1e-3, 3e-6, 4.0], np.float32)
    steps, ends = np.array([4, 5], np.uint64), np.array([1, 3], np.int64)
    decays = np.array([1e-2, 0.0], np.float32)
    back = np.float32(1e-3 if dtype == torch.float32 else 0.0)
    module.update(theta, exponents, 0, 2, 6, steps, ends, seeds, cs, decays, back)
    rates, shares = np.array([1e-2], np.float32), np.ones((1, 2), np.float32)
    module.adapt(
        theta, exponents, 0, 2, theta, theta, steps[:1], ends[:1], rates, decays[1:], shares,
        0.9, 0.9, 1e-30, 1, 6, seeds[:1], cs[:1] * np.float32(1e-17), np.float32(0.0),
    )  # fmt: skip
    wide = torch.zeros(0, device=device)
    if dtype != torch.float32:
        wide = torch.empty(spec.TILE, device=device)
        module.widen(theta, wide, 5, 5 + spec.TILE, 6, seeds, cs)
    return [x.cpu().view(torch.int8) for x in (theta, exponents, wide)]


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        "noise on the GPU is made by plain torch operations, the same bits at a small part of the speed: "
        f"{reason}",
        stacklevel=3,
    )
