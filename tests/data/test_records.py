"""Rows of every shape become the same records, and no row is lost without being listed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.config import validate
from trimtab.data.records import DataConfig, Loaded, load_comparisons, load_demonstrations, load_prompts, to_row, write_jsonl
from trimtab.data.templates import Template
from trimtab.errors import ConfigError, DataError
from trimtab.types import Comparison, Group, Message

Write = Callable[..., str]
HELLO: list[Message] = [{"role": "user", "content": "hello"}]


def assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="session")
def chat(chatml: Any) -> Template:
    return Template.of(chatml)


@pytest.fixture(scope="session")
def text(plain: Any) -> Template:
    return Template.of(plain)


# shapes


def test_prompts_keep_the_columns_they_are_not_made_of(rows: Write, chat: Template) -> None:
    path = rows({"prompt": "hello", "answer": 4}, {"messages": HELLO, "numbers": [1, 2]}, {"messages": None, "prompt": HELLO})
    one, two, three = load_prompts(DataConfig(path=path), chat).records
    assert one.tokens == two.tokens == three.tokens
    assert (one.row, two.row) == ({"answer": 4}, {"numbers": [1, 2]})
    assert (one.text, two.text) == ("hello", tuple(HELLO))


def test_fields_name_the_columns_of_the_file(rows: Write, chat: Template) -> None:
    path = rows({"question": "hello", "answer": "there", "prompt": "not this"})
    config = DataConfig(path=path, fields={"prompt": "question", "completion": "answer"})
    (group,) = load_demonstrations(config, chat).records
    assert (group.prompt.text, group.responses[0].text) == ("hello", "there")
    assert group.prompt.row == {"prompt": "not this"}
    with pytest.raises(ConfigError, match="unknown name 'promt'"):
        validate(DataConfig, {"path": path, "fields": {"promt": "question"}}, source="test")


def test_demonstrations_of_all_shapes_are_the_same(rows: Write, chat: Template) -> None:
    path = rows(
        {"prompt": "hello", "completion": "there"},
        {"prompt": HELLO, "completion": assistant("there")},
        {"messages": HELLO + assistant("there")},
    )
    records = load_demonstrations(DataConfig(path=path), chat).records
    assert len({(g.prompt.tokens, g.responses) for g in records}) == 1


def test_turns_decides_what_of_a_conversation_is_learnt(rows: Write, chat: Template) -> None:
    path = rows({"messages": HELLO + assistant("one") + HELLO + assistant("two")})
    (last,) = load_demonstrations(DataConfig(path=path), chat).records
    (both,) = load_demonstrations(DataConfig(path=path, turns="all"), chat).records
    assert (len(last.prompt.text), last.responses[0].text, last.responses[0].mask) == (3, "two", None)
    assert both.prompt.text == tuple(HELLO)
    assert both.prompt.tokens + both.responses[0].tokens == last.prompt.tokens + last.responses[0].tokens


def test_plain_text_is_a_response_to_nothing_even_with_a_chat_template(rows: Write, chat: Template) -> None:
    (group,) = load_demonstrations(DataConfig(path=rows({"text": "hello there", "id": 1})), chat).records
    assert group.prompt.tokens == (chat.end_id,)
    assert chat.tokenizer.decode(list(group.responses[0].tokens)) == "hello there<|im_end|>"
    assert group.prompt.row == {"id": 1}


def test_pairs_of_all_shapes_are_the_same(rows: Write, chat: Template) -> None:
    path = rows(
        {"prompt": "hello", "chosen": "yes", "rejected": "no"},
        {"prompt": HELLO, "chosen": assistant("yes"), "rejected": assistant("no")},
        {"chosen": HELLO + assistant("yes"), "rejected": HELLO + assistant("no")},
        {"prompt": "hello", "chosen": HELLO + assistant("yes"), "rejected": HELLO + assistant("no")},
    )
    records = load_comparisons(DataConfig(path=path), chat).records
    assert len({(c.group.prompt.tokens, c.group.responses, c.scores) for c in records}) == 1
    assert records[0].scores == (1.0, 0.0)
    assert [r.text for r in records[0].group.responses] == ["yes", "no"]


def test_the_implicit_prompt_is_the_longest_shared_beginning(rows: Write, chat: Template) -> None:
    start = HELLO + assistant("same") + HELLO
    path = rows({"chosen": start + assistant("yes"), "rejected": start + assistant("no")})
    assert load_comparisons(DataConfig(path=path), chat).records[0].group.prompt.text == tuple(start)


@pytest.mark.parametrize(
    ("row", "kind", "scores"),
    [
        ({"responses": ["a", "b", "c"]}, "ranking", (2, 1, 0)),
        ({"responses": ["a", "b", "c"], "ranks": [2, 1, 2]}, "ranking", (0, 2, 0)),
        ({"responses": ["a", "b"], "scores": [7, 3.5]}, "rating", (7, 3.5)),
        ({"completion": "a", "rating": 4}, "rating", (4,)),
        ({"completion": "a", "label": False}, "binary", (0,)),
        ({"responses": ["a", "b"], "labels": [True, False]}, "binary", (1, 0)),
    ],
)
def test_judgements_become_scores(rows: Write, chat: Template, row: dict[str, Any], kind: str, scores: tuple[float, ...]) -> None:
    (record,) = load_comparisons(DataConfig(path=rows({"prompt": "hello", "id": 7, **row})), chat).records
    assert (record.kind, record.scores, record.group.prompt.row) == (kind, scores, {"id": 7})


def test_the_shape_can_be_asked_for(rows: Write, chat: Template) -> None:
    path = rows({"prompt": "hello", "responses": ["a", "b", "c"], "scores": [0.5, 9, 3]})
    assert load_comparisons(DataConfig(path=path, shape="ranking"), chat).records[0].scores == (0, 2, 1)
    with pytest.raises(DataError, match=r"need the columns \{chosen, rejected\}; this row has prompt, responses, scores"):
        load_comparisons(DataConfig(path=path, shape="pair"), chat)
    with pytest.raises(ConfigError, match="'text' is not a shape of comparisons"):
        load_comparisons(DataConfig(path=path, shape="text"), chat)


def test_truncated_responses_get_no_end(rows: Write, chat: Template) -> None:
    path = rows(
        {"prompt": "hello", "chosen": "yes", "rejected": "no", "rejected_truncated": True},
        {"prompt": "hello", "responses": ["yes", "no"], "truncated": [False, True]},
        {"prompt": "hello", "completion": "no", "label": False, "truncated": True},
    )
    for record in load_comparisons(DataConfig(path=path), chat).records:
        for response in record.group.responses:
            assert response.truncated == (response.text == "no")
            assert (response.tokens[-1] == chat.end_id) != response.truncated


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rows.jsonl:2, answers 1 and 2: the same answer is judged better and worse"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "rows.jsonl:2, margin: expected a finite number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}, "margin is negative"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "rows.jsonl:2, prompt: expected text or a list of chat turns, got int"),
        (
            {"prompt": "a", "chosen": [{"role": "gpt", "content": ""}], "rejected": "c"},
            "rows.jsonl:2, chosen: turn 1 has the unknown role 'gpt'",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_truncated": "no"},
            "rows.jsonl:2, chosen_truncated: expected true or false",
        ),
        ({"chosen": "b", "rejected": "c"}, "does not show where the answer begins"),
        ({"chosen": HELLO + assistant("x"), "rejected": HELLO}, "rows.jsonl:2, rejected: it is the beginning of the other"),
        ({"chosen": HELLO + HELLO, "rejected": HELLO + assistant("x")}, "do not part at an assistant turn"),
        ({"prompt": "other", "chosen": HELLO + assistant("x"), "rejected": "c"}, "is not the prompt and an answer"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1]}, "rows.jsonl:2, ranks: 1 entries for 2 responses"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}, "all answers are tied"),
        ({"prompt": "a", "responses": ["b"]}, "at least two responses"),
        ({"prompt": "a", "completion": "b", "label": 1}, "rows.jsonl:2, label: expected true or false, got 1"),
        ({"prompt": "a", "completion": "b", "rating": float("nan")}, "rating: expected a finite number"),
        ({"question": "a", "chosen": None}, r"this row has question, chosen\n  fix: name the file's columns"),
    ],
)
def test_a_bad_row_is_an_error_or_is_listed(rows: Write, chat: Template, row: dict[str, Any], message: str) -> None:
    path = rows({"prompt": "hello", "chosen": "yes", "rejected": "no"}, row)
    with pytest.raises(DataError, match=message) as caught:
        load_comparisons(DataConfig(path=path), chat)
    assert "data.on_bad_row=skip" in str(caught.value)
    loaded = load_comparisons(DataConfig(path=path, on_bad_row="skip"), chat)
    assert len(loaded.records) == 1
    ((place, reason),) = loaded.skipped
    assert place == f"{path}:2"
    assert reason.split(": ")[-1] in str(caught.value)


def test_conversations_that_do_not_end_with_an_answer_are_bad(rows: Write, chat: Template) -> None:
    with pytest.raises(DataError, match=r":1, messages: the last turn is not the assistant's"):
        load_demonstrations(DataConfig(path=rows({"messages": HELLO + assistant("a") + HELLO})), chat)
    with pytest.raises(DataError, match=r":1, messages: the prompt ends with an assistant turn"):
        load_prompts(DataConfig(path=rows({"messages": HELLO + assistant("a")})), chat)


# which rows


def test_where_and_limit_choose_rows(rows: Write, text: Template) -> None:
    path = rows(*({"prompt": f"p{i}", "source": "ab"[i % 2]} for i in range(10)))
    assert [p.text for p in load_prompts(DataConfig(path=path, where={"source": "b"}, limit=2), text).records] == ["p1", "p3"]
    with pytest.raises(DataError, match=r"none of 10 rows has {'source': 'c'}"):
        load_prompts(DataConfig(path=path, where={"source": "c"}), text)


def test_nothing_but_skipped_rows_is_an_error(rows: Write, text: Template) -> None:
    with pytest.raises(DataError, match=r"all 2 rows were skipped: .*rows\.jsonl:1: prompts need the columns"):
        load_prompts(DataConfig(path=rows({"a": 1}, {"a": 2}), on_bad_row="skip"), text)


def test_every_row_is_kept_held_out_or_listed(rows: Write, chat: Template) -> None:
    good = [{"prompt": f"{i}", "chosen": "yes", "rejected": "no"} for i in range(40)]
    bad = [{"prompt": "x", "chosen": "no", "rejected": "no"}, {"prompt": "the " * 50, "chosen": "a", "rejected": "b"}]
    config = DataConfig(path=rows(*good, *bad), holdout=0.3, on_bad_row="skip", max_prompt_tokens=60, on_long="skip")
    loaded = load_comparisons(config, chat)
    assert len(loaded.records) + len(loaded.holdout) == 40
    assert [place.rpartition(":")[2] for place, _ in loaded.skipped] == ["41", "42"]
    assert 4 <= len(loaded.holdout) <= 20


def test_what_was_read_is_reported(rows: Write, text: Template) -> None:
    events: list[tuple[str, dict[str, Any]]] = []

    class Tracker:
        def event(self, kind: str, **details: Any) -> None:
            events.append((kind, details))

    loaded: Loaded[Any] = load_prompts(DataConfig(path=rows({"prompt": "a"}, {"b": 1}), on_bad_row="skip"), text)
    loaded.report(Tracker())  # type: ignore[arg-type]
    ((kind, details),) = events
    assert (kind, details["records"], details["skipped"]) == ("data", 1, 1)
    assert "rows.jsonl:2: prompts need" in details["skipped_rows"][0]


def test_a_prompt_is_never_on_both_sides(rows: Write, chat: Template, text: Template) -> None:
    """Whatever the tokenizer, the writing of the prompt, the order of rows, or the share held out before."""
    prompts = [f"question {i % 50}" for i in range(200)]
    path = rows(*({"prompt": p if i < 100 else [{"role": "user", "content": p}]} for i, p in enumerate(prompts)))
    turned = rows(*({"prompt": p} for p in reversed(prompts)), name="turned.jsonl")

    def sides(path: str, template: Template, share: float) -> tuple[set[str], set[str]]:
        loaded = load_prompts(DataConfig(path=path, holdout=share), template)
        kept, held = (
            {p.text if isinstance(p.text, str) else p.text[0]["content"] for p in part} for part in (loaded.records, loaded.holdout)
        )
        assert not kept & held
        return kept, held

    kept, held = sides(path, chat, 0.3)
    assert (kept, held) == sides(turned, text, 0.3)
    assert len(kept) + len(held) == 50
    assert held <= sides(path, chat, 0.6)[1]


def test_plain_texts_are_held_out_by_what_they_say(rows: Write, text: Template) -> None:
    loaded = load_demonstrations(DataConfig(path=rows(*({"text": f"text {i}"} for i in range(40))), holdout=0.5), text)
    assert 10 < len(loaded.holdout) < 30


# lengths


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_long_rows_are_an_error_or_are_listed(rows: Write, text: Template, column: str) -> None:
    long = {"prompt": "a", "completion": "b", column: "hello " * 30}
    path = rows({"prompt": "a", "completion": "b"}, long)
    limits = {"max_prompt_tokens": 10, "max_response_tokens": 10}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* tokens, more than max_(.|\n)*data\.on_long=skip"):
        load_demonstrations(DataConfig(path=path, **limits), text)
    loaded = load_demonstrations(DataConfig(path=path, on_long="skip", **limits), text)
    assert (len(loaded.records), [place for place, _ in loaded.skipped]) == (1, [f"{path}:2"])


def test_truncating_keeps_the_end_of_the_prompt_and_the_beginning_of_the_answer(rows: Write) -> None:
    from small_tokenizers import byte_level

    template = Template.of(byte_level(eos="</s>", bos_token="<s>", around="<s> $A"))
    path = rows({"prompt": "x" * 20 + "the end", "completion": "begin" + "y" * 20})
    whole = load_demonstrations(DataConfig(path=path), template).records[0]
    config = DataConfig(path=path, max_prompt_tokens=6, max_response_tokens=4, on_long="truncate")
    (cut,) = load_demonstrations(config, template).records
    assert cut.prompt.tokens == whole.prompt.tokens[:1] + whole.prompt.tokens[-5:]
    assert cut.responses[0].tokens == whole.responses[0].tokens[:4]
    assert cut.responses[0].truncated
    assert whole.prompt.as_text.endswith(cut.prompt.as_text)
    assert whole.responses[0].text.startswith(cut.responses[0].text)


def test_a_chat_prompt_is_never_cut(rows: Write, chat: Template) -> None:
    path = rows({"prompt": "a"}, {"prompt": "hello " * 60})
    loaded = load_prompts(DataConfig(path=path, max_prompt_tokens=50, on_long="truncate"), chat)
    assert (len(loaded.records), len(loaded.skipped)) == (1, 1)


def test_masks_are_cut_with_their_tokens(rows: Write, chat: Template) -> None:
    path = rows({"messages": HELLO + assistant("one") + HELLO + assistant("two")})
    whole = load_demonstrations(DataConfig(path=path, turns="all"), chat).records[0].responses[0]
    limit = len(whole.tokens) - 2
    cut = (
        load_demonstrations(DataConfig(path=path, turns="all", max_response_tokens=limit, on_long="truncate"), chat).records[0].responses[0]
    )
    assert whole.mask is not None
    assert (cut.tokens, cut.mask, cut.truncated) == (whole.tokens[:limit], whole.mask[:limit], True)


def test_answers_that_differ_only_beyond_the_limit_are_bad(rows: Write, text: Template) -> None:
    path = rows({"prompt": "a", "chosen": "xxxxxxxx yes", "rejected": "xxxxxxxx no"})
    with pytest.raises(DataError, match="the same answer is judged better and worse"):
        load_comparisons(DataConfig(path=path, max_response_tokens=4, on_long="truncate"), text)


# there and back

ANSWERS = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=8)
PROMPTS = ANSWERS | ANSWERS.map(lambda text: [{"role": "system", "content": "Be kind"}, {"role": "user", "content": text}])


@given(
    prompt=PROMPTS, answers=st.lists(ANSWERS, min_size=2, max_size=4, unique=True), cut=st.booleans(), plain=st.booleans(), data=st.data()
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_comparisons_read_back_equal(
    tmp_path: Path, chat: Template, text: Template, prompt: Any, answers: list[str], cut: bool, plain: bool, data: st.DataObject
) -> None:
    template = text if plain else chat
    given = template.prompt(prompt, {"id": 3})
    responses = tuple(template.response(given, answer, cut) for answer in answers)
    if len({r.tokens for r in responses}) < len(responses):  # after a prompt of turns "a" and " a" are one answer
        return
    group, few = Group(given, responses), Group(given, responses[:2])
    written = [
        Comparison(few, (1.0, 0.0), margin=data.draw(st.floats(0, 100))),
        Comparison(group, tuple(float(i) for i in range(len(answers)))[::-1], "ranking"),
        Comparison(group, tuple(data.draw(st.floats(-10, 10)) for _ in answers), "rating"),
        Comparison(group, tuple(float(data.draw(st.booleans())) for _ in answers), "binary"),
        Comparison(Group(given, responses[:1]), (1.0,), "binary"),
    ]
    path = tmp_path / "comparisons.jsonl"
    write_jsonl(path, map(to_row, written))
    assert load_comparisons(DataConfig(path=str(path)), template).records == written


def test_answers_of_several_turns_cannot_be_written(chat: Template) -> None:
    prompt = chat.prompt("hello")
    several = chat.response(prompt, assistant("one") + HELLO + assistant("two"))
    with pytest.raises(DataError, match="several turns"):
        to_row(Comparison(Group(prompt, (several,)), (1.0,), "binary"))


# real data

QUESTION_ANSWER = {"prompt": "question", "completion": "answer"}
REAL: dict[str, tuple[Any, dict[str, str]]] = {
    **dict.fromkeys(("chat_prompts", "countdown"), (load_prompts, {})),
    **dict.fromkeys(("gsm8k", "svamp"), (load_demonstrations, QUESTION_ANSWER)),
    "self_instruct_human": (load_demonstrations, {}),
    "ai_feedback_kto_demo": (load_comparisons, {}),
}


def test_real_data_is_read_without_a_bad_row(shared: Path, chat: Template, text: Template) -> None:
    files = sorted(shared.glob("data/*/data.jsonl"))
    assert files
    for path in files:
        load, fields = REAL.get(path.parent.name, (load_comparisons, {}))
        for template in (chat, text):
            loaded = load(DataConfig(path=str(path), fields=fields, limit=40), template)
            assert (len(loaded.records), loaded.skipped) == (40, [])


def test_real_questions_are_prompts_whose_answers_travel_along(shared: Path, text: Template) -> None:
    config = DataConfig(path=str(shared / "data/gsm8k/data.jsonl"), fields={"prompt": "question"}, limit=5)
    assert all({"answer", "final"} <= prompt.row.keys() for prompt in load_prompts(config, text).records)


def test_real_snippets_are_plain_text(shared: Path, text: Template) -> None:
    config = DataConfig(path=str(shared / "data/sentiment_human_rated/movie.jsonl"), limit=20)
    assert all("score" in group.prompt.row for group in load_demonstrations(config, text).records)
