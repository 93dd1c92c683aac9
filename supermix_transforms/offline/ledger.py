"""The folder that mixes are written to: settings, finished units, and who writes.

A unit is a file. It is written under another name, synced, renamed, and then entered in
``manifest.jsonl`` with its count, size and sha256. Whatever happens, a unit is either entered and
whole, or made again. ``settings.json`` says what the folder was begun with.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from supermix_transforms.files import lock, sha256_of, try_lock, write_atomically

__all__ = ["Ledger", "UnitEntry", "check_same_settings", "fingerprint", "versions"]

FORMAT, VERSION = "supermix-mixes", 1
SETTINGS, MANIFEST = "settings.json", "manifest.jsonl"
UNIT_FILE = re.compile(r"([0-9]{3}-[0-9]{6,12})\.(recipe|tar)")
LOCK = re.compile(r"\.manifest\.([0-9]+\.)?lock")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]+")
SHA256 = re.compile(r"[0-9a-f]{64}")
MOST_MIXES = 1 << 30  # of a unit


@dataclass(frozen=True)
class UnitEntry:
    """A finished unit."""

    unit: str
    file: str
    mixes: int
    converged: int
    bytes: int
    sha256: str
    settings: str = ""  # sha256 of settings.json; lines that are older than this have none


class Ledger:
    """A folder of mixes.

    Args:
        folder: where it is, or will be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder: Path = Path(folder)
        self._manifest = self.folder / MANIFEST
        self._lock = self.folder / ".manifest.lock"  # of both

    # -- writing ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(
        self, settings: Mapping[str, Any], versions: Mapping[str, str], rank: int
    ) -> Iterator[None]:
        """Begin the folder or go on with it; process `rank` is the only one of that number inside.

        Raises:
            ValueError: if the folder cannot be written to, was begun with other settings, or
                another run is writing to it.
        """
        with contextlib.ExitStack() as held:
            with self.complaining():
                self.folder.mkdir(parents=True, exist_ok=True)
                # `is_alive` of another process may hold it for a moment
                alone = held.enter_context(try_lock(self._rank_lock(rank), seconds=1))
            if not alone:
                raise ValueError(
                    f"out: expected a folder that nobody else writes to, got {str(self.folder)!r}, "
                    "where another run is at work. Wait for it, or choose another folder."
                )
            with self.complaining(), lock(self._lock):
                self.sweep({Path(SETTINGS).stem})
                if not self.is_begun:
                    self._begin(settings, versions)
            self.compare(settings)
            yield

    @contextlib.contextmanager
    def complaining(self) -> Iterator[None]:
        """What the file system says inside becomes a ValueError that names the folder."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"out: expected a folder with room to write to, got {str(self.folder)!r}: "
                f"{error.strerror or error}. Units that are finished stay; start again to go on."
            ) from error

    def enter(self, entry: UnitEntry) -> None:
        """Note that a unit's file is whole and has its name."""
        with lock(self._lock), self._manifest.open("a+b") as file:
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):  # the end of a line was lost with its process
                file.truncate(whole)
            file.write(_line(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def sweep(self, stems: set[str]) -> None:
        """Remove what killed processes had begun of these units, or files without their suffix."""
        with self.complaining():
            for path in self.folder.glob(".*.*.*"):
                if TEMPORARY.fullmatch(path.name) and path.name.split(".")[1] in stems:
                    path.unlink(missing_ok=True)

    def is_alive(self, rank: int) -> bool:
        """Whether the process of that number is still inside of `writing`."""
        with self.complaining(), try_lock(self._rank_lock(rank)) as taken:
            return not taken

    def _rank_lock(self, rank: int) -> Path:
        return self.folder / f".manifest.{rank}.lock"

    def _begin(self, settings: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        if self._manifest.exists():
            raise ValueError(
                f"out: expected {SETTINGS} beside {MANIFEST} in {str(self.folder)!r}, got none. "
                "Put it back, or choose another folder."
            )
        content = {
            "format": FORMAT,
            "version": VERSION,
            "settings": settings,
            "versions": versions,
        }
        write_atomically(self.folder / SETTINGS, (json.dumps(content, indent=1) + "\n").encode())

    @property
    def is_begun(self) -> bool:
        return (self.folder / SETTINGS).exists()

    def compare(self, settings: Mapping[str, Any]) -> None:
        """Raise a ValueError unless the folder was begun with these settings."""
        check_same_settings(self.folder, self.settings(), settings)

    # -- reading ---------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What the folder was begun with.

        Raises:
            ValueError: if that is not there or damaged.
        """
        settings: dict[str, Any] = self._header()["settings"]
        return settings

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that the folder was begun with."""
        versions: dict[str, str] = self._header()["versions"]
        return versions

    def _header(self) -> dict[str, Any]:
        path = self.folder / SETTINGS
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError(f"it is {content['format']} {content['version']}")
            if not all(isinstance(content[part], dict) for part in ("settings", "versions")):
                raise ValueError("settings or versions is not an object")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"recipes: expected a folder that `supermix generate` wrote, got "
                f"{str(self.folder)!r}: {SETTINGS}: {error}. Check the path, or generate anew."
            ) from error
        return dict(content)

    def settings_digest(self) -> str:
        """What units are entered with, so that they are not taken for those of other settings."""
        return sha256_of(self.folder / SETTINGS)

    def entries(self) -> dict[str, UnitEntry]:
        """Every finished unit whose file is there in the size that was entered.

        Raises:
            ValueError: if the manifest is damaged.
        """
        # what follows the last end of line was lost
        entries = {entry.unit: entry for entry in map(self._entry, self._lines()[:-1])}
        return {unit: entry for unit, entry in entries.items() if self._is_there(entry)}

    def problems(self) -> list[str]:
        """What is wrong with settings and manifest, though both can be read.

        Raises:
            ValueError: as `settings` and `entries`.
        """
        problems = []
        *lines, rest = self._lines()
        entries = [self._entry(line) for line in lines]
        if rest:
            problems.append(f"{MANIFEST}: its last line is cut: {rest[:80]!r}")
        problems += [
            f"{MANIFEST}: the line of {entry.unit} is not as it was written"
            for entry, line in zip(entries, lines, strict=True)
            if _line(entry) != line
        ]
        digest = self.settings_digest()
        others = sum(entry.settings != digest for entry in entries)
        if others:
            problems.append(
                f"{SETTINGS} is not the file that {others} of {len(entries)} units were made with"
            )
        return problems

    def strays(self, known: set[str]) -> list[str]:
        """Files that are not part of the mixes, each with what to do; `known` ones are left out.

        Raises:
            ValueError: as `entries`.
        """
        entries = self.entries().values()
        known = {SETTINGS, MANIFEST, *known, *(entry.file for entry in entries)}
        strays = []
        for name in sorted(path.name for path in self.folder.iterdir()):
            if name in known or LOCK.fullmatch(name):
                continue
            if TEMPORARY.fullmatch(name):
                what = "is being written, or was left by a process that was killed: generate again"
            elif UNIT_FILE.fullmatch(name):
                what = "is not in the manifest, or of another size there: generate again"
            else:
                what = "is none of the files that generate writes: move it elsewhere"
            strays.append(f"{name!r} {what}")
        return strays

    def path(self, entry: UnitEntry) -> Path:
        return self.folder / entry.file

    def _lines(self) -> list[bytes]:
        """Of the manifest; the last one is what follows the last end of line."""
        try:
            return self._manifest.read_bytes().split(b"\n")
        except FileNotFoundError:
            return [b""]
        except OSError as error:
            raise ValueError(
                f"recipes: expected a file {str(self._manifest)!r}, got {error.strerror}. Generate "
                "into another folder."
            ) from error

    def _entry(self, line: bytes) -> UnitEntry:
        try:
            entry = UnitEntry(**json.loads(line))
            texts = (entry.unit, entry.file, entry.sha256, entry.settings)
            if not all(type(each) is str for each in texts):
                raise ValueError("names that are no texts")
            named = UNIT_FILE.fullmatch(entry.file)
            if named is None or named[1] != entry.unit:  # nor is it outside of the folder then
                raise ValueError(f"{entry.file!r} is no name of a unit's file")
            if not SHA256.fullmatch(entry.sha256):
                raise ValueError("what is no sha256")
            counts = (entry.mixes, entry.converged, entry.bytes)
            if not all(type(each) is int for each in counts):
                raise ValueError("counts that are no integers")
            if not 0 <= entry.converged <= entry.mixes <= MOST_MIXES or entry.bytes < 0:
                raise ValueError("counts out of range")
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"recipes: expected a unit in each line of {str(self._manifest)!r}, got "
                f"{line[:80]!r}: {error}. Remove that line and generate again."
            ) from error
        return entry

    def _is_there(self, entry: UnitEntry) -> bool:
        path = self.path(entry)
        return path.is_file() and path.stat().st_size == entry.bytes


def _line(entry: UnitEntry) -> bytes:
    return json.dumps(asdict(entry)).encode()


def versions() -> dict[str, str]:
    """Of the libraries that decide how a picture is decoded, resized and mixed."""
    from PIL import features

    packages = ("supermix-transforms", "torch", "torchvision", "pillow")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {**found, "libjpeg-turbo": str(features.version("libjpeg_turbo"))}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """The sha256 of settings, the same for equal ones."""
    content = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def check_same_settings(folder: Path, begun: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise a ValueError unless a folder is asked for what it was begun with, as JSON has it."""
    asked = json.loads(json.dumps(asked))
    different = [
        f"{name} {was}, now {now}"
        for name in sorted(begun.keys() | asked.keys())
        if begun.get(name) != asked.get(name)
        for was, now in [_apart(begun.get(name), asked.get(name))]
    ]
    if different:
        raise ValueError(
            f"out: expected the settings that {str(folder)!r} was begun with, got others: "
            f"{'; '.join(different)}. Use those, or choose another folder."
        )


def _apart(was: Any, now: Any) -> tuple[str, str]:
    """Both in short: of two lists as long as each other, what is first not the same."""
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        was, now = next(pair for pair in zip(was, now, strict=True) if pair[0] != pair[1])
    if isinstance(was, list) and isinstance(now, list):
        return f"{len(was)} of them", f"{len(now)}"
    if isinstance(was, dict) and isinstance(now, dict):
        names = [name for name in was if was.get(name) != now.get(name)]
        was, now = ({name: each.get(name) for name in names} for each in (was, now))
    return _short(was), _short(now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
