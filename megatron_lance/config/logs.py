"""What a command line writes besides its results.

Station: first thing in a command line, before torch and megatron-core are imported where that is possible.
"""

from __future__ import annotations

import logging
import warnings


def set_up_logging(first_rank: bool) -> None:
    """Our own lines from the first rank, warnings from all; megatron-core's and torch's notices only as errors."""
    level = logging.INFO if first_rank else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", force=True)
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    hide_library_warnings()


def hide_library_warnings() -> None:
    """Leave out Python's warnings that megatron-core and torch give on their own account."""
    for module in (r"megatron\.core", r"torch(\.|$)", r"megatron_lance\.parallel\.cpu_rehearsal"):
        warnings.filterwarnings("ignore", category=Warning, module=module)
