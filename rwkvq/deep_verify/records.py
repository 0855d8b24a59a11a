"""provenance.json against what is given now: inputs must be the recorded ones, plan and software may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rwkvq.artifact.layout import PROVENANCE
from rwkvq.artifact.reader import Artifact
from rwkvq.artifact.writer import software_versions
from rwkvq.calibration.windows import Windows, build_windows, write_windows
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.errors import ArtifactError
from rwkvq.files import sha256_of_file
from rwkvq.run import text_hash, tokenizer_hash
from rwkvq.settings import Settings, parse

_HEX = 12
"""Digits of a hash that are enough to tell two files apart in a message."""
_HASHES = ("checkpoint", "text", "tokenizer", "windows", "plan")


@dataclass(frozen=True, slots=True)
class Check:
    """One recorded value beside what was found now; None where there is none."""

    what: str
    recorded: str | None
    found: str | None

    @property
    def is_same(self) -> bool:
        """True if nothing changed."""
        return self.recorded == self.found


@dataclass(frozen=True, slots=True)
class Records:
    """What an artifact says it came from: hex SHA-256 by name, settings, software; and the text it is held against."""

    artifact: Artifact
    text: str
    hashes: Mapping[str, str | None]
    settings: Settings
    software: Mapping[str, Any]

    @classmethod
    def read(cls, artifact: Artifact, text: str | None) -> Records:
        """text None = the recorded source. Raises ArtifactError if the record is not complete, SettingsError."""
        path, found = artifact.path / PROVENANCE, artifact.provenance()
        values = found if isinstance(found, dict) else {}
        missing = [
            name for name in (*(f"{name}_sha256" for name in _HASHES), "settings", "software") if name not in values
        ]
        if missing:
            raise ArtifactError(f"{path}: has no {', '.join(missing)}, so nothing can be proved; quantize again")
        hashes = {name: values[f"{name}_sha256"] for name in _HASHES}
        settings, software = values["settings"], values["software"]
        if not all(isinstance(value, str | None) for value in hashes.values()):
            raise ArtifactError(f"{path}: its hashes are not all text; quantize again")
        if not isinstance(settings, dict) or not isinstance(software, dict):
            raise ArtifactError(f"{path}: settings or software are not objects; quantize again")
        parsed = parse(settings, str(path))
        return cls(artifact, text or parsed.windows.source, hashes, parsed, software)

    @property
    def tokenizer(self) -> Path:
        """The artifact's own copy, which is then compared with the record."""
        return self.artifact.tokenizer or Path(self.settings.windows.tokenizer)

    def check_inputs(self, source: Checkpoint) -> list[Check]:
        """Checkpoint, text and tokenizer. Raises ArtifactError for the first that is not the recorded one."""
        checks = [
            self._same("checkpoint", str(source.path), source.identity()),
            self._same("text", self.text, text_hash(self.text)),
            self._same("tokenizer", str(self.tokenizer), tokenizer_hash(self.tokenizer)),
        ]
        self.artifact.plan.check_model(source)
        return checks

    def _same(self, what: str, where: str, found: str) -> Check:
        check = Check(what, self.hashes[what], found)
        if not check.is_same:
            recorded = "none" if check.recorded is None else f"{check.recorded[:_HEX]}..."
            raise ArtifactError(
                f"{self.artifact.path}: was made with another {what}: {where} is {found[:_HEX]}..., recorded is "
                f"{recorded}; give the {what} that it was made with"
            )
        return check

    def check_software(self, folder: Path) -> list[Check]:
        """Plan, code and libraries, which may differ: a person may have edited the plan, and code moves on.

        folder: for a temporary file.
        """
        plan = folder / "recorded-plan.json"
        self.artifact.plan.write(plan)
        now, libraries = software_versions(), self.software.get("libraries")
        then = libraries if isinstance(libraries, dict) else {}
        names = sorted(now["libraries"].keys() | then.keys())
        return [
            Check("plan", self.hashes["plan"], sha256_of_file(plan)),
            Check("code", self.software.get("code_version"), now["code_version"]),
            *(Check(str(name), then.get(name), now["libraries"].get(name)) for name in names),
        ]

    def rebuild_windows(self, folder: Path) -> tuple[Windows, Check]:
        """The calibration windows, cut again from the text with the recorded settings, and their check.

        folder: for a temporary file. Raises TextError, and ArtifactError if they are not the recorded ones.
        """
        given = self.settings.windows.model_copy(update={"source": self.text, "tokenizer": str(self.tokenizer)})
        built = build_windows(given, seed=self.settings.seed, vocab=self.artifact.spec.vocab)
        windows = replace(built, source=self.settings.windows.source)  # the file states the path of its time
        path = folder / "windows.parquet"
        write_windows(windows, path)
        digest = sha256_of_file(path)
        check = Check("windows", self.hashes["windows"], digest)
        if check.recorded is not None and not check.is_same:
            raise ArtifactError(
                f"{self.artifact.path}: windows cut from {self.text} with the recorded settings are "
                f"{digest[:_HEX]}..., recorded are {check.recorded[:_HEX]}...; another version of rwkvq or pyarrow "
                "wrote them, or the record was changed"
            )
        return windows, check
