"""The shapes of data people have, and the records they become.

A shape is known by its columns; SHAPES is the whole list. Columns that a record is not made of travel in `Prompt.row`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from trimtab.data.segments import last_tokens
from trimtab.data.templates import Template, turns_of
from trimtab.errors import DataError
from trimtab.types import Comparison, Group, Message, Prompt, Response, Step

Kind = Literal["prompts", "demonstrations", "comparisons", "samples"]
Shape = Literal["prompt", "messages", "completion", "text", "pair", "ranking", "rating", "binary", "process", "responses"]
Turns = Literal["last", "all"]


class Needs(NamedTuple):
    """The columns of a shape: all of one of the alternatives, and those that may be there too."""

    alternatives: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()


# in the order in which a row is tried
SHAPES: Mapping[Kind, Mapping[Shape, Needs]] = {
    "prompts": {
        "prompt": Needs((("prompt",),)),
        "messages": Needs((("messages",),)),
    },
    "demonstrations": {
        "completion": Needs((("prompt", "completion"),), ("truncated",)),
        "messages": Needs((("messages",),), ("truncated",)),
        "text": Needs((("text",),), ("truncated",)),
    },
    "comparisons": {
        "pair": Needs((("chosen", "rejected"),), ("prompt", "margin", "probability", "chosen_truncated", "rejected_truncated")),
        "process": Needs((("prompt", "steps", "labels"),), ("truncated",)),
        "binary": Needs((("prompt", "completion", "label"), ("prompt", "responses", "labels")), ("truncated",)),
        "rating": Needs((("prompt", "completion", "rating"), ("prompt", "responses", "scores")), ("truncated",)),
        "ranking": Needs((("prompt", "responses"),), ("ranks", "scores", "truncated")),
    },
    "samples": {
        "completion": Needs((("prompt", "completion"),), ("truncated",)),
        "responses": Needs((("prompt", "responses"),), ("truncated",)),
    },
}
NAMES = frozenset(
    name for shapes in SHAPES.values() for needs in shapes.values() for names in (*needs.alternatives, needs.optional) for name in names
)


@dataclass(frozen=True)
class Columns:
    """A row under our names. `names` maps our name of a column to the file's, where they differ; None counts as absent."""

    row: Mapping[str, Any]
    names: Mapping[str, str]

    def __contains__(self, name: str) -> bool:
        return self.row.get(self.names.get(name, name)) is not None

    def __getitem__(self, name: str) -> Any:
        return self.row[self.names.get(name, name)]

    def flag(self, name: str) -> bool:
        """A column of true or false; absent is false."""
        if name not in self:
            return False
        if not isinstance(self[name], bool):
            raise DataError(f"expected true or false, got {self[name]!r}", where=name, fix="write a JSON boolean")
        return bool(self[name])

    def number(self, name: str) -> float:
        """A column of one finite number."""
        return _number(self[name], name)

    def items(self, name: str, count: int | None = None) -> list[Any]:
        """A column holding a list, of `count` items if that is given."""
        value = self[name]
        if not isinstance(value, list):
            raise DataError(f"expected a list, got {type(value).__name__}", where=name, fix="write a JSON list")
        if count is not None and len(value) != count:
            raise DataError(f"{len(value)} entries for {count} responses", where=name, fix="give one entry per response")
        return value

    def flags(self, name: str, count: int) -> list[bool]:
        """A list of true or false, one per response; absent is all false, one boolean stands for a list of one."""
        if name not in self:
            return [False] * count
        values = [self[name]] if count == 1 and isinstance(self[name], bool) else self.items(name, count)
        if not all(isinstance(value, bool) for value in values):
            raise DataError(f"expected true or false, got {values!r}", where=name, fix="write JSON booleans")
        return values

    def numbers(self, name: str, count: int) -> list[float]:
        """A list of finite numbers, one per response."""
        return [_number(value, name) for value in self.items(name, count)]

    def alternative(self, needs: Needs) -> tuple[str, ...] | None:
        """The first alternative of a shape whose columns are all there."""
        return next((names for names in needs.alternatives if all(name in self for name in names)), None)

    def rest(self, kind: Kind, shape: Shape) -> dict[str, Any]:
        """The columns that a record of this shape is not made of."""
        needs = SHAPES[kind][shape]
        used = {self.names.get(name, name) for name in (*(self.alternative(needs) or ()), *needs.optional)}
        return {column: value for column, value in self.row.items() if column not in used}


def detect(columns: Columns, kind: Kind, shape: Shape | None) -> Shape:
    """The shape of a row (or the one that was asked for). Raises DataError if needed columns are not there."""
    shapes = {name: needs for name, needs in SHAPES[kind].items() if shape in (None, name)}
    for name, needs in shapes.items():
        if columns.alternative(needs):
            return name
    needed = [names for needs in shapes.values() for names in needs.alternatives]
    listed = " or ".join("{" + ", ".join(names) + "}" for names in needed)
    example = f"{needed[0][0]}: {next(iter(columns.row), 'its_name')}"
    raise DataError(
        f"{kind} need the columns {listed}; this row has {', '.join(columns.row) or 'none'}",
        fix=f"name the file's columns, for example data.fields={{{example}}}",
    )


def prompt(columns: Columns, template: Template, shape: Shape | None) -> Prompt:
    """A row as a prompt: {prompt}, or {messages} whose last turn is not the assistant's."""
    shape = detect(columns, "prompts", shape)
    with _in(shape):  # here a shape has the name of its column
        return template.prompt(columns[shape], columns.rest("prompts", shape))


def demonstration(columns: Columns, template: Template, shape: Shape | None, turns: Turns) -> Group:
    """A row as a group of one response: {prompt, completion}, {messages} or {text}.

    Of messages, `turns` "last" learns the last assistant turn and "all" learns every one. Text has an empty prompt (BOS)
    and is never put into a chat template.
    """
    shape = detect(columns, "demonstrations", shape)
    rest, cut = columns.rest("demonstrations", shape), columns.flag("truncated")
    if shape == "text":
        plain = Template.of(template.tokenizer, "plain", template.eos_ids)
        start = plain.prompt("", rest)
        with _in("text"):
            return Group(start, (plain.response(start, _text(columns["text"]), cut),))
    if shape == "completion":
        given = _prompt(columns, template, rest)
        return Group(given, (_response(template, given, columns["completion"], cut, "completion"),))
    with _in("messages"):
        messages = turns_of(columns["messages"])
        spoken = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        if not spoken or messages[-1]["role"] != "assistant":
            raise DataError("the last turn is not the assistant's", fix="remove what follows the last answer, or the row")
        start_of_answer = spoken[0] if turns == "all" else spoken[-1]
        given = template.prompt(messages[:start_of_answer], rest)
        return Group(given, (template.response(given, messages[start_of_answer:], cut),))


def sample(columns: Columns, template: Template, shape: Shape | None) -> Group:
    """A row as a prompt and responses that nobody judged: {prompt, responses} or {prompt, completion}."""
    shape = detect(columns, "samples", shape)
    return _answered(columns, template, columns.rest("samples", shape), "responses" if shape == "responses" else "completion")


def comparison(columns: Columns, template: Template, shape: Shape | None, separator: str = "\n") -> Comparison:
    """A row as a comparison; what was said of the responses becomes one score each (see `Comparison`).

    pair:    {chosen, rejected} and a prompt, or two conversations that begin alike.
    ranking: {prompt, responses}, best first, or with "ranks" (1 is best, equal ranks tie) or "scores".
    rating:  {prompt, responses, scores} or {prompt, completion, rating}.
    binary:  {prompt, completion, label} or {prompt, responses, labels}, labels being true or false.
    process: {prompt, steps, labels}: a solution cut into steps, joined by `separator`; labels are 1, 0 or null (neutral).
    """
    shape = detect(columns, "comparisons", shape)
    rest = columns.rest("comparisons", shape)
    if shape == "pair":
        return _pair(columns, template, rest)
    if shape == "process":
        return _process(columns, template, rest, separator)
    many = "responses" in columns
    group = _answered(columns, template, rest, "responses" if many else "completion")
    count = len(group.responses)
    if shape == "binary":
        labels = columns.flags("labels", count) if many else [columns.flag("label")]
        return Comparison(group, tuple(float(label) for label in labels), "binary")
    if shape == "rating":
        return Comparison(group, tuple(columns.numbers("scores", count) if many else [columns.number("rating")]), "rating")
    return Comparison(group, _ranking(columns, count), "ranking")


def check_different(group: Group, scores: Sequence[float]) -> None:
    """Raise DataError if one answer was judged better than an equal one, or if no answer was judged better."""
    answers = [(r.tokens, r.truncated) for r in group.responses]
    for i in range(len(answers)):
        for j in range(i):
            if answers[i] == answers[j] and scores[i] != scores[j]:
                raise DataError("the same answer is judged better and worse", where=f"answers {j + 1} and {i + 1}", fix="remove the row")
    if len(set(scores)) < 2:
        raise DataError("all answers are tied: nothing can be learnt", where="ranks", fix="remove the row")


def _pair(columns: Columns, template: Template, rest: dict[str, Any]) -> Comparison:
    answers: list[str | tuple[Message, ...]]
    if "prompt" in columns:
        given = _prompt(columns, template, rest)
        answers = [_after(given, columns[name], name) for name in ("chosen", "rejected")]
    else:
        given, answers = _shared_prompt(columns, template, rest)
    chosen, rejected = (
        _response(template, given, answer, columns.flag(f"{name}_truncated"), name)
        for name, answer in zip(("chosen", "rejected"), answers, strict=True)
    )
    margin = columns.number("margin") if "margin" in columns else 0.0
    if margin < 0:
        raise DataError(f"the margin is negative: {margin}", where="margin", fix="swap chosen and rejected, or leave it out")
    probability = columns.number("probability") if "probability" in columns else 1.0
    if not 0.5 <= probability <= 1:
        fix = "give the probability that chosen is better, and call the likelier one chosen"
        raise DataError(f"the probability is not between 0.5 and 1: {probability}", where="probability", fix=fix)
    return Comparison(Group(given, (chosen, rejected)), (1.0, 0.0), "pair", margin, probability)


def _answered(columns: Columns, template: Template, rest: dict[str, Any], name: str) -> Group:
    """A prompt with its responses: a list in `responses`, one in `completion`."""
    given = _prompt(columns, template, rest)
    answers = columns.items(name) if name == "responses" else [columns[name]]
    cut = columns.flags("truncated", len(answers))
    return Group(given, tuple(_response(template, given, a, c, name) for a, c in zip(answers, cut, strict=True)))


def _process(columns: Columns, template: Template, rest: dict[str, Any], separator: str) -> Comparison:
    texts = [_text(step) for step in columns.items("steps")]
    labels = [_step_label(label) for label in columns.items("labels")]
    if len(labels) != len(texts) or not texts:
        raise DataError(
            f"{len(labels)} labels for {len(texts)} steps", where="labels", fix="give one label per step, and at least one step"
        )
    given = _prompt(columns, template, rest)
    response = _response(template, given, separator.join(texts), columns.flag("truncated"), "steps")
    lead = len(response.text) - len(separator.join(texts))  # a space that was put before the answer
    starts = accumulate((len(text) + len(separator) for text in texts[:-1]), initial=lead)
    ends = [start + len(text.rstrip()) for start, text in zip(starts, texts, strict=True)]  # white space at its end is none of a step
    tokens = last_tokens(template, response.tokens, ends)
    steps = tuple(Step(text, token, label) for text, token, label in zip(texts, tokens, labels, strict=True))
    return Comparison(Group(given, (response,)), (float(all(label != 0 for label in labels)),), "process", steps=steps)


def _step_label(value: Any) -> float | None:
    if value not in (None, 0, 1):
        raise DataError(f"expected 1, 0 or null, got {value!r}", where="labels", fix="write 1 (right), 0 (wrong) or null (neutral)")
    return None if value is None else float(value)


def _shared_prompt(columns: Columns, template: Template, rest: dict[str, Any]) -> tuple[Prompt, list[str | tuple[Message, ...]]]:
    """The turns two conversations begin with, and what each answers."""
    if isinstance(columns["chosen"], str) or isinstance(columns["rejected"], str):
        fix = "add a prompt column, or name it with data.fields={prompt: its_name}"
        raise DataError("there is no prompt, and text alone does not show where the answer begins", where="chosen, rejected", fix=fix)
    conversations = []
    for name in ("chosen", "rejected"):
        with _in(name):
            conversations.append(turns_of(columns[name]))
    shared = 0
    for one, other in zip(*conversations, strict=False):
        if one != other:
            break
        shared += 1
    answers = [conversation[shared:] for conversation in conversations]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer or answer[0]["role"] != "assistant":
            what = "the two conversations do not part at an assistant turn" if answer else "it is the beginning of the other conversation"
            raise DataError(what, where=name, fix="give the prompt in a column of its own, or remove the row")
    with _in("chosen"):
        return template.prompt(conversations[0][:shared], rest), [*answers]


def _after(prompt: Prompt, value: Any, name: str) -> str | tuple[Message, ...]:
    """An answer that may repeat the prompt's turns before it."""
    if isinstance(value, str):
        return value
    with _in(name):
        turns = turns_of(value)
        given = ({"role": "user", "content": prompt.text},) if isinstance(prompt.text, str) else tuple(prompt.text)
        if turns[0]["role"] == "assistant":
            return turns
        if turns[: len(given)] != given or len(turns) == len(given):
            raise DataError(
                "the conversation is not the prompt and an answer", fix="begin it with the answer, or with the same turns as the prompt"
            )
        return turns[len(given) :]


def _ranking(columns: Columns, count: int) -> tuple[float, ...]:
    """How many other responses each one beats."""
    if count < 2:
        raise DataError("a ranking needs at least two responses", where="responses", fix="remove the row")
    if "ranks" in columns:
        better = [-rank for rank in columns.numbers("ranks", count)]
    else:
        better = columns.numbers("scores", count) if "scores" in columns else [-float(place) for place in range(count)]
    return tuple(float(sum(value > other for other in better)) for value in better)


def _prompt(columns: Columns, template: Template, rest: dict[str, Any]) -> Prompt:
    with _in("prompt"):
        return template.prompt(columns["prompt"], rest)


def _response(template: Template, prompt: Prompt, answer: Any, truncated: bool, name: str) -> Response:
    with _in(name):
        return template.response(prompt, answer, truncated)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise DataError("expected text", fix="write a string that is not empty")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"expected a finite number, got {value!r}", where=name, fix="write a number")
    return float(value)


@contextmanager
def _in(name: str) -> Iterator[None]:
    """Name the column in an error that does not yet."""
    try:
        yield
    except DataError as error:
        if error.where is None:
            raise DataError(error.what, where=name, fix=error.fix) from None
        raise
