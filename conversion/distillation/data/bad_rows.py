"""Counts the records that could not become rows, and stops a run that meets too many."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmmamba.conversion.shards import write_text


CHANCE = 1e-4  # an excess of bad rows that is less likely by chance than this stops a run


class BadRowCounter:
    """Counts bad rows, each once however often it is read, and stops a run that meets too many.

    Args:
        max_share: Largest share of bad rows among the rows seen, from the first one on; an excess that is likely to be
            chance is let pass until the whole dataset was seen.
        file: JSON Lines file that gets each bad row once: `row`, `reason`, and the rows `seen` before it. Those of an
            earlier part of the run count.
        writes: Whether this process writes the file; all of them read it.
        num_records: Different records of the whole dataset, if known; rows beyond are those seen again.
        num_quoted: Bad rows that an error message quotes.
        seen: Rows seen before the run was interrupted. What the file names after that will be read again.
    """

    def __init__(
        self,
        max_share: float = 0.01,
        file: str | Path | None = None,
        writes: bool = True,
        num_records: int | None = None,
        num_quoted: int = 3,
        seen: int = 0,
    ):
        if not 0 <= max_share <= 1:
            raise ValueError(f"The largest share of bad rows is {max_share}; give one from 0 to 1.")
        self.max_share, self.num_records, self.num_quoted = max_share, num_records, num_quoted
        self.file, self.writes = None if file is None else Path(file), writes
        self._seen = seen
        lines = _read_lines(self.file) if self.file is not None and self.file.is_file() else []
        lines = [line for line in lines if line["seen"] < seen]
        self._names = {line["row"] for line in lines}
        self.quoted = [f"{line['row']}: {line['reason']}" for line in lines[:num_quoted]]
        # Lines to keep when the file is first written; None once it was, from when on it is appended to.
        self._earlier_lines: list[dict] | None = lines

    @property
    def count(self) -> int:
        """Number of different bad rows."""
        return len(self._names)

    def add(self, bad_rows: Iterable[tuple[str, str]]) -> int:
        """Counts the `bad_rows` of a batch, (name, reason) each. Returns how many are new."""
        before, lines = len(self._names), []
        for name, reason in bad_rows:
            if name in self._names:
                continue
            self._names.add(name)
            if len(self.quoted) < self.num_quoted:
                self.quoted.append(f"{name}: {reason}")
            lines.append({"row": name, "reason": reason, "seen": self._seen})
        if lines and self.file is not None and self.writes:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self._earlier_lines is not None:
                write_text(self.file, "".join(json.dumps(line) + "\n" for line in self._earlier_lines))
                self._earlier_lines = None
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        return len(self._names) - before

    def check(self, new_rows: int) -> None:
        """Stops the run if too many rows are bad.

        Args:
            new_rows: Rows seen since the last check.

        Raises:
            ValueError: if their share is above the limit.
        """
        self._seen += new_rows
        seen_all = self.num_records is not None and self._seen >= self.num_records
        seen = self.num_records if seen_all else self._seen
        seen = max(seen, self.count)  # one row may have many bad ones in front of it
        allowed = self.max_share * seen
        if self.count <= allowed or (not seen_all and _chance(self.count, allowed) > CHANCE):
            return
        listed = "" if self.file is None else f" (all of them are in {self.file})"
        raise ValueError(
            f"{self.count} bad rows among {seen} rows ({self.count / seen:.2%}) are more than the "
            f"{self.max_share:.2%} that is allowed; the first are {'; '.join(self.quoted)}{listed}; "
            "repair or remove them, or allow a larger share."
        )


def _chance(count: int, mean: float) -> float:
    """Probability of at least `count` bad rows where `mean` are expected (Poisson's)."""
    return float(torch.special.gammainc(torch.tensor(float(count)).double(), torch.tensor(mean).double()))


def all_bad_message(bad_rows: dict[str, str]) -> str:
    """The sentence about a long run of bad rows without a good one, from their names and reasons."""
    first = "; ".join(f"{name}: {reason}" for name, reason in islice(bad_rows.items(), 3))
    return f"{len(bad_rows)} records in a row are bad and none is good; the first are {first}. Repair or remove them."


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            yield {"row": line["row"], "reason": line["reason"], "seen": line["seen"]}
        except (ValueError, TypeError, KeyError):  # half a line, of a run that was killed
            continue
