"""Loader: the text of a pack and the decode requests of its media, by pack number.

Station: pack index -> [loader] -> decode -> encoders.  In: a pack number.  Out: `PackTokens`, and one `DecodeRequest`
per media item asked for, so that a rank reads and decodes only its share.  Reading has no state but caches: the same
number gives the same result on every rank, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_lance.config.schema import DataConfig, ModelConfig
from megatron_lance.data.decode import DecodeRequest
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.pack_index_format import PackIndexError, PlannedRow, shaping_values
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.records import RecordReader
from megatron_lance.data.row_group_cache import RowGroupCache
from megatron_lance.data.tasks import MediaItem, assemble, outline
from megatron_lance.packing.batch import PackTokens

CACHE_BYTES = 1 << 29
"""Row groups that a process keeps or has mapped, over all sources; a source keeps its last one, however large."""


class PackReader:
    """Reads packs of one index; a copy made by pickling opens files of its own."""

    def __init__(
        self,
        config: DataConfig,
        index: PackIndex,
        tokenizer: Tokenizer,
        seed: int | None = None,
        model: ModelConfig | None = None,
    ) -> None:
        """Check that the index was made for this configuration and these files.

        Args:
            config: the data section.
            index: opened.
            tokenizer: of the run.
            seed: the run's seed; None takes the index's.
            model: vocabulary rows and bounds of the latent position table; None takes the index's.

        Raises:
            PackIndexError: if the index does not match, naming what differs.
            DataSetError: if a source has no files.
            TokenizerError: if the model has too few vocabulary rows.
            UserError: if data.row_group_cache cannot be written.
        """
        if model is not None:
            tokenizer.check_fits(model.vocab_size)
        self._config, self._index, self._tokenizer = config, index, tokenizer
        share = CACHE_BYTES // max(1, len(config.sources))
        folder = config.row_group_cache
        cache = RowGroupCache.open(folder, config.row_group_cache_gb) if folder else None
        self._readers = {source.name: RecordReader(source, share, cache) for source in config.sources}
        files = {name: reader.files for name, reader in self._readers.items()}
        seed = index.seed if seed is None else seed
        shaping = shaping_values(
            config, files, tokenizer.sha256, seed, model or ModelConfig(), held_out=index.for_validation
        )
        index.check(shaping if model is not None else {**shaping, "model": index.shaping["model"]})

    @property
    def retries(self) -> int:
        """Reads of remote storage that were repeated so far."""
        return sum(reader.retries for reader in self._readers.values())

    def tokens(self, number: int) -> PackTokens:
        """The token ids and labels of a pack, tokenised again from the records.

        Args:
            number: of the pack.

        Raises:
            PackIndexError: if a record no longer gives the planned sample, naming the record.
            RecordError, DataSetError: if a record cannot be read.
        """
        planned = self._index.pack(number)
        ids = [token_id for row in planned.rows for token_id in self._sample_ids(row)]
        return PackTokens.from_ids(planned.pack, torch.tensor(ids, dtype=torch.int64))

    def requests(self, number: int, items: Sequence[MediaItem]) -> list[DecodeRequest]:
        """What to decode for some media items of a pack, their bytes read.

        Args:
            number: of the pack.
            items: from `PlannedPack.media` of that pack.

        Returns:
            One request per item, in order.

        Raises:
            ValueError: if an item is not the pack's.
            RecordError, DataSetError: if the bytes cannot be read.
        """
        known = self._index.pack(number).known_media
        for item in items:
            if item not in known:
                raise ValueError(f"{item}: is no media item of pack {number}; take items from PackIndex.pack(n).media")
        return [
            DecodeRequest(
                self._readers[item.source].media(item.file, item.row, item.element),
                item.frames,
                item.bucket,
                item.size,
                item.encoder,
            )
            for item in items
        ]

    def _sample_ids(self, row: PlannedRow) -> tuple[int, ...]:
        planned = row.sample
        record = self._readers[row.source].record(row.file, row.row)
        visuals = [segment for segment in planned.segments if segment.is_visual]
        try:
            pieces = outline(record, planned.task, self._config.prompts, row.dropout)
            sample, ids = assemble(planned.sample_id, planned.task, pieces, visuals, self._tokenizer)
        except ValueError as error:
            raise PackIndexError(f"{error}; the record was planned otherwise: run tools/prepack.py --force") from error
        if sample != planned:
            raise PackIndexError(
                f"record {record.sample_id}: now gives {sample.length} tokens in segments of "
                f"{[s.length for s in sample.segments]}, planned were {planned.length} in "
                f"{[s.length for s in planned.segments]}; its text changed: run tools/prepack.py --force"
            )
        return ids
