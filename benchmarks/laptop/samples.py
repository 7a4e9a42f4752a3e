"""The measurements of a run, kept on disk as they are made, so that an interrupted run goes on where it was."""

import json
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from mmmamba.benchmarks.arguments import LAPTOP_OURS, LAPTOP_PEERS


class Point(NamedTuple):
    """What is measured: `model` with weights of so many `bits`, `what` it does (`prompt`, `step`), `tokens` before."""

    model: str
    bits: int
    what: str
    tokens: int


class Samples:
    """Measurements, in a file with a line of JSON each.

    Args:
        file: Of the run. When it is complete, the peers' samples go to `finished.jsonl` beside it.
        identities: Of each (model, bits), what it is measured with: code, file, threads. Other samples are dropped.
        keep_peers: Whether peers' samples of a run that is finished, or of other code of ours, count.

    Attributes:
        rows: The samples, dicts with the fields of `Point`, `at` and what was measured.
    """

    def __init__(self, file: Path, identities: Mapping[tuple[str, int], str], keep_peers: bool = False):
        self.file, self.identities = file, identities
        file.parent.mkdir(parents=True, exist_ok=True)
        here, self._elsewhere = self._by_run(_read(file))
        outdated = any(row["model"] in LAPTOP_OURS and not self._is_current(row) for row in here)
        if keep_peers:
            finished, _ = self._by_run(_read(self._finished))
            here = finished + [row for row in here if row not in finished]
        elif outdated:
            print("The code has changed since the interrupted run, so all is measured again (but see --keep-peers).")
            here = []
        self.rows = [row for row in here if self._is_current(row)]
        _write(file, self.rows + self._elsewhere)

    @property
    def _finished(self) -> Path:
        return self.file.with_name("finished.jsonl")

    def _by_run(self, rows: list[dict]) -> tuple[list[dict], list[dict]]:
        """Those of models that this run measures, and those of others, which an earlier run in this folder did."""
        mine = [row for row in rows if (row["model"], row["bits"]) in self.identities]
        return mine, [row for row in rows if row not in mine]

    def _is_current(self, row: dict) -> bool:
        return row["identity"] == self.identities[row["model"], row["bits"]]

    def of(self, points: Collection[Point]) -> list[dict]:
        """The samples of these."""
        return [row for row in self.rows if _point(row) in points]

    def add(self, point: Point, measured: dict) -> None:
        """Keeps a sample, on disk at once."""
        identity, now = self.identities[point.model, point.bits], datetime.now(timezone.utc)
        row = point._asdict() | {"identity": identity, "at": now.isoformat(timespec="seconds")} | measured
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        """Says that the run is complete: the next one begins anew, and may keep the peers' samples."""
        peers = [row for row in self.rows if row["model"] in LAPTOP_PEERS]
        points = {_point(row) for row in peers}
        _write(self._finished, [row for row in _read(self._finished) if _point(row) not in points] + peers)
        _write(self.file, self._elsewhere)


def _point(row: dict) -> Point:
    return Point(*(row[name] for name in Point._fields))


def _read(file: Path) -> list[dict]:
    """Samples of a file; a line that was cut off while it was written is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _write(file: Path, rows: list[dict]) -> None:
    """Replaces a file of samples at once."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(file)


def order(points: list[tuple[str, int]], candidates: list[tuple[str, int]], rounds: int) -> list[list[Point]]:
    """What is measured in each round: point by point, the candidates one after the other.

    Each round begins with another candidate, so that a machine that gets slower harms all of them alike.

    Args:
        points: (what, tokens).
        candidates: (model, bits).
        rounds: How many.
    """
    return [
        [
            Point(model, bits, what, tokens)
            for what, tokens in points
            for model, bits in candidates[turn % len(candidates) :] + candidates[: turn % len(candidates)]
        ]
        for turn in range(rounds)
    ]
