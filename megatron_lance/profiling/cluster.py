"""A cluster, and what its devices do in a second where nothing was measured.

Station: device and links -> [rates] -> planner.  Published figures behind the defaults, as shares of the data sheet:

- linears 0.70 of the tensor peak: FlashAttention-3 (arXiv:2407.08608, section 1) puts good matrix-product kernels on an
  H100 at 80 to 90%; sustained products under the power limit reach less.
- attention 0.34: FlashAttention-2 (arXiv:2307.08691, section 4.1), the kernel behind torch's own attention, reaches up
  to 335 of 989 TFLOP/s on an H100, forward and backward.
- memory 0.8 of the peak bandwidth, for elementwise kernels and the optimizer; plain copies reach 0.9 of it.
- links 0.8 within a node and 0.9 between nodes, of one direction; latencies are those of NCCL's small messages, tens of
  microseconds.
- heads 0.6, encoders 0.3 (many small and odd-shaped products and convolutions), 1.5 ms of host time per pass of a layer
  (some 300 launches of 5 us), half of what gathers of keys and values take hidden behind projections: assumptions, to
  be replaced by calibration.
- FP8 linears 1.4 times bfloat16: peak is twice; scaling and casts take their part.  An assumption too, as are the
  memory that is kept free and the allocator's share (below).
- failures: 419 unexpected ones in 54 days on 16,384 H100 (Llama 3, arXiv:2407.21783, section 3.3.4): one per device in
  50,700 hours.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lance.config.errors import UserError
from megatron_lance.profiling.devices import Device
from megatron_lance.profiling.step_time import Rates
from megatron_lance.profiling.step_traffic import Links

FP8_GAIN = 1.4
RESERVED_GIB = 7.0
"""GiB of a device for the CUDA context (0.5), NCCL's buffers (1.5), the encoders (1.4 billion values in bfloat16, 2.5)
and their working space (2.5)."""
FRAGMENTATION = 1.05
"""What the allocator holds over what is alive, of activations."""
HOURS_BETWEEN_FAILURES = 16384 * 54 * 24 / 419
"""Of one device."""


@dataclass(frozen=True)
class Cluster:
    """Devices and what connects them.

    Attributes:
        device: kind of device.
        devices: how many.
        memory_gib: of one.
        links: between them.
    """

    device: Device
    devices: int
    memory_gib: float
    links: Links

    @classmethod
    def of(
        cls,
        device: Device,
        devices: int,
        *,
        node_size: int = 8,
        memory_gib: float | None = None,
        node_bandwidth: float | None = None,
        network_bandwidth: float | None = None,
    ) -> Cluster:
        """A cluster of one kind of device; what is None is its data sheet's.

        Args:
            device: kind.
            devices: how many.
            node_size: of a node.
            memory_gib: of a device.
            node_bandwidth: bytes/s and direction within a node.
            network_bandwidth: bytes/s and direction of a device to other nodes.

        Raises:
            UserError: if one of them is not positive.
        """
        memory_gib = device.memory_gib if memory_gib is None else memory_gib
        node_bandwidth = device.node_bandwidth if node_bandwidth is None else node_bandwidth
        network_bandwidth = device.network_bandwidth if network_bandwidth is None else network_bandwidth
        given = {
            "devices": devices,
            "node size": node_size,
            "memory": memory_gib,
            "node bandwidth": node_bandwidth,
            "network bandwidth": network_bandwidth,
        }
        wrong = [f"{name} {value:g}" for name, value in given.items() if value <= 0]
        if wrong:
            raise UserError(f"cluster: {', '.join(wrong)}: must be positive; leave out what the data sheet may say")
        links = Links(
            node_size=node_size,
            node_bandwidth=0.8 * node_bandwidth,
            network_bandwidth=0.9 * network_bandwidth,
            node_latency=10e-6,
            network_latency=25e-6,
        )
        return cls(device, devices, memory_gib, links)

    def rates(self) -> Rates:
        """From published figures; see the module."""
        peak, memory = 1e12 * self.device.tflops, self.device.memory_bandwidth
        return Rates(
            linears=0.70 * peak,
            attention=0.34 * peak,
            heads=0.60 * peak,
            elementwise=0.8 * memory,
            optimizer=0.8 * memory,
            encoders=0.30 * peak,
            pass_seconds=1.5e-3,
            host_ahead=True,
            exposed_keys=0.5,
            links=self.links,
            source="published figures",
        )
