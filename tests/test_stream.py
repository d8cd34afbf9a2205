"""Who writes to the residual stream, what is behind it, and writing to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import ARCHITECTURES, MASKED, make_model
from justforward.models import inner_model
from justforward.stream import find_norm, find_stream, matrix_of, write, writing_too

IDS = torch.tensor([[5, 7, 300, 8, 12, 9]])
WRITERS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
}
READERS = {"gpt2": 2, "opt": 4, "llama": 5}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_writers_and_readers_are_found_by_running_the_model(architecture: str) -> None:
    model = make_model(architecture)
    whole = find_stream(model, IDS, 1.0)
    assert whole is not None
    assert [len(maps) for maps, _ in whole.readers] == [READERS[architecture]] * 2
    ends = [next(e for e in WRITERS[architecture] if n.endswith(e)) for n in whole.writers]
    assert sorted(ends) == sorted(WRITERS[architecture] * 2)
    assert all(model.get_submodule(name) is module for name, module in whole.writers.items())
    upper = find_stream(model, IDS, 0.5)
    assert upper is not None
    assert list(upper.writers) == list(whole.writers)[2:]
    assert upper.layers == whole.layers[1:]


@pytest.mark.parametrize("architecture", sorted(MASKED))
def test_layers_that_normalise_what_they_write_have_none(architecture: str) -> None:
    assert find_stream(make_model(architecture), IDS, 1.0) is None


def test_the_scale_before_readers_is_that_of_the_norms() -> None:
    model: Any = make_model("llama")
    layer = model.model.layers[1]
    layer.input_layernorm.weight.data.fill_(3.0)
    layer.post_attention_layernorm.weight.data.fill_(4.0)
    stream = find_stream(model, IDS, 0.5)
    assert stream is not None
    torch.testing.assert_close(stream.readers[0][1], torch.full((16,), 12.5**0.5))


# ----------------------------------------------------------------------------------- behind the stack


@pytest.mark.parametrize("norm", [nn.LayerNorm(12), nn.RMSNorm(12)])
@given(seed=st.integers(0, 1000), count=st.integers(3, 9))
def test_the_norm_behind_the_stack_is_read_off(norm: Any, seed: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    norm.weight.data = 0.2 + torch.rand(12, generator=draw)
    if norm.__class__ is nn.LayerNorm:
        norm.bias.data = torch.randn(12, generator=draw)
    x = torch.randn(count, 12, generator=draw) * 30.0 + 5.0
    with torch.no_grad():
        found = find_norm(x, norm(x))
    assert found is not None
    if count > 3:  # of three places LayerNorm's mean may be anything
        assert found.centred == (norm.__class__ is nn.LayerNorm)
        torch.testing.assert_close(found.scale, norm.weight.detach(), rtol=1e-2, atol=1e-3)


def test_another_function_is_no_norm() -> None:
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    assert find_norm(x, x.tanh()) is None
    assert find_norm(x, x[:, :6]) is None
    assert find_norm(x[:2], x[:2]) is None


# ----------------------------------------------------------------------------------------- new writers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_writing_is_what_hooks_do(architecture: str) -> None:
    model = make_model(architecture)
    stream = find_stream(model, IDS, 0.5)
    assert stream is not None
    draw = torch.Generator().manual_seed(1)
    to = 0.1 * torch.randn(16, 2, generator=draw)
    what = {
        name: torch.randn(2, matrix_of(module).shape[1], generator=draw)
        for name, module in stream.writers.items()
    }

    def logits() -> Tensor:
        with torch.no_grad():
            found: Tensor = inner_model(model)(input_ids=IDS).logits
        return found

    before = logits()
    with writing_too(stream.writers, to, what):
        hooked = logits()
    torch.testing.assert_close(logits(), before, rtol=0, atol=0)
    for name, module in stream.writers.items():
        write(module, to, what[name])
    torch.testing.assert_close(logits(), hooked, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(hooked, before, atol=1e-2)


def test_what_is_written_is_the_same_on_any_machine() -> None:
    """Products and sums rounded one by one: numpy's, element by element, have the same bits."""
    draw = torch.Generator().manual_seed(2)
    linear = nn.Linear(5, 7, bias=False)
    to, what = torch.randn(7, 3, generator=draw), torch.randn(3, 5, generator=draw)
    wanted = linear.weight.detach().numpy().copy()
    for j in range(3):
        for i in range(7):
            for k in range(5):
                product = np.float32(to[i, j].item()) * np.float32(what[j, k].item())
                wanted[i, k] = np.float32(wanted[i, k] + product)
    write(linear, to, what)
    assert (linear.weight.detach().numpy() == wanted).all()
