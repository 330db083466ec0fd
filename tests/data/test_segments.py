"""Pieces of a text, the tokens they end with, and rows whose steps were judged."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CHATML, byte_level

from trimtab.data.records import DataConfig, load_comparisons, load_samples, to_row, write_jsonl
from trimtab.data.segments import SENTENCE, cut_after, cut_every, last_tokens
from trimtab.data.templates import Template
from trimtab.errors import DataError

Rows = Callable[..., str]
CHAT = Template.of(byte_level(CHATML))
STEPS = {"prompt": "2 + 2 * 3?", "steps": ["2 * 3 = 6.", "Add 2: it is 8.", "So 8"], "labels": [1, None, 0]}


def pieces(text: str, ends: list[int]) -> list[str]:
    return [text[a:b] for a, b in pairwise([0, *ends])]


def test_sentences_keep_their_marks_and_the_space_behind_them() -> None:
    text = 'It was 3.5 km. "Really?" she asked. Yes!'
    assert pieces(text, cut_after(text, SENTENCE)) == ["It was 3.5 km. ", '"Really?" ', "she asked. ", "Yes!"]
    assert cut_after("no end", SENTENCE) == [6]
    assert cut_after("One.  ", SENTENCE) == [6]
    assert cut_after("", SENTENCE) == [0]


@given(st.text(st.sampled_from("ab.! \n"), max_size=30))
@settings(deadline=None)
def test_pieces_make_up_the_text_and_none_is_blank(text: str) -> None:
    ends = cut_after(text, SENTENCE)
    assert "".join(pieces(text, ends)) == text
    assert all(piece.strip() for piece in pieces(text, ends)[:-1])
    assert len(ends) == 1 or pieces(text, ends)[-1].strip()


def test_fixed_lengths() -> None:
    assert cut_every(7, 3) == [2, 5, 6]
    assert cut_every(6, 3) == [2, 5]
    assert cut_every(1, 3) == [0]


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="<", exclude_categories=["Cc"]), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None)
def test_a_piece_is_complete_at_its_last_token_and_not_before(texts: list[str]) -> None:
    response = CHAT.response(CHAT.prompt("q"), "".join(texts))
    ends = [len("".join(texts[: k + 1])) for k in range(len(texts))]
    for end, token in zip(ends, last_tokens(CHAT, response.tokens, ends), strict=True):
        assert len(CHAT.decode(response.tokens[: token + 1])) >= end
        assert len(CHAT.decode(response.tokens[:token])) < end


def test_steps_are_read_with_the_token_they_end_with_and_written_back(rows: Rows, tmp_path: Any) -> None:
    (record,) = load_comparisons(DataConfig(path=rows(STEPS)), CHAT).records
    (response,) = record.group.responses
    assert response.text == "\n".join(STEPS["steps"])
    assert (record.kind, record.scores, [step.label for step in record.steps]) == ("process", (0.0,), [1.0, None, 0.0])
    read = [CHAT.decode(response.tokens[: step.end + 1]) for step in record.steps]
    assert read == ["\n".join(STEPS["steps"][: k + 1]) for k in range(3)]
    write_jsonl(tmp_path / "again.jsonl", [to_row(record)])
    assert load_comparisons(DataConfig(path=str(tmp_path / "again.jsonl")), CHAT).records == [record]


def test_steps_beyond_the_length_limit_are_not_judged(rows: Rows) -> None:
    (whole,) = load_comparisons(DataConfig(path=rows(STEPS)), CHAT).records
    config = DataConfig(path=rows(STEPS), max_response_tokens=whole.steps[1].end + 2, on_long="truncate")
    (cut,) = load_comparisons(config, CHAT).records
    assert cut.steps == whole.steps[:2]
    assert cut.group.responses[0].truncated


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({**STEPS, "labels": [1, 0]}, "2 labels for 3 steps"),
        ({**STEPS, "labels": [1, 2, 0]}, "expected 1, 0 or null, got 2"),
        ({**STEPS, "steps": [], "labels": []}, "at least one step"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.3}, "not between 0.5 and 1"),
    ],
)
def test_bad_rows_say_what_is_wrong(rows: Rows, row: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        load_comparisons(DataConfig(path=rows(row)), CHAT)


def test_soft_labels_travel(rows: Rows, tmp_path: Any) -> None:
    (record,) = load_comparisons(DataConfig(path=rows({"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.8})), CHAT).records
    assert record.probability == 0.8
    write_jsonl(tmp_path / "again.jsonl", [to_row(record)])
    assert load_comparisons(DataConfig(path=str(tmp_path / "again.jsonl")), CHAT).records == [record]


def test_samples_need_no_judgement(rows: Rows) -> None:
    path = rows({"prompt": "p", "responses": ["a", "a"], "truncated": [True, False]}, {"prompt": "q", "completion": "b"})
    first, second = load_samples(DataConfig(path=path), CHAT).records
    assert [r.truncated for r in first.responses] == [True, False]
    assert [r.text for r in second.responses] == ["b"]
