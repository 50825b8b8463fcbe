"""utils/errors.py under torchrun: torchrun's report ends with the earliest error."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from utils.errors import UserError, command


def failure(monkeypatch, file, rank: int, error: BaseException) -> ProcessFailure:
    """Raise `error` in the command of a rank, and return the failure that torchrun reads."""

    @command
    def main() -> None:
        raise error

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises((SystemExit, type(error))):
        main()
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=1, error_file=str(file))


@pytest.mark.parametrize("follower", [RuntimeError("Connection closed by peer"), KeyboardInterrupt()])
def test_the_report_ends_with_the_error_that_caused_the_others(monkeypatch, tmp_path, follower):
    cause = failure(monkeypatch, tmp_path / "1.json", 1, UserError("no config file a.yaml; see configs/"))
    # The other rank fails in the same second, and torchrun may notice its failure first.
    other = failure(monkeypatch, tmp_path / "0.json", 0, follower)
    report = str(ChildFailedError("train.py", {0: other, 1: cause})).splitlines()
    assert report[-2].strip() == "error: no config file a.yaml; see configs/" and set(report[-1]) == {"="}


def test_a_bug_ends_the_report_with_its_traceback(monkeypatch, tmp_path):
    report = str(ChildFailedError("train.py", {0: failure(monkeypatch, tmp_path / "0.json", 0, KeyError("x"))}))
    assert "Traceback (most recent call last)" in report and report.splitlines()[-2].strip() == "KeyError: 'x'"


def test_the_error_is_printed_even_if_the_error_file_cannot_be_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "missing/0.json"))

    @command
    def main() -> None:
        raise UserError("a is wrong: do b")

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "error: a is wrong: do b\n"
