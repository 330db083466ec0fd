"""The report is one self-contained page that says what the files say, whatever text a model produced."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import RunError
from trimtab.runs.directory import RunDirectory
from trimtab.runs.report import number, samples_section, step_time, write_report


def run(path: Path, steps: int = 5, response: str = "fine", extra: dict[str, float] | None = None, **settings: object) -> Path:
    with RunDirectory.create(path, "seed: 1\nmodel: {path: tiny}\n" + "".join(f"{k}: {v}\n" for k, v in settings.items())) as directory:
        directory.event("started", stage="ppo")
        for step in range(steps):
            directory.log(
                step,
                {
                    "reward/mean": step * 0.1, "kl/mean": step * 0.5, "odd/name": 1.0, "bare": step**2,
                    "time/generate": 1.0, "time/update": 2.0, "time/step": 3.5,
                    "eval/accuracy": 0.6 + step / 100, "eval/accuracy_low": 0.5, "eval/accuracy_high": 0.7, **(extra or {}),
                },
            )  # fmt: skip
            rows = [{"prompt": "a prompt", "response": response, "reward": 0.5, "parts": {}, "kl": 0.1, "tokens": 3, "truncated": False}]
            directory.samples(step, rows)
    return path


def page(*runs: Path) -> str:
    return write_report(runs, runs[0] / "report.html").read_text(encoding="utf-8")


class Balanced(HTMLParser):
    """Fails at a tag that is not closed, or closed twice."""

    void = frozenset({"meta", "br", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def test_one_page_without_anything_from_outside(tmp_path: Path) -> None:
    html = page(run(tmp_path / "run"))
    assert not re.search("https?:|//[a-z]", html)
    assert not re.search(r"@import|<script|<link|<img|<iframe|url\((?!#)|src=", html)
    for words in ("Reward against KL", "Samples before and after", "Time of a step", "odd/name", "Bare", "Recipe", "seed: 1"):
        assert words in html


def test_the_page_is_well_formed_and_no_two_of_its_ids_differ_in_meaning(tmp_path: Path) -> None:
    html = page(run(tmp_path / "run"))
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    meanings: dict[str, set[str]] = {}
    for name, rest in re.findall(r'<(?:path|clipPath) id="([^"]+)"(.*?)(?:/>|</clipPath>)', html, flags=re.DOTALL):
        meanings.setdefault(name, set()).add(rest)
    assert meanings
    assert all(len(rests) == 1 for rests in meanings.values())


def test_charts_take_every_colour_from_the_page(tmp_path: Path) -> None:
    charts = "".join(re.findall(r"<svg.*?</svg>", page(run(tmp_path / "run")), flags=re.DOTALL))
    assert "var(--series-0)" in charts
    assert not re.search(r"(fill|stroke): #", charts)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "</div></pre><svg onload=x>", "{{ 7 * 7 }}", "a $x^2 y_{$ b", "\ud800"])
def test_text_of_a_model_cannot_become_markup(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run"
    run(path, response=text, extra={f"reward/{text.replace('/', '')}": 1.0}, note=repr(text))
    html = page(path)
    assert "<script" not in html
    assert "onload=x>" not in html
    assert "49" not in re.findall(r'<div class="text">(.*?)</div>', html)
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []


def test_names_of_runs_cannot_become_markup_or_mathematics(tmp_path: Path) -> None:
    html = page(run(tmp_path / "<b>$a_$"), run(tmp_path / "次"))
    assert "<b>$" not in html
    assert "&lt;b&gt;$a_$" in html
    assert "次" in html


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    run(tmp_path / "run")
    assert page(tmp_path / "run") == page(tmp_path / "run")


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_no_or_one_step_still_has_a_page(tmp_path: Path, steps: int) -> None:
    html = page(run(tmp_path / "run", steps))
    assert ("0 steps", "1 step")[steps] in html
    assert ("odd/name" in html) == bool(steps)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-12, 1e12, -3.0])
def test_numbers_of_any_size_and_none_are_drawn(tmp_path: Path, value: float) -> None:
    path = run(tmp_path / "run", extra={"policy/loss": value})
    with RunDirectory.create(tmp_path / "other", "{}") as directory:
        for step in range(200):
            directory.log(step, {"policy/loss": value * step, "policy/grad_norm": value if step % 2 else 1.0})
    assert page(path, tmp_path / "other")


def test_metrics_that_explain_each_other_share_a_chart_and_constants_need_none(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", "{}") as directory:
        for step in range(5):
            directory.log(step, {"reward/chosen": step, "reward/rejected": -step, "optim/lr": 1e-5})
    html = page(tmp_path / "run")
    assert html.count("<svg") == 1
    assert {">chosen</text>", ">rejected</text>"} <= set(re.findall(r">\w+</text>", html))
    assert "optim/lr <b>1e−5</b>" in html


def test_an_evaluation_is_drawn_as_points_with_intervals(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", "{}") as directory:
        numbers = {"kl": 1.0, "reward": 0.5, "reward_low": 0.4, "reward_high": 0.6}
        directory.log(0, {f"{model}/{name}": value for model in ("against", "model") for name, value in numbers.items()})
    html = page(tmp_path / "run")
    assert "Reward against KL" in html
    assert ">against</text>" in html


def test_a_run_that_did_not_end_well_says_so_first(tmp_path: Path) -> None:
    def train(error: BaseException) -> None:
        with RunDirectory.create(tmp_path / type(error).__name__, "{}") as directory:
            directory.log(0, {"loss": 1.0})
            raise error

    for error, words in ((KeyboardInterrupt(), "was interrupted"), (RuntimeError("<boom>"), "failed. RuntimeError: &lt;boom&gt;")):
        with pytest.raises(type(error)):
            train(error)
        assert words in page(tmp_path / type(error).__name__)
    finished = run(tmp_path / "run")
    assert 'class="alarm"' not in page(finished)
    events = finished / "events.jsonl"
    events.write_text("".join(events.read_text().splitlines(keepends=True)[:-1]))
    assert "has not finished" in page(finished)


def test_samples_are_matched_by_prompt_or_shown_from_both_ends() -> None:
    def row(step: int, prompt: str) -> dict[str, Any]:
        return {"step": step, "prompt": prompt, "response": f"{prompt}{step}", "reward": 1.0, "kl": 0.0}

    (section,) = samples_section([row(0, "a"), row(0, "b"), row(3, "b"), row(7, "a"), row(9, "c")])
    assert [[answer["text"] for answer in sample["answers"]] for sample in section.samples] == [["a0", "a7"], ["b0", "b3"]]
    (section,) = samples_section([row(0, "a"), row(9, "c")])
    assert [[answer["text"] for answer in sample["answers"]] for sample in section.samples] == [["a0"], ["c9"]]
    assert samples_section([]) == []


def test_several_runs_show_final_values_and_the_settings_that_differ(tmp_path: Path) -> None:
    html = page(run(tmp_path / "first", lr=1, output="a"), run(tmp_path / "second", steps=3, lr=2, output="b", only="here"))
    differing = html[html.index("Settings that differ") : html.index("</table>", html.index("Settings that differ"))]
    assert "<td>lr</td><td>1</td><td>2</td>" in differing
    assert "<td>only</td><td>–</td><td>here</td>" in differing
    assert "seed" not in differing
    assert "output" not in differing
    assert "<td>reward/mean</td><td>0.4</td><td>0.2</td>" in html
    assert "var(--series-1)" in html


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    html = page(run(tmp_path / "a" / "ppo"), run(tmp_path / "b" / "ppo"))
    assert "a/ppo" in html
    assert "b/ppo" in html


def test_numbers_are_short_and_keep_their_digits() -> None:
    shown = {0: "0", 1.0: "1", 0.30000000000000004: "0.3", 0.0021491: "0.002149", -1234.5678: "−1,235", 3e-5: "3e−5", 2_500_000.0: "2.5e6"}
    assert {value: number(value) for value in shown} == shown
    assert number(None) == "–"


def test_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run directory"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(RunError, match="no run was named"):
        write_report([], tmp_path / "report.html")


def test_the_split_of_a_step_adds_up_and_what_went_on_beside_it_is_told_apart(tmp_path: Path) -> None:
    path = run(tmp_path / "run", extra={"time/beside/generate": 2.5, "time/wait": 0.25})
    split, whole, beside = step_time(RunDirectory.open(path).metrics())
    assert split == pytest.approx({"generate": 1.0, "update": 2.0, "wait": 0.25, "other": 0.25})
    assert whole == 3.5 == sum(split.values())
    assert beside == {"generate": 2.5}
    html = page(path)
    assert "At the same time, for the next step: generate 2.5 s." in html
    for part, share in (("generate", "29%"), ("update", "57%"), ("wait", "7%"), ("other", "7%")):
        assert re.search(rf"{part} <b>[\d.]+ s</b> {share}", html)
