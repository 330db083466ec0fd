"""Every line of docs/textbook.md runs, in the order of the page, in one folder, on tiny models and data under the names the page uses."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny
from trimtab.cli import main
from trimtab.cli.commands import COMMANDS, TOOLS, config_of
from trimtab.config import settings_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "textbook.md"
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = {
    "steps": 2, "prompts_per_step": 2, "responses_per_prompt": 2, "fit.steps": 2, "fit.batch_size": 4, "sampling.max_tokens": 6,
    "prompts_per_round": 3, "model.dtype": "float32", "ppo_steps": 1, "prompts": 8, "held_out": 4, "max_tokens": 6, "reward_layers": 1,
    "best_of": 2,
}  # fmt: skip
"""What the test sets where the command has it and the page does not say it."""
SLOW = ("exact",)
"""Commands of the page that cannot be made short: `make test-slow` runs them."""
WORDS = ["sea", "sky", "cat", "sun", "tea", "day", "fog", "hat"]


@dataclass(frozen=True)
class Piece:
    """A line of shell, or a block of Python; `file` is where the page says it is to be put."""

    language: str
    text: str
    file: str | None = None

    @property
    def command(self) -> str | None:
        return shlex.split(self.text)[1] if self.language == "sh" else None


def pieces() -> list[Piece]:
    found = []
    for language, file, text in BLOCK.findall(PAGE.read_text()):
        parts = [line for line in text.splitlines() if line] if language == "sh" else [text]
        found += [Piece(language, part, file or None) for part in parts]
    return found


def rows(path: str, *lines: dict[str, Any]) -> None:
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_files() -> None:
    """The model and the data the page says its reader has."""
    tiny.folder(Path("my_model"), max_position_embeddings=1024)
    texts = [f" {word} {i}." for i, word in enumerate(WORDS)]
    rows("my_prompts.jsonl", *({"prompt": f"The {word}"} for word in WORDS))
    rows("my_held_out_prompts.jsonl", *({"prompt": f"A {word}"} for word in WORDS[:4]))
    rows("my_questions.jsonl", *({"prompt": f"{i}+{i}=", "answer": 2 * i} for i in range(4)))
    rows("my_answers.jsonl", *({"prompt": f"The {word}", "completion": text} for word, text in zip(WORDS, texts, strict=True)))
    pairs = zip(WORDS * 2, texts * 2, strict=True)
    choices = (
        {"prompt": f"{i} {w}", "chosen": t, "rejected": " no" + "!" * (i % 5), "source": "ab"[i % 2]} for i, (w, t) in enumerate(pairs)
    )
    rows("my_choices.jsonl", *choices)
    rows("my_rankings.jsonl", *({"prompt": f"The {word}", "responses": texts[:4]} for word in WORDS))
    rows("my_ratings.jsonl", *({"prompt": f"The {word}", "responses": texts[:3], "scores": [4, 2, 1]} for word in WORDS))
    rows("my_labels.jsonl", *({"prompt": f"The {w}", "completion": texts[i], "label": i % 2 == 0} for i, w in enumerate(WORDS)))
    rows("my_steps.jsonl", *({"prompt": f"The {word}", "steps": ["one", "two"], "labels": [1, i % 2]} for i, word in enumerate(WORDS)))


def shortened(words: list[str]) -> list[str]:
    """The arguments of a command, with whatever makes it short."""
    name = words[0]
    if name not in COMMANDS:
        return words
    known = {dotted for dotted, _ in settings_of(config_of(name))}
    said = {word.partition("=")[0] for word in words}
    return [*words, *(f"{key}={value}" for key, value in SMALL.items() if key in known - said)]


def run(piece: Piece) -> None:
    if piece.file is not None:
        Path(piece.file).write_text(piece.text)
    elif piece.language == "python":
        exec(compile(piece.text, str(PAGE), "exec"), {"__name__": "__main__"})
    else:
        program, *words = shlex.split(piece.text)
        assert program == "trimtab"
        assert main(shortened(words)) == 0, piece.text


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "TQDM_DISABLE", "1")
    write_files()
    return tmp_path


def test_every_line_runs_in_the_order_of_the_page(place: Path) -> None:
    missing = []
    for piece in pieces():
        if piece.command is not None and piece.command not in {**COMMANDS, **TOOLS}:
            missing.append(piece.command)
        elif piece.command not in SLOW:
            run(piece)
    if missing:
        pytest.skip(f"all other lines ran; there is no command {', '.join(missing)} yet")


@pytest.mark.slow
@pytest.mark.parametrize("piece", [piece for piece in pieces() if piece.command in SLOW], ids=lambda piece: piece.text)
def test_every_long_line_runs(piece: Piece, place: Path) -> None:
    if piece.command not in {**COMMANDS, **TOOLS}:
        pytest.skip(f"there is no command {piece.command} yet")
    run(piece)


def test_the_page_has_lines_of_both_kinds_and_nothing_else() -> None:
    assert {piece.language for piece in pieces()} == {"sh", "python"}
    assert PAGE.read_text().count("```") == 2 * len(BLOCK.findall(PAGE.read_text()))
    assert sum(piece.language == "sh" for piece in pieces()) >= 40


def test_links_within_the_page_lead_somewhere() -> None:
    text = PAGE.read_text()
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)$", text, re.MULTILINE)}
    assert set(re.findall(r"\(#([\w-]+)\)", text)) <= anchors
