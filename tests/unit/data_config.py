"""The data section of a small run over the real parquet files, for tests of prepack and loader."""

from __future__ import annotations

from pathlib import Path

from megatron_lance.config.schema import DataConfig, ModelConfig, SourceConfig
from tests.shared import shared_path

SOURCES = {
    "text2image": "t2i",
    "text2video": "i2v",
    "image2image": "i_edit",
    "video2video": "v_edit",
    "interleave_subject": "s2i",
    "x2t_image": "i2t",
    "x2t_video": "v2t",
}
MODEL = ModelConfig(vocab_size=512, latent_position_frames=9, latent_position_size=32)


def real_data(folder: Path) -> DataConfig:
    """Every task over its real file; the pack index goes to `folder`/index."""
    sources = tuple(
        SourceConfig(name, str(shared_path("data", f"{name}.parquet")), task) for name, task in SOURCES.items()
    )
    return DataConfig(
        sources=sources,
        pack_index=str(folder / "index"),
        tokenizer=str(shared_path("golden", "tokenizer")),
        seq_length=6000,
        vae_resolution=256,
        vit_resolution=224,
        max_seconds_generation=1.5,
        epochs=2,
    )
