"""Training metrics as JSON lines and for TensorBoard; a resumed run continues both from its checkpoint."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from moesaic.search_spaces import Damaged, MoesaicError
from moesaic.search_spaces.files import LineFile, unwritable, write_text


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of ``metrics.jsonl``, without an incomplete last line. Raises Damaged for a damaged record."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
            _ = records[-1]["step"]
        except (ValueError, KeyError, TypeError):
            found = line[:60].decode(errors="replace")
            raise Damaged("is damaged: not a record of a step", path, number, found=found) from None
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
            text = "".join(json.dumps(record) + "\n" for record in kept)
            write_text(self.path, text)
            self._file = LineFile(self.path, len(text))
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step)
        except OSError as error:
            raise unwritable(self.path, error) from None
        except UnicodeEncodeError:
            problem = "TensorBoard cannot write there: the folder's name is not UTF-8"
            raise MoesaicError(problem, where=str(directory), allowed="another folder, for a run: --out") from None

    def write(self, record: dict[str, float]) -> None:
        self._file.append(json.dumps(record) + "\n")
        try:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(record["step"]))
        except OSError as error:
            raise unwritable(self.path.parent / "tensorboard", error) from None

    def close(self) -> None:
        self._file.close()
        with suppress(OSError):  # write has told of a full disk
            self._board.close()
