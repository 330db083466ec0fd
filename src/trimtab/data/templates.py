"""From text or chat turns to tokens, and back.

A prompt's tokens are fixed first; an answer's tokens continue them. Where a tokenizer would merge characters across that
border ("\\n" of the header with "\\n" of the answer), the two are encoded apart, because that is what a policy generates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import DataError, ModelError
from trimtab.types import Message, Prompt, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mode = Literal["auto", "chat", "plain"]

ROLES = ("system", "user", "assistant", "tool")
PROBE = "probe7answer"  # an answer no template contains, to see what a template puts after an answer


@dataclass(frozen=True, eq=False)
class Template:
    """A tokenizer and the way conversations are written for it. Make one with `Template.of`.

    mode:    "chat" renders the tokenizer's chat template; "plain" takes a prompt as it is, and writes chat turns as
             "role: content" lines that end in "assistant:".
    end_id:  the token that ends every answer: the chat template's end of turn, or EOS.
    closing: what the chat template writes after an answer up to and including the end of turn ("<|im_end|>").
    tail:    what it writes after that ("\\n"); never part of a response.
    start:   the tokens a plain prompt begins with (BOS, where the tokenizer adds one).
    eos_ids: every token that ends a response when it is sampled.
    """

    tokenizer: PreTrainedTokenizerBase
    mode: Literal["chat", "plain"]
    end_id: int
    closing: str
    tail: str
    start: tuple[int, ...]
    eos_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, mode: Mode = "auto", extra_eos: Iterable[int] = ()) -> Template:
        """The template of a tokenizer; "auto" is "chat" if the tokenizer has a chat template.

        extra_eos: further tokens that end a response, such as those of a model's generation config.

        Raises ModelError if there is no chat template to render, or no token that could end an answer.
        """
        chat = bool(tokenizer.chat_template)
        if mode == "chat" and not chat:
            fix = "use template plain, or a model that was trained on conversations"
            raise ModelError("the tokenizer has no chat template", where=_name(tokenizer), fix=fix)
        ends = ([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]) + list(extra_eos)
        closing, tail = _after_answer(tokenizer) if chat and mode != "plain" else ("", "")
        if closing:
            ends.insert(0, _special_ids(tokenizer, closing)[0])
        if not ends:
            fix = "set eos_token in the model's tokenizer_config.json"
            raise ModelError("no token ends an answer: the tokenizer has no EOS", where=_name(tokenizer), fix=fix)
        resolved: Literal["chat", "plain"] = "chat" if chat and mode != "plain" else "plain"
        return cls(tokenizer, resolved, ends[0], closing, tail, _start(tokenizer), frozenset(ends))

    def prompt(self, text: str | Sequence[Message], row: Mapping[str, Any] | None = None) -> Prompt:
        """Encode what the policy is given: plain text (in chat mode one user turn), or chat turns.

        An empty plain prompt becomes BOS, or EOS if there is no BOS. `row` travels with the prompt.

        Raises DataError if the turns are not valid or end with the assistant, or if the template refuses them.
        """
        given = text if isinstance(text, str) else turns_of(text)
        if not isinstance(given, str) and given[-1]["role"] == "assistant":
            raise DataError("the prompt ends with an assistant turn", fix="move that turn to the answer")
        tokens = self._encode(self._written(given)) or [self._empty()]
        return Prompt(tuple(tokens), given, {} if row is None else row)

    def response(self, prompt: Prompt, answer: str | Sequence[Message], truncated: bool = False) -> Response:
        """Encode an answer to a prompt: its tokens, then the end of turn (or EOS) unless it was truncated.

        In plain mode the answer follows the prompt's text as it is; after a prompt made of turns a space is put between.
        An answer may be several turns (assistant, user, assistant, ...): then `Response.mask` is True exactly on what the
        assistant says, its ends of turn included.

        Raises DataError if the whole conversation, templated at once, is not the prompt followed by this answer (some
        templates change earlier turns), or if the answer contains an end token.
        """
        turns = turns_of([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)
        if turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
            raise DataError("an answer begins and ends with an assistant turn", fix="put the turns before it in the prompt")
        before = self._written(prompt.text)
        tokens, mask = list(prompt.tokens), list[bool]()
        spans = self._spans(prompt.text, before, turns, truncated)
        for i, (text, own) in enumerate(spans):
            new = self._continue(tokens, before, text)
            if own:
                new = self._ended(new, last=i == len(spans) - 1, truncated=truncated)
            before += text
            tokens += new
            mask += [own] * len(new)
        new = tokens[len(prompt.tokens) :]
        return Response(tuple(new), self.decode(new), truncated, None if all(mask) else tuple(mask))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a response's tokens, special tokens left out."""
        # many decoders drop the first token's space: it is part of an answer, so decode behind an anchor
        text, lead = self._decoded([*self._anchor, *tokens], skip_special_tokens=True), self._lead
        return text[len(lead) :] if text.startswith(lead) else self._decoded(tokens, skip_special_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the encoding: two templates with the same one give the same tokens."""
        parts = [sorted(self.tokenizer.get_vocab().items()), sorted(_special_tokens(self.tokenizer).items())]
        text = json.dumps([*parts, self.tokenizer.chat_template, self.mode], sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def _empty(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.end_id if bos is None else int(bos)

    def _written(self, text: str | Sequence[Message]) -> str:
        """A prompt as the one string that is encoded."""
        if self.mode == "chat":
            return self._render(_as_turns(text), generate=True)
        if isinstance(text, str):
            return text
        return "".join(f"{turn['role']}: {turn['content']}\n" for turn in text) + "assistant:"

    def _spans(self, prompt: str | Sequence[Message], before: str, answer: Sequence[Message], truncated: bool) -> list[tuple[str, bool]]:
        """What follows the prompt (written as `before`), cut into (text, whether the assistant says it)."""
        if self.mode == "plain":
            if len(answer) > 1:
                fix = "use data.turns=last, or a model with a chat template"
                raise DataError("an answer of several turns needs a chat template", fix=fix)
            content = answer[0]["content"]
            spaced = isinstance(prompt, str) or content[:1].isspace()
            return [(content if spaced else f" {content}", True)]
        given, text, spans = _as_turns(prompt), before, list[tuple[str, bool]]()
        for i, turn in enumerate(answer):
            if turn["role"] != "assistant":
                continue
            opened = self._render([*given, *answer[:i]], generate=True) if i else text
            whole = self._render([*given, *answer[: i + 1]], generate=False)
            end = self.closing + self.tail
            if not (opened.startswith(text) and whole.startswith(opened) and whole.endswith(end)):
                fix = "use data.turns=last, or a chat template that keeps earlier turns as they were"
                raise DataError("the chat template writes the conversation otherwise once the answer follows", fix=fix)
            if opened != text:
                spans.append((opened[len(text) :], False))
            said = whole[len(opened) : len(whole) - len(end)]
            last = i == len(answer) - 1
            spans.append((said if truncated and last else said + self.closing, True))
            text = opened + spans[-1][0]
        return spans

    def _ended(self, tokens: list[int], *, last: bool, truncated: bool) -> list[int]:
        """What the assistant says in one turn, with an end token at its end and nowhere else."""
        cut = last and truncated
        if cut and not tokens:
            raise DataError("a truncated answer is empty", fix="remove the row, or the mark that it was truncated")
        body = tokens[:-1] if not cut and tokens and tokens[-1] in self.eos_ids else tokens
        if not self.eos_ids.isdisjoint(body):
            raise DataError("the answer contains an end token in its text", fix="remove the token from the text, or the row")
        # a plain answer needs EOS unless its text brought it, and so does a template without an end of turn
        return [*tokens, self.end_id] if last and not truncated and body is tokens else tokens

    def _continue(self, tokens: list[int], before: str, text: str) -> list[int]:
        """The tokens of `text` when `before`, already encoded as `tokens`, stands before it."""
        if not before:
            # sentencepiece begins a text with a space of its own: one that was decoded must not become two
            return self._ids(text[1:] if text.startswith(" ") and self.decode(self._ids("a")) == " a" else text)
        whole = self._encode(before + text)
        if whole[: len(tokens)] == tokens:
            return whole[len(tokens) :]
        # the whole merges across the border; sentencepiece needs the anchor, or it would put a space before the text
        wanted = self._decoded(whole)
        for apart in (self._ids(text), self._anchored(text)):
            if self._decoded([*tokens, *apart]) == wanted:
                return apart
        raise DataError("prompt and answer, encoded apart, are another text than together", fix="use a tokenizer that keeps all characters")

    def _encode(self, text: str) -> list[int]:
        ids = self._ids(text) if text else []
        if self.mode == "chat" or tuple(ids[: len(self.start)]) == self.start:
            return ids
        return [*self.start, *ids]

    def _ids(self, text: str) -> list[int]:
        return _ids(self.tokenizer, text)

    @cached_property
    def _anchor(self) -> list[int]:
        return self._ids("\n")

    @cached_property
    def _lead(self) -> str:
        return self._decoded(self._anchor, skip_special_tokens=True)

    def _anchored(self, text: str) -> list[int]:
        ids = self._ids("\n" + text)
        return ids[len(self._anchor) :] if ids[: len(self._anchor)] == self._anchor else self._ids(text)

    def _decoded(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        options: dict[str, bool] = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(tokens), **options))

    def _render(self, turns: Sequence[Message], *, generate: bool) -> str:
        return _render(self.tokenizer, turns, generate=generate)


def turns_of(value: object) -> tuple[Message, ...]:
    """Check chat turns: a list of {"role", "content"} mappings with known roles. Raises DataError naming the turn."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(
            f"expected text or a list of chat turns, got {type(value).__name__}", fix='write a string, or [{"role": ..., "content": ...}]'
        )
    if not value:
        raise DataError("the list of chat turns is empty", fix="give at least one turn")
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise DataError(f"turn {i + 1} is not {{role, content}} with text in both", fix='write {"role": "user", "content": "..."}')
        if turn["role"] not in ROLES:
            raise DataError(f"turn {i + 1} has the unknown role {turn['role']!r}", fix=f"roles are {', '.join(ROLES)}")
    # tables fill absent fields with None
    return tuple({key: field for key, field in turn.items() if field is not None} for turn in value)


def _as_turns(text: str | Sequence[Message]) -> Sequence[Message]:
    return [{"role": "user", "content": text}] if isinstance(text, str) else text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except TypeError:  # what tokenizers says of half a surrogate pair
        raise DataError("the text is not valid Unicode", fix="remove the lone surrogates (\\ud800 to \\udfff)") from None


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], *, generate: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template([dict(turn) for turn in turns], add_generation_prompt=generate, tokenize=False))
    except TemplateError as error:
        fix = "change the turns to what the model was trained on (order of roles, system turns)"
        raise DataError(f"the chat template refuses the conversation: {error}", fix=fix) from None


def _after_answer(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes after an answer: (up to and including the end of turn, the rest).

    The end of turn is the first special token there; if there is none, the answer is ended by EOS alone.
    """
    probe: list[Message] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": PROBE}]
    _, found, after = _render(tokenizer, probe, generate=False).rpartition(PROBE)
    if not found:
        fix = "use template plain, or repair chat_template in the model's folder"
        raise ModelError("the chat template does not write what the assistant says", where=_name(tokenizer), fix=fix)
    special = _special_ids(tokenizer, after)
    if not special:
        return "", after
    end = str(tokenizer.convert_ids_to_tokens(special[0]))
    position = after.index(end) + len(end)
    return after[:position], after[position:]


def _special_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The special and added tokens in a text, in order."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [token for token in _ids(tokenizer, text) if token in special]


def _start(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens the tokenizer puts before a text. What it puts after (EOS) is left out: a prompt has not ended."""
    bare, full = _ids(tokenizer, "a"), list(tokenizer("a", verbose=False)["input_ids"])
    return next((tuple(full[:i]) for i in range(len(full)) if full[i : i + len(bare)] == bare), ())


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items()}


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)
