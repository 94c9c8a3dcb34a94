"""Files of other hosts, which NFS may show late, and locks, which some file systems do not have."""

import errno
import fcntl
import logging
import os
import threading
import time

import pytest

from megacocomix import files
from megacocomix.errors import UserError
from megacocomix.files import NO_LOCKS, lock_file, missing_files


def test_a_file_that_appears_or_grows_late_is_waited_for(tmp_path):
    (tmp_path / "growing").write_text("12")

    def write():
        time.sleep(0.2)
        (tmp_path / "growing").write_text("1234")
        (tmp_path / "late").write_text("12")

    writer = threading.Thread(target=write)
    writer.start()
    assert missing_files(tmp_path, {"growing": 4, "late": 2}) == []
    writer.join()


def test_what_is_missing_in_the_end_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LATEST", 0.3)
    (tmp_path / "here").write_text("12")
    (tmp_path / "short").write_text("1")
    assert missing_files(tmp_path, {"here": 2, "short": 2, "gone": 2}) == ["short", "gone"]
    assert missing_files(tmp_path / "nowhere", {"a": 1}) == ["a"]


@pytest.fixture
def no_locks(monkeypatch):
    """Makes flock fail with an error."""

    def use(number):
        def flock(file, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return use


@pytest.mark.parametrize("number", sorted(NO_LOCKS), ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_a_warning_or_a_line_with_the_remedy(tmp_path, no_locks, caplog, number):
    no_locks(number)
    with open(tmp_path / "lock", "w") as file:
        with caplog.at_level(logging.WARNING):
            assert lock_file(file, is_optional=True)
        (record,) = caplog.records
        with pytest.raises(UserError) as caught:
            lock_file(file)
    for line in (record.getMessage(), *caught.value.problems):
        assert str(tmp_path / "lock") in line
        assert "-o flock" in line
        assert os.strerror(number) in line


def test_another_error_of_a_lock_is_not_taken_for_that(tmp_path, no_locks):
    no_locks(errno.EIO)
    with open(tmp_path / "lock", "w") as file, pytest.raises(OSError, match="Input/output error"):
        lock_file(file, is_optional=True)


def test_a_lock_is_held_until_the_file_is_closed(tmp_path):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert lock_file(first)
        assert not lock_file(second)
        first.close()
        assert lock_file(second)
