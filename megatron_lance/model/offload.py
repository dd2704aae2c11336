"""What the first layers of a model chunk keep for backward waits on the host.

Station: forward of a dual-expert layer -> [pinned host memory] -> its backward.

megatron-core 0.16.1 has two ways, and neither serves here: TransformerConfig refuses `cpu_offloading` with pipeline
parallelism and with any recompute, and `fine_grained_activation_offloading` lives in the forward methods of
TransformerLayer and Attention, which a dual-expert layer does not call.

Moved are whole storages, as autograd keeps whole ones: views of one travel together and are the same views afterwards,
with their strides, so gradients have the same bits.  Copies to the host start when a layer's forward ends and run on a
side stream beside the next layer, behind which the originals go: the GPU then waits for the copies, never the host.
(Marking the originals with `record_stream` instead would wait for nothing, but the allocator would have to keep them
for as long as the host is ahead of the GPU.)  In backward the first read of a layer starts the copies back of the layer
before it.  So at most two layers of one pass are on the device.  What a layer wrote into a storage after it was saved
travels too, as autograd asks that a saved tensor is not written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 2**20
"""Bytes of a storage on a GPU that is worth a copy; smaller ones stay where they are."""


class Offload:
    """Of one model chunk.

    Args:
        layers: whose saved tensors move, from the chunk's first.
        device: where the model computes; on a CPU copies are plain, and all sizes are moved.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.on_gpu = device.type == "cuda"
        self.least = LEAST_BYTES if self.on_gpu else 1
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self._storages: weakref.WeakSet[_Storage] = weakref.WeakSet()

    @property
    def host_bytes(self) -> int:
        """Bytes that wait on the host now."""
        return sum(kept.host.numel() for kept in self._storages if kept.host is not None)

    def keep(self, storage: torch.UntypedStorage) -> _Storage:
        """What stands for a storage until backward has read it."""
        kept = _Storage(storage, self)
        self._storages.add(kept)
        return kept

    def side(self) -> AbstractContextManager[object]:
        """A context in which copies are queued, behind all that the device was told up to now."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def event(self) -> torch.cuda.Event | None:
        """What is there once the copies queued so far are done; None on a CPU: they are."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let what is queued on the device from now on wait for an event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class _Storage:
    """A storage of which saved tensors are views.

    Args:
        storage: on the device.
        offload: what moves it.
    """

    def __init__(self, storage: torch.UntypedStorage, offload: Offload) -> None:
        self.storage: torch.UntypedStorage | None = storage  # None: on the host only
        self.offload = offload
        self.host: torch.Tensor | None = None  # uint8
        self.arrival: torch.cuda.Event | None = None  # of the copy back, until it was waited for

    def send(self) -> None:
        """Start the copy to the host; on the side stream."""
        assert self.storage is not None
        host = torch.empty(self.storage.nbytes(), dtype=torch.uint8, pin_memory=self.offload.on_gpu)
        host.untyped_storage().copy_(self.storage, non_blocking=True)
        self.host = host

    def fetch(self) -> None:
        """Start the copy back; on the side stream, into memory of the stream that reads it."""
        assert self.storage is not None and self.host is not None
        self.storage.copy_(self.host.untyped_storage(), non_blocking=True)
        self.host, self.arrival = None, self.offload.event()

    def arrived(self) -> torch.UntypedStorage:
        """The storage, for what is queued on the device from now on."""
        assert self.storage is not None
        self.offload.wait(self.arrival)
        self.arrival = None
        return self.storage

    def __del__(self) -> None:
        """Nothing may take the memory of a copy back that nobody waited for."""
        if self.arrival is not None and self.offload.stream is not None and self.storage is not None:
            whole = torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)
            whole.record_stream(self.offload.stream)


@dataclass(frozen=True)
class _View:
    """A saved tensor: the part of a storage that it shows."""

    kept: _Storage
    dtype: torch.dtype
    offset: int  # values
    size: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        """The tensor."""
        storage = self.kept.arrived()
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.size, self.stride
        )


class _Layer:
    """What one layer saves in one pass.

    Storages are held by what autograd keeps alone, so each goes when the last node that saved it has run backward.

    Args:
        offload: of the chunk.
        before: the layer before it in the same pass; None: it is the first.
        rows: its input.
        resident: storages that stay on the device anyway, by address.
    """

    def __init__(self, offload: Offload, before: _Layer | None, rows: torch.Tensor, resident: frozenset[int]) -> None:
        self.offload, self.before, self.resident, self.rows = offload, before, resident, id(rows)
        self.leaves: list[torch.Tensor] = []
        self.seen: dict[int, _Storage] = {}  # by address; held, so that no other storage gets it meanwhile
        self.sent: list[weakref.ref[_Storage]] = []
        self.departure: torch.cuda.Event | None = None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _View:
        """What autograd keeps instead of a tensor."""
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != self.offload.device.type:
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.offload.least or storage._cdata in self.resident:
            return tensor
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = self.offload.keep(storage)
        if tensor.is_leaf and tensor.requires_grad and id(tensor) != self.rows:
            self.leaves.append(tensor)  # recompute's own; autograd holds a leaf beside what stands for it
        kept = self.seen[storage._cdata]
        return _View(kept, tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())

    def unpack(self, packed: torch.Tensor | _View) -> torch.Tensor:
        """The tensor again; the first call starts the way back of the layer before."""
        self.fetch()
        if self.before is not None:
            self.before.fetch()
            self.before = None
        return packed.tensor() if isinstance(packed, _View) else packed

    def send(self) -> None:
        """Start the copies to the host; what recompute has emptied meanwhile stays for it to fill."""
        moved = [kept for kept in self.seen.values() if kept.storage is not None and kept.storage.nbytes()]
        with self.offload.side():
            for kept in moved:
                kept.send()
            self.departure = self.offload.event()
        self.sent = [weakref.ref(kept) for kept in moved]
        self.seen = {}

    def leave(self) -> None:
        """Give up the originals, for use behind their copies."""
        self.offload.wait(self.departure)
        for kept in self._alive():
            kept.storage = None
        for leaf in self.leaves:
            leaf.data = leaf.new_empty(0)
        self.leaves = []

    def fetch(self) -> None:
        """Start the copies back, what was saved last first; again: nothing."""
        away = [kept for kept in reversed(self._alive()) if kept.storage is None]
        self.sent = []
        for kept in away:
            assert kept.host is not None
            buffer = torch.empty(kept.host.numel(), dtype=torch.uint8, device=self.offload.device)
            kept.storage = buffer.untyped_storage()
        if away:
            with self.offload.side():
                for kept in away:
                    kept.fetch()

    def _alive(self) -> list[_Storage]:
        return [kept for ref in self.sent if (kept := ref()) is not None]


class ForwardPass:
    """One pass of a micro-batch through a chunk; any number may wait for their backward.

    Args:
        offload: of the chunk.
    """

    def __init__(self, offload: Offload) -> None:
        self.offload = offload
        self.last: _Layer | None = None

    def layer(
        self,
        position: int,
        forward: Callable[[torch.Tensor], torch.Tensor],
        rows: torch.Tensor,
        stays: Iterable[torch.Tensor],
    ) -> torch.Tensor:
        """Run a layer's forward.

        Args:
            position: of the layer in its chunk, from 1; in this order.
            forward: of the layer.
            rows: its input.
            stays: tensors that are on the device anyway: parameters, what belongs to the pack.

        Returns:
            what `forward` returned.
        """
        before, self.last = self.last, None
        if position <= self.offload.layers:
            own = _Layer(self.offload, before, rows, frozenset(tensor.untyped_storage()._cdata for tensor in stays))
            with saved_tensors_hooks(own.pack, own.unpack):
                output = forward(rows)
            own.send()
            self.last = own
        else:
            output = forward(rows)
            if before is not None and output.requires_grad:  # its gradient is the first thing this layer's backward has
                output.register_hook(lambda _: before.fetch())
        if before is not None:
            before.leave()
        return output

    def finish(self) -> None:
        """After the chunk's last layer."""
        last, self.last = self.last, None
        if last is not None:
            last.leave()
