"""What accelerators can do at most: the published figures that utilisation is measured against.

Station: device name -> [device] -> metrics, planner.  Figures are those of the vendors' data sheets: dense bfloat16
tensor throughput, memory, memory bandwidth, and per direction the links to the other devices of a node and to other
nodes (one 400 Gb/s, for A100 200 Gb/s, adapter per device).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Attributes:
        name: part of the name that torch reports.
        tflops: dense bfloat16, 1e12 FLOP/s.
        fp8_tflops: dense FP8, 1e12 FLOP/s; 0 where there is none.
        memory_gib: of the device, 2^30 bytes, as its driver reports it.
        memory_bandwidth: bytes/s.
        node_bandwidth: bytes/s and direction to the devices of its node.
        network_bandwidth: bytes/s and direction to other nodes.
    """

    name: str
    tflops: float
    fp8_tflops: float
    memory_gib: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


DEVICES: tuple[Device, ...] = (
    Device("B200", 2250.0, 4500.0, 178.0, 8.0e12, 900e9, 50e9),
    Device("H200", 989.4, 1978.9, 139.8, 4.8e12, 450e9, 50e9),
    Device("H100", 989.4, 1978.9, 79.1, 3.35e12, 450e9, 50e9),
    Device("H800", 989.4, 1978.9, 79.1, 3.35e12, 200e9, 50e9),
    Device("A100", 312.0, 0.0, 79.1, 2.039e12, 300e9, 25e9),
    Device("L40S", 362.1, 733.0, 44.5, 0.864e12, 32e9, 25e9),
)


def find_device(name: str) -> Device | None:
    """The entry that a name as torch (or a person) says it means; None if unknown.

    PCIe and NVL boards of the same name are slower, so they are not taken for it; a "G" before it (GH200) is.
    """
    if re.search("PCIE|NVL", name.upper()):
        return None
    return next((d for d in DEVICES if re.search(rf"(?<![A-Z0-9])G?{d.name}(?![0-9])", name.upper())), None)


def peak_tflops(precision: str) -> float | None:
    """Dense peak of this process's device, 1e12 FLOP/s; None on a CPU, on an unknown device and in float32.

    Args:
        precision: training.precision.
    """
    if not torch.cuda.is_available() or precision != "bf16":
        return None
    device = find_device(torch.cuda.get_device_name())
    return None if device is None else device.tflops
