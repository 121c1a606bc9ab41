"""Ports read and write as their kind promises; a write reaches what the model goes on with, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_lens.model_bridge.access.ports import BranchPort, FlatTokensPort, Port, SharedPort
from transformer_lens.model_bridge.access.views import Heads, Whole, query_heads

sizes = st.integers(1, 4)
quickly = settings(deadline=None, max_examples=30, derandomize=True)


def no_modules(role: str) -> nn.Module:
    raise AssertionError(f"this port needs no module, and asked for {role!r}")


def test_a_plain_port_hands_over_the_very_tensor() -> None:
    x, value = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    port = Port()
    assert port.read(x, Whole(), None) is x
    assert port.write(x, value, Whole(), None, no_modules) is value
    assert port.recalls is None and port.remember(x) is None
    assert (port.at, port.side, port.item, port.arg) == ("", "out", 0, None)


def test_an_aliased_port_hands_over_a_copy() -> None:
    x = torch.randn(2, 3, 4)
    read = Port(aliased=True).read(x, Whole(), None)
    assert torch.equal(read, x) and read.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@quickly
@given(sizes, sizes)
def test_a_port_reads_and_writes_through_its_view(heads: int, d: int) -> None:
    cfg: Any = SimpleNamespace(n_heads=heads, n_key_value_heads=1, d_head=d)
    port, x = Port(view=query_heads), torch.randn(2, 3, heads * d)
    view = port.view(cfg)
    assert view == Heads(heads, -1)
    value = torch.randn(2, 3, heads, d)
    assert torch.equal(port.read(port.write(x, value, view, None, no_modules), view, None), value)


def test_a_shared_port_reads_a_copy_and_writes_into_the_tensor_itself() -> None:
    """The block goes on using the tensor it handed over, so that very tensor has to change."""
    x, value = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    port = SharedPort()
    read, before = port.read(x, Whole(), None), x.clone()
    written = port.write(x, value, Whole(), None, no_modules)
    assert written is x and torch.equal(x, value)
    assert torch.equal(read, before)


def test_a_branch_port_reads_the_stream_and_writes_its_norm() -> None:
    """What stands before the norm is read; what is written goes through the norm, and no hook of it fires."""
    norm, stream, value = nn.LayerNorm(4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    called: list[str] = []
    norm.register_forward_hook(lambda *_: called.append("norm"))
    port = BranchPort("mlp", "in", stream="", norm="ln1")
    assert port.recalls == "" and port.remember(stream) is stream
    assert port.read(norm.forward(stream), Whole(), stream) is stream
    written = port.write(norm.forward(stream), value, Whole(), stream, {"ln1": norm}.__getitem__)
    assert torch.equal(written, norm.forward(value)) and called == []


@quickly
@given(sizes, sizes, sizes)
def test_a_flat_tokens_port_sees_batch_and_position_again(batch: int, pos: int, last: int) -> None:
    port, x = FlatTokensPort("gate", "out", item=1, rows_of=""), torch.randn(batch * pos, last)
    known = port.remember(torch.zeros(batch, pos, 8))
    assert port.recalls == ""
    read = port.read(x, Whole(), known)
    assert read.shape == (batch, pos, last) and torch.equal(read.flatten(0, 1), x)
    assert torch.equal(port.write(x, read * 2, Whole(), known, no_modules), x * 2)


@pytest.mark.parametrize("port", [Port(), SharedPort(), BranchPort(), FlatTokensPort()])
def test_ports_are_data(port: Port) -> None:
    """Equal by value and fixed once made, so that rows can be shared between models."""
    assert port == type(port)() and hash(port) == hash(type(port)())
    with pytest.raises(AttributeError):
        port.at = "elsewhere"  # type: ignore[misc]
