import errno
import os
from pathlib import Path

import pytest

from moesaic.search_spaces import MoesaicError
from moesaic.supernet.metrics import MetricLog, read_metrics


def test_an_incomplete_last_line_is_dropped_and_a_resumed_log_continues_at_its_step(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": 1.0 / step})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30]
    log = MetricLog(tmp_path, 25)
    log.write({"step": 30, "loss": 0.5})
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] == 0.5


def test_a_damaged_record_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(MoesaicError, match="damaged") as caught:
        read_metrics(path)
    assert str(caught.value.where).endswith("metrics.jsonl:2")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b'{"loss": 1}', b"3"])
def test_a_line_that_is_no_record_of_a_step_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + content + b"\n")
    with pytest.raises(MoesaicError, match="damaged"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_record_that_no_longer_fits_on_the_disk_leaves_the_ones_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricLog(tmp_path, 0)
    log.write({"step": 10, "loss": 1.0})
    write = os.write

    def half(handle: int, data: memoryview) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[:12])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(MoesaicError, match="No space left"):
            log.write({"step": 20, "loss": 0.5})
    log.write({"step": 20, "loss": 0.5})
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]
