"""Freeze sets: weights that a run leaves as they are (spec/recipes.md).

Station: model, before it is wrapped for data parallelism -> [freeze].  A frozen weight has no gradient buffer and no
optimizer state, but is saved and exported with the rest.  The ViT and the VAE are always frozen: they are no part of
the model.  The generation expert always trains, so every pipeline stage has something to train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_lance.model.lance_model import LanceModel

FREEZE_SETS: Mapping[str, Callable[[str], bool]] = {
    "embeddings": lambda name: name.startswith("embedder.word_embeddings."),
    "head": lambda name: name.startswith("heads.lm_head."),
    "und": lambda name: ".und." in name or name.startswith("heads.und_norm."),
}
"""Whether a parameter's name, global or of a stage, belongs to a set: word embeddings, LM head, understanding expert
(its layers and its final norm)."""


def is_frozen(name: str, sets: Iterable[str]) -> bool:
    """Whether the parameter of this name belongs to one of `sets`, keys of FREEZE_SETS."""
    return any(FREEZE_SETS[each](name) for each in sets)


def freeze(stages: Sequence[LanceModel], sets: Sequence[str]) -> None:
    """Take the weights of `sets` out of training; before data-parallel wrappers and an optimizer look at the model.

    Args:
        stages: the model chunks of this pipeline rank.
        sets: keys of FREEZE_SETS.
    """
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if is_frozen(name, sets):
                parameter.requires_grad_(False)
