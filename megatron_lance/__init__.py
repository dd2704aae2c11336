"""megatron_lance: a trainer for Lance-type dual-expert multimodal models on megatron-core."""

import warnings

# What megatron-core says on import, in several files and on every rank, where TransformerEngine and Apex are missing.
# A run's log says in one line what serves.  Here, as nothing of this package is imported before it.
warnings.filterwarnings(
    "ignore",
    message=r"(Transformer Engine and )?Apex (are|is) not installed\. Falling back to",
    category=UserWarning,
    module=r"megatron\.core\.",
)
