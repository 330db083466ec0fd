"""What a run must not do with files, models, texts and tokens that somebody else made. The servers have their own tests."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import resuming
import tiny
import trimtab
from servers import lengths, serving
from trimtab import snapshot
from trimtab.cli import main
from trimtab.errors import TrimtabError
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig

SOURCES = sorted(Path(trimtab.__file__).parent.rglob("*.py"))
UNPICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_reads_or_writes_pickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.partition(".")[0] for alias in node.names} | {(getattr(node, "module", None) or "").partition(".")[0]}
            assert not names & UNPICKLES
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load")}


def test_a_run_consists_of_texts_and_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    resuming.prepare(tmp_path)
    assert main(resuming.command("ppo", "run")) == 0
    for path in (p for p in (tmp_path / "run").rglob("*") if p.is_file()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert list(file.keys())
        else:
            path.read_text(encoding="utf-8")  # a pickle is not UTF-8: its second byte is 0x80


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(
        json.dumps(
            {**config, "model_type": "planted", "auto_map": {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"}}
        )
    )
    (tmp_path / "model/planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Planted: pass\n")
    with pytest.raises(TrimtabError):
        LanguageModel.load(ModelConfig(path=str(tmp_path / "model")))
    assert not (tmp_path / "ran").exists()


def test_a_pickled_checkpoint_of_a_model_is_not_opened(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> object:
            return Path.touch, (tmp_path / "ran",)

    tiny.folder(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    torch.save({"weight": Planted()}, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(TrimtabError):
        LanguageModel.load(ModelConfig(path=str(tmp_path / "model")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_manifest_cannot_name_what_lies_outside_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "a").mkdir()
    snapshot.seal(folder, {"step": 1})
    assert snapshot.damage(folder) is None
    said = json.loads((folder / snapshot.MANIFEST).read_text())
    said["files"][name] = {"bytes": 1, "sha256": snapshot._checksum(tmp_path / "outside")}
    (folder / snapshot.MANIFEST).write_text(json.dumps(said))
    assert "outside the folder" in str(snapshot.damage(folder))


def test_the_token_of_a_reward_server_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCORES", "tell-nobody")
    resuming.prepare(tmp_path)
    words = [word for word in resuming.command("rloo", "run") if word != resuming.LETTERS]
    with serving(lengths) as server:
        assert main([*words, f"reward.url={server.url}", "reward.token_env=SCORES"]) == 0
        assert {headers["Authorization"] for headers, _ in server.asked} == {"Bearer tell-nobody"}
    for path in (p for p in (tmp_path / "run").rglob("*") if p.is_file()):
        assert b"tell-nobody" not in path.read_bytes(), path
