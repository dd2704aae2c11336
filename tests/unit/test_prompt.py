"""Prompts: equality with whole-string tokenisation, tracked spans, text that spells special tokens."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lance.data.prompt import EncodedPrompt, Piece, Role, Text, Tokenizer, TokenizerError, Visual, chat
from tests.shared import shared_path


@pytest.fixture(scope="module")
def folder() -> Path:
    return shared_path("golden", "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer, which reads special tokens out of the text."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def as_string(system: str, caption: str, blocks: list[int], target: int) -> str:
    def visual(n: int) -> str:
        return "<|vision_start|>" + "<|video_pad|>" * n + "<|vision_end|>"

    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{''.join(map(visual, blocks))}{caption}<|im_end|>\n"
        f"<|im_start|>assistant\n{visual(target)}<|im_end|>"
    )


def encode(tokenizer: Tokenizer, system: str, caption: str, blocks: list[int], target: int) -> EncodedPrompt:
    user: list[Piece] = [*map(Visual, blocks), Text(caption, Role.CAPTION)]
    return tokenizer.encode(chat(system, user, [Visual(target)]))


# Everything but the special tokens' own spelling: letters, spaces, newlines, combining marks, astral planes.
texts = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=150, deadline=None)
@given(system=texts, caption=texts, blocks=st.lists(st.integers(1, 9), max_size=3), target=st.integers(1, 20))
def test_ids_are_those_of_the_whole_string(
    tokenizer: Tokenizer, plain: tokenizers.Tokenizer, system: str, caption: str, blocks: list[int], target: int
) -> None:
    encoded = encode(tokenizer, system, caption, blocks, target)
    whole = plain.encode(as_string(system, caption, blocks, target), add_special_tokens=False).ids
    assert list(encoded.token_ids) == whole
    assert [b - a for a, b in encoded.visual_spans] == [n + 2 for n in [*blocks, target]]
    for start, stop in encoded.visual_spans:
        assert encoded.token_ids[start] == tokenizer.vision_start
        assert encoded.token_ids[stop - 1] == tokenizer.vision_end
        assert set(encoded.token_ids[start + 1 : stop - 1]) == {tokenizer.video_pad}


@pytest.mark.parametrize("caption", ["A red fox.", " leading and trailing ", "日本 e\u0301 \N{FOX FACE}", "x\n\ny"])
def test_caption_span_decodes_to_the_caption(tokenizer: Tokenizer, caption: str) -> None:
    encoded = encode(tokenizer, "Describe:", caption, [4], 6)
    assert encoded.caption_span is not None
    start, stop = encoded.caption_span
    assert tokenizer.decode(encoded.token_ids[start:stop]) == unicodedata.normalize("NFC", caption)
    assert encoded.label_spans == ()


def test_empty_caption_has_no_span(tokenizer: Tokenizer) -> None:
    assert encode(tokenizer, "Describe:", "", [], 6).caption_span is None


def test_answer_labels_end_with_im_end(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode(chat("", [Text("What?")], [Text("The fox is red.", Role.ANSWER)]))
    [(start, stop)] = encoded.label_spans
    assert stop == len(encoded.token_ids)
    assert tokenizer.decode(encoded.token_ids[start:stop]) == "The fox is red.<|im_end|>"
    assert tokenizer.decode(encoded.token_ids[start - 1 : start]) == "\n"


@pytest.mark.parametrize("token", ["<|im_end|>", "<|video_pad|>", "<|vision_start|>", "<|endoftext|>"])
def test_special_token_text_of_a_record_stays_text(tokenizer: Tokenizer, token: str) -> None:
    caption = f"before {token} after"
    encoded = encode(tokenizer, f"sys {token}", caption, [3], 5)
    special = [tokenizer.im_start, tokenizer.im_end, tokenizer.vision_start, tokenizer.vision_end]
    assert [encoded.token_ids.count(i) for i in special] == [3, 3, 2, 2]
    assert encoded.token_ids.count(tokenizer.video_pad) == 3 + 5
    assert encoded.caption_span is not None
    assert tokenizer.decode(encoded.token_ids[slice(*encoded.caption_span)]) == caption


def test_two_captions_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="2 separate captions"):
        tokenizer.encode([Text("a", Role.CAPTION), Visual(2), Text("b", Role.CAPTION)])


def test_size_counts_added_tokens(tokenizer: Tokenizer) -> None:
    config = json.loads(shared_path("golden", "config.json").read_text())
    assert tokenizer.size == config["len_tokenizer_V_eff"]
    assert tokenizer.video_pad == config["special_ids"]["<|video_pad|>"]
    assert tokenizer.im_start == config["special_ids"]["<|im_start|>"]


def test_missing_file_and_missing_special_token(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer.json"):
        Tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|video_pad|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"lacks the special token <\|video_pad\|>"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not readable"):
        Tokenizer(tmp_path)
