"""What text becomes: exact tokens, exact masks, and back."""

from __future__ import annotations

import subprocess
import sys
from itertools import groupby
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from small_tokenizers import CHATML, byte_level, metaspace

from trimtab.data.templates import Template
from trimtab.errors import DataError, ModelError
from trimtab.types import Message

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=20)
QUESTION: list[Message] = [{"role": "user", "content": "hello"}]
TALK: list[Message] = [
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "answer"},
]


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def rendered(tokenizer: Any, turns: list[Message]) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def raw(tokenizer: Any, tokens: Any) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


# chat


@given(question=TEXTS, answer=TEXTS)
@example(question="hello", answer="\n\nthe answer")  # merges with the newline of the header
@example(question="", answer="")
def test_prompt_and_response_are_the_templated_conversation(chatml: Any, question: str, answer: str) -> None:
    template = Template.of(chatml)
    prompt = template.prompt(question)
    response = template.response(prompt, answer)
    whole = rendered(chatml, [{"role": "user", "content": question}, said(answer)])
    assert raw(chatml, prompt.tokens + response.tokens) + "\n" == whole
    assert response.tokens[-1] == chatml.convert_tokens_to_ids("<|im_end|>")
    assert response.text == answer
    assert response.mask is None


def test_tokens_are_those_of_the_whole_where_nothing_merges(chatml: Any) -> None:
    template = Template.of(chatml)
    prompt = template.prompt(QUESTION)
    response = template.response(prompt, "the answer")
    whole = chatml(rendered(chatml, [*QUESTION, said("the answer")]), add_special_tokens=False)["input_ids"]
    assert list(prompt.tokens + response.tokens) == whole[:-1]  # without the newline after the end of turn


def test_the_prompt_is_encoded_alone_where_the_answer_would_merge_into_it(chatml: Any) -> None:
    template = Template.of(chatml)
    prompt = template.prompt(QUESTION)
    response = template.response(prompt, "\n\n\nanswer")
    whole = chatml(rendered(chatml, [*QUESTION, said("\n\n\nanswer")]), add_special_tokens=False)["input_ids"]
    assert list(prompt.tokens + response.tokens) != whole[:-1]
    assert raw(chatml, prompt.tokens + response.tokens) == raw(chatml, whole[:-1])


def test_a_text_is_one_user_turn_and_the_default_system_turn_is_kept(chatml: Any) -> None:
    template = Template.of(chatml)
    assert template.prompt("hello").tokens == template.prompt(QUESTION).tokens
    assert raw(chatml, template.prompt("hello").tokens).startswith("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nhello")


@given(answer=TEXTS.filter(bool))
def test_a_truncated_answer_is_the_answer_without_its_end(chatml: Any, answer: str) -> None:
    template = Template.of(chatml)
    prompt = template.prompt("hello")
    whole, cut = template.response(prompt, answer), template.response(prompt, answer, truncated=True)
    assert cut.truncated
    assert cut.tokens == whole.tokens[:-1]


def test_the_mask_is_true_on_what_the_assistant_says_and_nowhere_else(chatml: Any) -> None:
    template = Template.of(chatml)
    prompt = template.prompt(QUESTION)
    response = template.response(prompt, TALK)
    assert response.mask is not None
    parts = [
        (own, raw(chatml, [t for t, _ in run])) for own, run in groupby(zip(response.tokens, response.mask, strict=True), lambda x: x[1])
    ]
    between = "\n<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"
    assert parts == [(True, "the answer<|im_end|>"), (False, between), (True, "answer<|im_end|>")]
    assert raw(chatml, prompt.tokens + response.tokens) + "\n" == rendered(chatml, [*QUESTION, *TALK])


def test_of_several_turns_only_the_last_is_truncated(chatml: Any) -> None:
    template = Template.of(chatml)
    prompt = template.prompt(QUESTION)
    whole, cut = template.response(prompt, TALK), template.response(prompt, TALK, truncated=True)
    assert whole.mask is not None
    assert (cut.tokens, cut.mask) == (whole.tokens[:-1], whole.mask[:-1])
    with pytest.raises(DataError, match="truncated answer is empty"):
        template.response(prompt, [*TALK[:2], said("")], truncated=True)


def test_a_template_that_changes_earlier_turns_is_refused_for_several_turns() -> None:
    forgetful = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split()[-1] }}")
    template = Template.of(byte_level(forgetful))
    prompt = template.prompt("hello")
    assert template.response(prompt, "the answer").text == "the answer"
    with pytest.raises(DataError, match=r"otherwise once the answer follows(.|\n)*turns=last"):
        template.response(prompt, TALK)


def test_a_template_that_closes_with_a_space_and_an_end_token() -> None:
    llama = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
    )
    template = Template.of(byte_level(llama, eos="</s>", bos_token="<s>"))
    prompt = template.prompt("hello")
    assert raw(template.tokenizer, template.response(prompt, "answer").tokens) == " answer </s>"
    assert raw(template.tokenizer, template.response(prompt, "answer", truncated=True).tokens) == " answer"


def test_a_template_without_an_end_of_turn_is_ended_by_eos() -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    template = Template.of(byte_level(bare))
    assert raw(template.tokenizer, template.response(template.prompt("hello"), "answer").tokens) == "answer<|im_end|>"


def test_the_end_of_turn_ends_answers_even_if_it_is_not_eos() -> None:
    tokenizer = byte_level(CHATML, eos="<|endoftext|>")
    template = Template.of(tokenizer, extra_eos=[4])
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert template.eos_ids == {end, eos, 4}
    assert template.response(template.prompt("hello"), "answer").tokens[-1] == end


def test_what_the_template_refuses_is_said() -> None:
    picky = CHATML + "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    with pytest.raises(DataError, match="no system turns"):
        Template.of(byte_level(picky)).prompt([{"role": "system", "content": "x"}, *QUESTION])


# plain


@given(question=TEXTS, answer=TEXTS)
@example(question="the", answer="\n\n\n")
@example(question="the\n", answer="\n\nanswer")
@example(question="", answer="the")
def test_plain_text_is_the_prompt_then_the_answer_then_eos(plain: Any, question: str, answer: str) -> None:
    template = Template.of(plain)
    prompt = template.prompt(question)
    response = template.response(prompt, answer)
    start = "" if question else "<|endoftext|>"  # there is no BOS: an empty prompt is EOS
    assert raw(plain, prompt.tokens + response.tokens) == f"{start}{question}{answer}<|endoftext|>"
    assert response.text == answer


@given(st.text("ab \n", max_size=8), st.text("ab \n", max_size=8))
@example("", " ab")
@example("a", "b")
def test_sentencepiece_spaces_survive_both_ways(question: str, answer: str) -> None:
    template = Template.of(metaspace())
    prompt = template.prompt(question)
    response = template.response(prompt, answer)
    assert prompt.tokens[0] == 1  # an empty prompt is BOS
    assert raw(template.tokenizer, prompt.tokens[1:] + response.tokens[:-1]).lstrip(" ") == (question + answer).lstrip(" ")
    assert template.response(prompt, response.text).tokens == response.tokens


def test_bos_is_kept_and_eos_is_not_put_behind_a_prompt() -> None:
    template = Template.of(byte_level(eos="</s>", bos_token="<s>", around="<s> $A </s>"))
    prompt = template.prompt("hello")
    response = template.response(prompt, " there")
    assert raw(template.tokenizer, prompt.tokens) == "<s>hello"
    assert raw(template.tokenizer, response.tokens) == " there</s>"
    assert template.prompt("<s>hello").tokens == prompt.tokens
    assert raw(template.tokenizer, template.prompt("").tokens) == "<s>"


def test_turns_are_written_as_lines_and_answered_after_a_space(plain: Any) -> None:
    template = Template.of(plain)
    prompt = template.prompt([{"role": "system", "content": "Be kind"}, *QUESTION])
    assert raw(plain, prompt.tokens) == "system: Be kind\nuser: hello\nassistant:"
    response = template.response(prompt, "answer")
    assert response.text == " answer"
    assert template.response(prompt, response.text) == response
    with pytest.raises(DataError, match="needs a chat template"):
        template.response(prompt, TALK)


def test_an_answer_that_brings_its_own_eos_is_not_ended_twice(plain: Any) -> None:
    template = Template.of(plain)
    prompt = template.prompt("hello")
    assert template.response(prompt, "answer<|endoftext|>") == template.response(prompt, "answer")


# both


def test_auto_is_chat_where_there_is_a_chat_template(chatml: Any, plain: Any) -> None:
    assert Template.of(chatml).mode == "chat"
    assert Template.of(chatml, "plain").mode == Template.of(plain).mode == "plain"
    with pytest.raises(ModelError, match=r"no chat template(.|\n)*fix: use template plain"):
        Template.of(plain, "chat")


def test_the_padding_token_changes_nothing(chatml: Any) -> None:
    other = byte_level(CHATML)
    other.pad_token = "<|endoftext|>"
    assert chatml.pad_token_id == chatml.eos_token_id != other.pad_token_id
    one, two = Template.of(chatml), Template.of(other)
    assert one.response(one.prompt("hello"), TALK) == two.response(two.prompt("hello"), TALK)
    assert one.eos_ids == two.eos_ids


@pytest.mark.parametrize(
    ("answer", "truncated", "message"),
    [
        ("the<|im_end|> answer", False, "end token"),
        ("the answer<|im_end|>", True, "end token"),
        ("", True, "truncated answer is empty"),
        ("\ud800", False, "not valid Unicode"),
        ([], False, "list of chat turns is empty"),
        ([*TALK, *QUESTION], False, "begins and ends with an assistant turn"),
        ([{"role": "gpt", "content": "x"}], False, "unknown role 'gpt'"),
        ([{"role": "assistant", "content": None}], False, "turn 1 is not"),
        (7, False, "got int"),
    ],
)
@pytest.mark.parametrize("mode", ["chat", "plain"])
def test_answers_that_cannot_be_used(chatml: Any, mode: Any, answer: Any, truncated: bool, message: str) -> None:
    template = Template.of(chatml, mode)
    with pytest.raises(DataError, match=message):
        template.response(template.prompt("hello"), answer, truncated)


def test_a_prompt_does_not_end_with_the_assistant(chatml: Any) -> None:
    with pytest.raises(DataError, match="ends with an assistant turn"):
        Template.of(chatml).prompt([*QUESTION, said("answer")])


def test_without_any_end_token_there_is_an_error() -> None:
    with pytest.raises(ModelError, match="no token ends an answer"):
        Template.of(byte_level(eos=None))
    assert Template.of(byte_level(eos=None), extra_eos=[2]).end_id == 2


def test_the_fingerprint_tells_encodings_apart(tmp_path: Any, chatml: Any, plain: Any) -> None:
    from transformers import AutoTokenizer

    chatml.save_pretrained(tmp_path)
    saved = Template.of(AutoTokenizer.from_pretrained(tmp_path), extra_eos=[0])
    assert saved.fingerprint == Template.of(chatml).fingerprint
    others = [Template.of(chatml, "plain"), Template.of(plain), Template.of(byte_level(CHATML + " ")), Template.of(metaspace())]
    assert len({t.fingerprint for t in [saved, *others]}) == 5


def test_importing_the_data_package_stays_light() -> None:
    heavy = ("transformers", "datasets", "pyarrow")
    code = f"import sys, trimtab.data.records, trimtab.data.cursor; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
