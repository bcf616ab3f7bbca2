"""Training metrics as JSON lines and for TensorBoard; a resumed run continues both from its checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import unwritable, write_text


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of ``metrics.jsonl``, without an incomplete last line. Raises MoesaicError for a damaged record."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise MoesaicError("is damaged: not a JSON record", where=f"{path}:{number}", found=line[:60]) from None
    return records


class MetricLog:
    """Appends one record per logged step to ``directory/metrics.jsonl`` and ``directory/tensorboard``."""

    def __init__(self, directory: Path, resume_step: int):
        # Imported here: TensorBoard takes longer to import than most commands take to run.
        from torch.utils.tensorboard.writer import SummaryWriter

        self.path = directory / "metrics.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            kept = [record for record in read_metrics(self.path) if record["step"] < resume_step]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = self.path.open("a", encoding="utf-8")  # until close
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step)
        except OSError as error:
            raise unwritable(self.path, error) from None
        except UnicodeEncodeError:
            problem = "TensorBoard cannot write there: the folder's name is not UTF-8"
            raise MoesaicError(problem, where=str(directory), allowed="another folder, for a run: --out") from None

    def write(self, record: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from None
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._board.close()
