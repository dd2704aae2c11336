"""Offload: the same bits, the right bytes, and nothing left behind on the device or the host."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lance.model.heads import HeadOutputs
from megatron_lance.model.lance_model import LanceModel
from megatron_lance.model.offload import ForwardPass, Offload, _Layer, _View
from megatron_lance.parallel.dispatch import RankBatch
from tests.unit.tiny_model import (
    TINY,
    Result,
    batch_of,
    build,
    forward_backward,
    mixed_pack,
    one_rank,
    values_of,
    with_model,
)

CPU = torch.device("cpu")
DEEP = with_model(num_layers=4)
ALL = ("core_attn", "layernorm", "mlp")


@pytest.fixture(autouse=True, scope="module")
def _groups() -> Iterator[None]:
    with one_rank():
        yield


def batches(count: int) -> list[RankBatch]:
    pack = mixed_pack()
    return [batch_of(pack, values_of(pack, seed))[1] for seed in range(count)]


def same(a: Result, b: Result) -> None:
    assert torch.equal(a.loss, b.loss)
    for name, gradient in a.gradients.items():
        other = b.gradients[name]
        assert gradient is not None and other is not None and torch.equal(gradient, other), name


# ---- the model


@pytest.mark.parametrize("modules", [(), ("core_attn",), ("layernorm",), ("mlp",), ALL])
@pytest.mark.parametrize(("layers", "precision"), [(1, "float32"), (4, "float32"), (3, "bf16")])
def test_gradients_have_the_same_bits(layers: int, precision: str, modules: tuple[str, ...]) -> None:
    pack, dtype = mixed_pack(), torch.bfloat16 if precision == "bf16" else torch.float32
    batch = batch_of(pack, values_of(pack))[1].to(CPU, dtype)
    again: dict[str, Any] = {"recompute": "selective" if modules else None, "modules": modules or ("core_attn",)}
    again["precision"] = precision
    plain = forward_backward(build(DEEP, **again), pack, batch)
    model = build(DEEP, offload=layers, **again)
    same(plain, forward_backward(model, pack, batch))
    same(plain, forward_backward(model, pack, batch))
    assert model.offload is not None and model.offload.host_bytes == 0


@pytest.mark.parametrize("backend", ["varlen_emulated", "dense"])
@pytest.mark.parametrize("mape", ["reference", "auto"])
def test_other_operators_give_the_same_bits(backend: str, mape: str) -> None:
    pack = mixed_pack()
    batch = batch_of(pack, values_of(pack))[1]
    model = with_model(attention_backend=backend, qk_norm=mape == "auto")
    same(forward_backward(build(model), pack, batch), forward_backward(build(model, offload=2), pack, batch))


def outputs(model: LanceModel, batch: RankBatch) -> torch.Tensor:
    found = model(batch)
    assert isinstance(found, HeadOutputs)
    return (found.ce.sum() + found.velocity.square().sum()).float()


@pytest.mark.parametrize("order", ["first in first out", "last in first out"])
def test_micro_batches_in_flight_do_not_mix(order: str) -> None:
    """Three wait at a time, as in 1F1B; gradients of all are added."""
    found = []
    for layers in (0, 3):
        model = build(DEEP, offload=layers)
        waiting = [outputs(model, batch) for batch in batches(3)]
        for loss in waiting if order == "first in first out" else reversed(waiting):
            loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


class Seen:
    """Storages that layers save, and what is with them later."""

    def __init__(self, model: LanceModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.storages: list[tuple[weakref.ref[torch.UntypedStorage], int]] = []
        pack, send = _Layer.pack, _Layer.send
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}

        def watched(layer: _Layer, tensor: torch.Tensor) -> torch.Tensor | _View:
            packed = pack(layer, tensor)
            assert isinstance(packed, _View) or tensor.untyped_storage()._cdata in layer.resident
            assert not isinstance(packed, _View) or tensor.untyped_storage()._cdata not in parameters
            return packed

        def sent(layer: _Layer) -> None:
            moved = [kept.storage for kept in layer.seen.values() if kept.storage is not None]
            self.storages += [(weakref.ref(storage), storage.nbytes()) for storage in moved]
            send(layer)

        monkeypatch.setattr(_Layer, "pack", watched)
        monkeypatch.setattr(_Layer, "send", sent)

    def bytes(self) -> int:
        return sum(size for _, size in self.storages)

    def alive(self) -> list[torch.UntypedStorage]:
        gc.collect()
        known = [storage for ref, _ in self.storages if (storage := ref()) is not None]
        return [storage for storage in known if storage.nbytes()]  # recompute empties some


@pytest.mark.parametrize("modules", [(), ("core_attn",), ("layernorm",), ("mlp",), ALL])
def test_what_offloaded_layers_keep_leaves_the_device(
    modules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, parameters apart; each storage once; on the host until the graph has gone."""
    again: dict[str, Any] = {"recompute": "selective" if modules else None, "modules": modules or ("core_attn",)}
    model, (batch,) = build(DEEP, offload=4, **again), batches(1)
    seen = Seen(model, monkeypatch)
    assert model.offload is not None
    for _ in range(2):
        seen.storages.clear()
        loss = outputs(model, batch)
        sent, alive = model.offload.host_bytes, seen.alive()
        assert alive == [] and sent == seen.bytes() > 0
        loss.backward()
        assert model.offload.host_bytes == 0
    loss = outputs(model, batch)
    assert model.offload.host_bytes == sent
    del loss
    gc.collect()
    assert model.offload.host_bytes == 0


def test_layers_behind_keep_theirs() -> None:
    by_layers = []
    for layers in (1, 2, 3, 4):
        model = build(DEEP, offload=layers)
        loss = outputs(model, batches(1)[0])
        assert model.offload is not None
        by_layers.append(model.offload.host_bytes)
        loss.backward()
    assert [n / by_layers[0] for n in by_layers] == pytest.approx([1, 2, 3, 4], rel=0.05)


def test_what_is_recomputed_does_not_travel() -> None:
    """A norm's output is dropped before the copies start; an MLP's values are never saved."""
    travelled = {}
    for modules in ((), ("layernorm",), ("mlp",), ("layernorm", "mlp"), ALL):
        model = build(offload=2, recompute="selective" if modules else None, modules=modules or ("core_attn",))
        loss = outputs(model, batches(1)[0])
        assert model.offload is not None
        travelled[modules] = model.offload.host_bytes
        loss.backward()
    for modules, size in travelled.items():
        assert size < travelled[()] or not modules
    assert travelled[ALL] < travelled["layernorm", "mlp"] < min(travelled["layernorm",], travelled["mlp",])


def test_passes_without_gradients_move_nothing() -> None:
    model = build(offload=2)
    with torch.no_grad():
        outputs(model, batches(1)[0])
    assert model.pack_context(batches(1)[0]).offload is not None and model.offload is not None
    assert model.offload.host_bytes == 0


# ---- the mechanism


def passed(offload: Offload, layers: list[Any], x: torch.Tensor, *stays: torch.Tensor) -> torch.Tensor:
    one = ForwardPass(offload)
    for position, layer in enumerate(layers, 1):
        x = one.layer(position, layer, x, stays)
    one.finish()
    return x


def test_a_storage_saved_often_is_copied_once() -> None:
    """Twice as it is, and as two strided views."""
    offload = Offload(1, CPU)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        a, b = y[:, :3], y.t()[1:, ::2]
        return (y.exp() + y.square()).sum() + (a * a).sum() + (b.sin() * b).sum()

    x = torch.randn(4, 6, requires_grad=True)
    (found,), (wanted,) = (torch.autograd.grad(loss, x) for loss in (passed(offload, [layer], x), layer(x)))
    assert torch.equal(found, wanted)
    waiting = passed(offload, [layer], x)
    sizes = sorted(kept.host.numel() for kept in offload._storages if kept.host is not None)
    assert sizes == [40, 96, 96]  # sine of b, exp, y
    del waiting


def test_strides_and_types_are_kept() -> None:
    offload = Offload(1, CPU)
    values = torch.arange(48, dtype=torch.float32)
    views = [
        values.view(6, 8).t(),
        values.view(2, 3, 8)[:, 1, ::2],
        values[7:9].expand(5, 2),
        values.to(torch.uint8).view(6, 8)[2:],
        values.to(torch.float8_e4m3fn).view(8, 6).t(),
        values.to(torch.bfloat16)[3:],
    ]
    wanted = [(v.clone(), v.stride(), v.storage_offset()) for v in views]
    layer = _Layer(offload, None, values, frozenset())
    packed = [layer.pack(v) for v in views]
    layer.send()
    layer.leave()
    del values, views
    assert offload.host_bytes == 48 * (4 + 1 + 1 + 2)
    for kept, (want, stride, offset) in zip(packed, wanted, strict=True):
        got = layer.unpack(kept)
        assert got.dtype == want.dtype and (got.stride(), got.storage_offset()) == (stride, offset)
        assert torch.equal(got.float(), want.float())


def test_parameters_and_their_views_stay() -> None:
    offload, linear = Offload(1, CPU), nn.Linear(4, 4, bias=False)
    x = torch.randn(3, 4, requires_grad=True)
    waiting = passed(offload, [linear, lambda x: x], x, *linear.parameters())
    assert offload.host_bytes == x.numel() * 4
    x2 = passed(offload, [lambda x: x @ linear.weight[:2].t()], x, *linear.parameters())
    assert offload.host_bytes == 2 * x.numel() * 4
    (waiting.sum() + x2.sum()).backward()


def test_small_storages_stay() -> None:
    offload = Offload(1, CPU)
    offload.least = 65
    small, large = (torch.randn(n, requires_grad=True) for n in (16, 17))
    waiting = [passed(offload, [torch.exp], x).sum() for x in (small, large)]
    assert offload.host_bytes == 17 * 4
    sum(waiting).backward()  # type: ignore[union-attr]
    assert small.grad is not None and torch.equal(small.grad, small.exp())


def test_two_layers_are_on_the_device_at_most() -> None:
    """In forward, and in backward, where the layer before is on its way while one runs."""
    offload, most = Offload(5, CPU), [0]

    def on_device() -> int:
        return sum(kept.storage is not None for kept in offload._storages)

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            ctx.save_for_backward(y)
            most.append(on_device())
            return x * 1

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            (y,) = ctx.saved_tensors
            most.append(on_device())
            assert y is not None
            return gradients[0]

    for length in (5, 7):
        del most[:]
        x = passed(offload, [Watched.apply] * length, torch.zeros(2, requires_grad=True))
        assert on_device() == 0
        x.sum().backward()
        behind = length - offload.layers
        assert most[:length] == [0, 1, 1, 1, 1, 1, 0][:length]
        assert most[length:] == ([0, 1] if behind else []) + [2, 2, 2, 2, 1]
        assert not list(offload._storages)


class SideStream:
    """Stands where a CUDA stream is and writes down what it and the stream beside it are told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.events = 0

    def wait_stream(self, stream: object) -> None:
        self.told.append("side waits")

    def record_event(self) -> int:
        self.events += 1
        self.told.append(f"event {self.events}")
        return self.events

    def wait_event(self, event: int) -> None:
        self.told.append(f"wait for {event}")


def test_copies_are_ordered_by_events_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Originals go behind their copies, and what comes back is waited for where it is read."""
    offload, stream = Offload(2, CPU), SideStream()
    offload.stream = stream  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())

    def layer(name: str) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            stream.told.append(f"forward {name}")
            y = x.exp()
            y.register_hook(lambda _: stream.told.append(f"backward {name}"))
            return y

        return forward

    loss = passed(offload, [layer("a"), layer("b"), layer("c")], torch.zeros(2, requires_grad=True)).sum()
    forward = ["forward a", "side waits", "event 1", "forward b", "side waits", "event 2", "wait for 1"]
    assert stream.told == [*forward, "forward c", "wait for 2"]
    del stream.told[:]
    loss.backward()
    back = ["backward c", "side waits", "event 3", "backward b", "side waits", "event 4", "wait for 3"]
    assert stream.told == [*back, "backward a", "wait for 4"]


def test_a_graph_kept_serves_twice() -> None:
    x = torch.randn(8, requires_grad=True)
    y = passed(Offload(2, CPU), [torch.exp, torch.sin], x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x)[0]) and torch.equal(first, x.exp().cos() * x.exp())


# ---- recompute of one expert


@pytest.mark.parametrize("experts", [("und",), ("gen",)])
@pytest.mark.parametrize("modules", [("mlp",), ("layernorm",), ALL])
def test_recompute_of_one_expert_gives_the_same_gradients(experts: tuple[str, ...], modules: tuple[str, ...]) -> None:
    pack = mixed_pack()
    batch = batch_of(pack, values_of(pack))[1]
    plain = forward_backward(build(), pack, batch)
    again = forward_backward(build(recompute="selective", modules=modules, experts=experts), pack, batch)
    assert torch.equal(plain.loss, again.loss)
    for name, gradient in plain.gradients.items():
        other = again.gradients[name]
        assert gradient is not None and other is not None
        allowed = 1e-6 * gradient.abs().max() if "layernorm" in modules else 0.0
        assert (other - gradient).abs().max() <= allowed, name


@pytest.mark.parametrize("expert", ["und", "gen"])
def test_only_the_named_expert_runs_again(expert: str) -> None:
    pack = mixed_pack()
    model = build(recompute="selective", modules=("layernorm", "mlp"), experts=(expert,))
    runs = {"und": 0, "gen": 0}

    def count(name: str) -> Any:
        return lambda *_: runs.update({name: runs[name] + 1})

    for name in runs:
        part = getattr(model.decoder.layers[0], name)
        for module in (part.mlp, part.input_layernorm, part.pre_mlp_layernorm):
            module.register_forward_hook(count(name))
    forward_backward(model, pack, batch_of(pack, values_of(pack))[1])
    assert runs == {name: 6 if name == expert else 3 for name in runs}


def test_a_tiny_model_has_no_offload_by_default() -> None:
    assert build(replace(TINY)).offload is None
