"""metrics.jsonl: one line {"step": ..., "loss": ..., ...} for each step, whatever was killed in between."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import to_disk, write_file


@dataclass(frozen=True)
class Metrics:
    """The file."""

    file: Path

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the rows of further steps."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        # a checkpoint that follows must not be there without them
        to_disk(self.file)

    def forget_after(self, step: int) -> None:
        """Drop the rows of steps that are run again, and a last line that was cut off."""
        if self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]

            def contents(path: Path) -> None:
                path.write_text("".join(kept), encoding="utf-8")

            write_file(self.file, contents)
