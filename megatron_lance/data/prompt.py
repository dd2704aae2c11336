"""Prompts: the chat template, tokenised with the place of every caption, label and visual block.

Station: record -> [task -> prompt] -> sample.  In: the pieces of a prompt (text, special tokens, visual blocks of
known length).  Out: token ids and the spans that a sample is built from (spec/data.md section 2).

The ids are those of the whole prompt tokenised as one string.  Special tokens cut a string before the byte pair
merges run, so the text between two of them is tokenised on its own, and the N placeholders of a visual block are
written as ids, never as text.  Text of a record that spells a special token stays text: only the template makes
structure.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import tokenizers

from megatron_lance.config.errors import UserError

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
VIDEO_PAD = "<|video_pad|>"
_TEMPLATES = 256
"""Texts of the template whose ids are remembered."""
SPECIAL_TOKENS = (IM_START, IM_END, VISION_START, VISION_END, VIDEO_PAD)


class TokenizerError(UserError):
    """The tokenizer's folder is not usable."""


class Role(StrEnum):
    """What a piece of text is for."""

    TEMPLATE = "template"
    CAPTION = "caption"
    """Dropped for the unconditional branch."""
    ANSWER = "answer"
    """CE labels."""


@dataclass(frozen=True)
class Text:
    """A piece of text; special tokens spelled in it stay text."""

    text: str
    role: Role = Role.TEMPLATE


@dataclass(frozen=True)
class Special:
    """A special token of the template, by its text."""

    token: str
    role: Role = Role.TEMPLATE


@dataclass(frozen=True)
class Visual:
    """A visual block: start marker, `content_length` placeholders, end marker."""

    content_length: int


Piece = Text | Special | Visual
Span = tuple[int, int]


@dataclass(frozen=True)
class EncodedPrompt:
    """A tokenised prompt.

    Attributes:
        token_ids: of the sample; visual content holds the video_pad id.
        visual_spans: [start, stop) of each visual block, markers included, in order.
        caption_span: [start, stop) of the caption; None if it has no token.
        label_spans: [start, stop) of the CE labels.
    """

    token_ids: tuple[int, ...]
    visual_spans: tuple[Span, ...]
    caption_span: Span | None
    label_spans: tuple[Span, ...]


class Tokenizer:
    """A byte-level BPE in the Hugging Face layout with the special tokens of the chat template.

    Attributes:
        im_start, im_end, vision_start, vision_end, video_pad: token ids.
        size: number of tokens, added ones included; the model's vocabulary rows may be more.
        sha256: hex digest of tokenizer.json.
    """

    def __init__(self, folder: str | Path) -> None:
        """Load `folder`/tokenizer.json.

        Raises:
            TokenizerError: if the file is absent, is not JSON, or lacks a special token.
        """
        self._folder = folder
        path = Path(folder) / "tokenizer.json"
        if not str(folder) or not path.is_file():
            raise TokenizerError(
                f"data.tokenizer '{folder}': has no tokenizer.json; give the folder of a Qwen2.5-VL tokenizer"
            )
        content = path.read_bytes()
        try:
            added = {token["content"]: token for token in json.loads(content)["added_tokens"]}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise TokenizerError(
                f"data.tokenizer '{folder}': tokenizer.json is not readable ({error!r}); copy it again"
            ) from error
        for name in SPECIAL_TOKENS:
            token = added.get(name)
            if token is None or not token["special"]:
                raise TokenizerError(
                    f"data.tokenizer '{folder}': lacks the special token {name}; it has {sorted(added)}; "
                    "use a tokenizer with the Qwen2.5-VL special tokens"
                )
            if token["normalized"] or token["lstrip"] or token["rstrip"] or token["single_word"]:
                raise TokenizerError(
                    f"data.tokenizer '{folder}': special token {name} changes the text beside it; "
                    "set normalized, lstrip, rstrip and single_word to false"
                )
        self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        self._tokenizer.encode_special_tokens = True  # special tokens spelled in a record stay text
        self._tokenizer.post_processor = None  # the template is written here; offsets stay untrimmed
        self._ids = {name: added[name]["id"] for name in SPECIAL_TOKENS}
        self._templates: dict[str, list[int]] = {}  # ids of recent texts of the template
        self.im_start = self._ids[IM_START]
        self.im_end = self._ids[IM_END]
        self.vision_start = self._ids[VISION_START]
        self.vision_end = self._ids[VISION_END]
        self.video_pad = self._ids[VIDEO_PAD]
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.sha256 = hashlib.sha256(content).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy made by pickling reads the file again: not all settings of the library's object survive."""
        return Tokenizer, (self._folder,)

    def check_fits(self, vocab_size: int) -> None:
        """Raise TokenizerError unless every token has a row among the model's `vocab_size`."""
        if self.size > vocab_size:
            raise TokenizerError(
                f"model.vocab_size {vocab_size}: the tokenizer has {self.size} tokens; raise it or use another "
                "data.tokenizer"
            )

    def encode(self, pieces: Iterable[Piece]) -> EncodedPrompt:
        """Tokenise a prompt.

        A token that begins before a caption or an answer (whitespace merged across the edge) counts as template.

        Args:
            pieces: in order.

        Returns:
            The ids of the prompt tokenised as one string, and the spans tracked on the way.

        Raises:
            ValueError: if the caption is not contiguous.
        """
        ids: list[int] = []
        visual_spans: list[Span] = []
        spans: dict[Role, list[Span]] = {role: [] for role in Role}
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, Text)):
            run = list(group)
            if is_text:
                text_ids, parts = self._encode_run([piece for piece in run if isinstance(piece, Text)])
                for role, start, stop in parts:
                    _extend(spans[role], len(ids) + start, len(ids) + stop)
                ids += text_ids
                continue
            for piece in run:
                if isinstance(piece, Special):
                    _extend(spans[piece.role], len(ids), len(ids) + 1)
                    ids.append(self._ids[piece.token])
                elif isinstance(piece, Visual):
                    visual_spans.append((len(ids), len(ids) + piece.content_length + 2))
                    ids += [self.vision_start, *[self.video_pad] * piece.content_length, self.vision_end]
        captions = spans[Role.CAPTION]
        if len(captions) > 1:
            raise ValueError(f"prompt with {len(captions)} separate captions: join them into one piece of text")
        return EncodedPrompt(
            tuple(ids), tuple(visual_spans), captions[0] if captions else None, tuple(spans[Role.ANSWER])
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelled out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _template_ids(self, text: str) -> list[int]:
        """Ids of a text that stands in many prompts."""
        if text not in self._templates:
            if len(self._templates) >= _TEMPLATES:
                self._templates.clear()
            self._templates[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._templates[text]

    def _encode_run(self, run: list[Text]) -> tuple[list[int], list[tuple[Role, int, int]]]:
        """Ids of adjacent texts tokenised together, and (role, start, stop) of the tokens that begin in each text."""
        if all(piece.role is Role.TEMPLATE for piece in run):
            ids = self._template_ids("".join(piece.text for piece in run))
            return ids, [(Role.TEMPLATE, 0, len(ids))]
        encoding = self._tokenizer.encode("".join(piece.text for piece in run), add_special_tokens=False)
        offsets = encoding.offsets  # each access makes the list anew
        ends = [bisect_left(offsets, (end,)) for end in accumulate(len(piece.text) for piece in run)]
        return encoding.ids, [
            (piece.role, start, stop) for piece, start, stop in zip(run, [0, *ends[:-1]], ends, strict=True)
        ]


def _extend(spans: list[Span], start: int, stop: int) -> None:
    """Add [start, stop) to the last span if it touches it, else begin a new one."""
    if start == stop:
        return
    if spans and spans[-1][1] == start:
        spans[-1] = (spans[-1][0], stop)
    else:
        spans.append((start, stop))


def chat(system: str, user: Sequence[Piece], output: Sequence[Piece]) -> list[Piece]:
    """The chat template of one turn (spec/data.md section 2); no trailing newline.

    Args:
        system: the system prompt.
        user: condition blocks, caption or question.
        output: the answer or the noisy block. The closing im_end of an answer is a label too.

    Returns:
        All pieces in order.
    """
    is_answer = any(isinstance(piece, Text) and piece.role is Role.ANSWER for piece in output)
    start, end, newline = Special(IM_START), Special(IM_END), Text("\n")
    pieces: list[Piece] = [start, Text(f"system\n{system}"), end, newline]
    pieces += [start, Text("user\n"), *user, end, newline]
    pieces += [start, Text("assistant\n"), *output, Special(IM_END, Role.ANSWER if is_answer else Role.TEMPLATE)]
    return pieces
