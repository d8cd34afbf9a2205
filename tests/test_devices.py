"""Which kernels a device gets, and that a GPU which gets the slow ones is said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from justforward.noise import devices, plain


@pytest.fixture
def pascal(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU that is too old, and nothing known or said of it yet."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla P4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    caches = (devices.why_not, devices._warn)
    for cached in caches:
        cached.cache_clear()
    yield torch.device("cuda", 0)
    for cached in caches:
        cached.cache_clear()


def test_devices_that_are_no_gpu_take_plain_torch_without_a_word() -> None:
    for name in ("cpu", "mps", "meta", "xpu"):
        assert devices.kernels(torch.device(name)) is plain


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "Tesla P4 has compute capability 6.1, and the Triton kernels need 7.0"),
        ({"hip": "6.3"}, "Tesla P4 is not an NVIDIA GPU"),
        ({"capability": (8, 0), "version": None}, "Triton is not installed"),
        ({"capability": (8, 0), "version": "3.5.1"}, "Triton is 3.5.1, and the kernels need 3.6 or newer"),
        ({"capability": (8, 0), "agree": RuntimeError("no C compiler\nat all")}, r"does not work on Tesla P4 \(RuntimeError: no C compiler\)"),
        ({"capability": (8, 0), "agree": False}, "other bits on Tesla P4"),
    ],
)  # fmt: skip
def test_a_gpu_without_the_kernels_is_said_once(
    pascal: torch.device, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    def agree(_: torch.device) -> bool:
        outcome = change["agree"]
        if isinstance(outcome, Exception):
            raise outcome
        return bool(outcome)

    monkeypatch.setattr(torch.version, "hip", change.get("hip"))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda _: change.get("capability", (6, 1))
    )
    monkeypatch.setattr(devices, "triton_version", lambda: change.get("version", "3.10.0+git1"))
    monkeypatch.setattr(devices, "agree", agree)
    with pytest.warns(UserWarning, match=f"made by plain torch operations.*{said}"):
        assert devices.kernels(pascal) is plain
    # Said once: a second warning would be an error here.
    assert devices.kernels(pascal) is plain
    assert devices.kernels(torch.device("cuda", 1)) is plain


def test_a_full_gpu_is_no_reason(pascal: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def agree(_: torch.device) -> bool:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(devices, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(devices, "agree", agree)
    with pytest.raises(torch.OutOfMemoryError):
        devices.kernels(pascal)


def test_kernels_are_tried_on_a_gpu_before_it_gets_them(
    pascal: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: make test-triton")
    from justforward.noise import gpu

    here = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    right, update = devices.agree, gpu.update
    monkeypatch.setattr(devices, "agree", lambda _: right(here))
    assert devices.kernels(pascal) is gpu

    def off_by_little(theta: Tensor, *rest: Any) -> None:
        update(theta, *rest)
        theta[1030] += 2.0**-23

    devices.why_not.cache_clear()
    monkeypatch.setattr(gpu, "update", off_by_little)
    with pytest.warns(UserWarning, match="give other bits"):
        assert devices.kernels(pascal) is plain
