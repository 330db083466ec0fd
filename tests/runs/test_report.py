"""The report is one self-contained page that says what the files say, whatever text a model produced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.errors import RunError
from trimtab.runs.directory import RunDirectory
from trimtab.runs.report import write_report


def run(path: Path, steps: int = 5, response: str = "fine", **settings: object) -> Path:
    with RunDirectory.create(path, "seed: 1\nmodel: {path: tiny}\n" + "".join(f"{k}: {v}\n" for k, v in settings.items())) as directory:
        directory.event("started", stage="ppo")
        for step in range(steps):
            directory.log(
                step,
                {
                    "reward/mean": step * 0.1, "kl/mean": step * 0.5, "odd/name": 1.0,
                    "time/generate": 1.0, "time/update": 2.0, "time/step": 3.0,
                    "eval/accuracy": 0.6, "eval/accuracy_low": 0.5, "eval/accuracy_high": 0.7,
                },
            )  # fmt: skip
            rows = [{"prompt": "a prompt", "response": response, "reward": 0.5, "parts": {}, "kl": 0.1, "tokens": 3, "truncated": False}]
            directory.samples(step, rows)
    return path


def test_one_page_without_anything_from_outside(tmp_path: Path) -> None:
    html = write_report([run(tmp_path / "run")], tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)
    assert "@import" not in html
    assert "<script" not in html
    for words in ("Reward against KL", "Samples before and after", "Time of a step", "odd", "Recipe", "seed: 1"):
        assert words in html


def test_text_of_a_model_cannot_become_markup(tmp_path: Path) -> None:
    html = write_report([run(tmp_path / "run", response="<script>alert(1)</script>")], tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    run(tmp_path / "run")
    first, second = (write_report([tmp_path / "run"], tmp_path / f"{name}.html").read_text() for name in "ab")
    assert first == second


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_no_or_one_step_still_has_a_page(tmp_path: Path, steps: int) -> None:
    assert f"{steps} steps" in write_report([run(tmp_path / "run", steps)], tmp_path / "report.html").read_text()


def test_several_runs_show_final_values_and_the_settings_that_differ(tmp_path: Path) -> None:
    paths = [run(tmp_path / "first", lr=1), run(tmp_path / "second", lr=2)]
    html = write_report(paths, tmp_path / "report.html").read_text()
    differing = html[html.index("Settings that differ") : html.index("</table>", html.index("Settings that differ"))]
    assert "<td>lr</td><td>1</td><td>2</td>" in differing
    assert "seed" not in differing


def test_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run directory"):
        write_report([tmp_path], tmp_path / "report.html")
