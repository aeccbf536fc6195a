"""Rejected rows: rejects.jsonl has the place, reason and detail of each, and each reason has a counter."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType


class Rejected(ValueError):
    """A row that cannot be used. `reason` names its counter; the message is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class Rejects:
    """Writes rejects.jsonl and counts by reason."""

    def __init__(self, path: Path):
        self._path = path
        self._counts: Counter[str] = Counter()
        self._examples: list[str] = []

    def __enter__(self) -> Rejects:
        self._file = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, where: str, fault: Rejected) -> None:
        self._counts[fault.reason] += 1
        # A detail can quote a lone surrogate, which UTF-8 cannot write.
        detail = str(fault).encode("utf-8", "backslashreplace").decode()
        self._file.write(
            json.dumps({"where": where, "reason": fault.reason, "detail": detail}, ensure_ascii=False) + "\n"
        )
        if len(self._examples) < 3:
            self._examples.append(f"  {where}: {fault.reason}: {detail}")

    @classmethod
    def join(cls, folders: list[Path], path: Path) -> Rejects:
        """Joins the rejects files of several folders, in their order."""
        with cls(path) as joined:
            for folder in folders:
                with (folder / path.name).open(encoding="utf-8") as part:
                    for entry in map(json.loads, part):
                        joined.add(entry["where"], Rejected(entry["reason"], entry["detail"]))
        return joined

    @property
    def counts(self) -> dict[str, int]:
        return dict(sorted(self._counts.items()))

    def check(self, *, num_rows: int, max_share: float, source: str) -> None:
        """Raises ValueError, with examples, when no row is left or more than `max_share` of them is rejected."""
        num_rejected, examples = self._counts.total(), "\n".join(self._examples)
        if num_rows == 0:
            raise ValueError(f"{source}: the source is empty; it needs at least one row")
        if num_rejected == num_rows:
            raise ValueError(f"{source}: none of {num_rows} rows can be used:\n{examples}")
        if num_rejected > max_share * num_rows:
            raise ValueError(
                f"{source}: {num_rejected} of {num_rows} rows are rejected {self.counts}, over "
                f"dataset_mixture.max_rejected_share ({max_share}); mend them or raise the share:\n{examples}"
            )
