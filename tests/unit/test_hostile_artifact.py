"""Artifact folders and run folders made to harm: no link is followed out, no pipe waited for, no name leads out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rwkvq.artifact import sums
from rwkvq.artifact.reader import open_artifact
from rwkvq.artifact.sums import write_sums
from rwkvq.artifact.verify import verify
from rwkvq.errors import ArtifactError, PlanError, RwkvqError
from rwkvq.plan.plan import Plan
from rwkvq.publish import publish
from rwkvq.quantize.block import planned_for
from rwkvq.quantize.results import tensor_path
from rwkvq.run import Run
from tests.packed import codes_of, plan_of, tiny_source, write_packed
from tests.small import settings_of

FILES = ("SHA256SUMS", "config.json", "quantization.json", "provenance.json", "model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    source = tiny_source(folder, "x060", layers=1, width=64, vocab=64)
    plan = plan_of(source)
    write_packed(folder / "artifact", source, plan, codes_of(plan))
    plan.write(folder / "plan.json")
    return folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "artifact", tmp_path / "artifact"))


def refusal(folder: Path) -> str:
    """The line with which both ways to read an artifact refuse `folder`."""
    lines = []
    for read in (open_artifact, verify):
        with pytest.raises(ArtifactError) as caught:
            read(folder)
        lines.append(str(caught.value))
    assert lines[0] == lines[1] and "\n" not in lines[0] and lines[0].startswith(str(folder))
    assert "again" in lines[0] or "check the path" in lines[0]
    return lines[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link outside", "pipe", "device", "link to nothing"])
def test_what_stands_in_place_of_a_file_is_refused(artifact: Path, name: str, kind: str) -> None:
    path, words = artifact / name, "a link that leads out of its folder"
    content = path.read_bytes()
    path.unlink()
    if kind == "link outside":
        (artifact.parent / "elsewhere").write_bytes(content)  # the right bytes, so that only the place is wrong
        path.symlink_to("../elsewhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
        words = "not a regular file"
    else:
        path.symlink_to("gone")
        words = "a link to nothing"
    message = refusal(artifact)
    assert words in message and name in message


def test_a_file_that_nothing_lists_may_be_no_link_either(artifact: Path) -> None:
    (artifact / "README.md").symlink_to("/etc/hostname")
    assert "README.md: a link that leads out" in refusal(artifact)


def test_folders_are_left_out_and_links_inside_are_read(artifact: Path) -> None:
    (artifact / ".cache").mkdir()
    os.mkfifo(artifact / ".cache" / "pipe")
    (artifact / "config.json").rename(artifact / "real.json")
    (artifact / "config.json").symlink_to("real.json")
    report = verify(artifact)
    assert set(report.unlisted) == {".cache", "real.json"}


def test_an_artifact_in_the_hugging_face_cache_is_read(artifact: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    for file in artifact.iterdir():
        blob = Path(shutil.move(file, snapshot.parent.parent / "blobs" / f"hash-{file.name}"))
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    assert verify(snapshot).unlisted == ()


def test_a_folder_of_very_many_files_is_no_artifact(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "MAX_FILES", 4)
    assert "more than 4 files" in refusal(artifact)


def run_with(artifact: Path, tmp_path: Path) -> Run:
    run = Run(settings_of({"model": str(tmp_path / "model.pth"), "run_dir": str(tmp_path / "run")}))
    shutil.copytree(artifact, run.artifact)
    run.report.write_text("report")
    run.metrics.write_text("{}")
    return run


@pytest.mark.parametrize("place", ["artifact/model.safetensors", "artifact/extra.txt", "report.html", "metrics.json"])
def test_publish_copies_no_link(artifact: Path, tmp_path: Path, place: str) -> None:
    run = run_with(artifact, tmp_path)
    path = run.folder / place
    secret = tmp_path / "secret"
    secret.write_text("secret")
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    out = tmp_path / "OUT"
    with pytest.raises(ArtifactError, match="a link") as caught:
        publish(run, out, overwrite=False)
    assert str(path) in str(caught.value) and "again" in str(caught.value)
    assert not out.exists() and not list(tmp_path.glob(".OUT*"))


def test_publish_copies_what_is_sound(artifact: Path, tmp_path: Path) -> None:
    publish(run_with(artifact, tmp_path), tmp_path / "OUT", overwrite=False)
    assert verify(tmp_path / "OUT").unlisted == ()
    assert {"report.html", "metrics.json", *FILES} <= {path.name for path in (tmp_path / "OUT").iterdir()}


NAMES = ["../../x", "/etc/x", "blocks.0.att.key.weight/../../../x", "a\nb", "", "x" * 300]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["name", "tensor"])
def test_no_name_in_a_plan_leads_out_of_the_run_folder(made: Path, tmp_path: Path, name: str, key: str) -> None:
    values: dict[str, Any] = json.loads((made / "plan.json").read_text())
    row = next(row for row in values["tensors"] if row["method"] != "keep")
    row[key] = name
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    with pytest.raises(PlanError) as caught:
        Plan.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_in_an_artifact_leads_out(artifact: Path, name: str) -> None:
    values = json.loads((artifact / "quantization.json").read_text())
    values["tensors"][3]["name"] = name
    (artifact / "quantization.json").write_text(json.dumps(values))
    write_sums(artifact)
    with pytest.raises(RwkvqError) as caught:
        open_artifact(artifact)
    assert str(artifact) in str(caught.value) and "\n" not in str(caught.value)


def test_every_quantized_tensor_lies_in_its_folder(made: Path, tmp_path: Path) -> None:
    plan = Plan.read(made / "plan.json")
    entries = [entry for block in (0, None) for entry in planned_for(plan, block)]
    assert len(entries) > 10
    for entry in entries:
        assert tensor_path(tmp_path, entry.name).resolve().parent == tmp_path.resolve()
