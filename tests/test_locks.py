"""One process at a time: who is in, who is kept out, and what a dead one leaves behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dream4d_engine import locks

HOLD = """
import sys, time
from pathlib import Path
from dream4d_engine import locks
held = locks.take(Path(sys.argv[1]), "the run")
print("held", flush=True)
time.sleep(60)
"""


def holding(path: Path) -> subprocess.Popen:
    """Another process that holds the lock."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"held\n"
    return process


def test_one_is_in_until_it_lets_go(tmp_path):
    path = tmp_path / "run.lock"
    assert locks.holder(path) is None
    held = locks.take(path, "the run")
    with pytest.raises(locks.InUse, match=rf"the run is being worked on by process {os.getpid()} on .+, since 20"):
        locks.take(path, "the run")
    assert f"process {os.getpid()} on" in locks.holder(path)
    held.release()
    held.release()
    assert not path.exists() and locks.holder(path) is None
    locks.take(path, "the run").release()


def test_a_killed_process_lets_go(tmp_path):
    path = tmp_path / "run.lock"
    process = holding(path)
    with pytest.raises(locks.InUse, match=f"process {process.pid} on"):
        locks.take(path, "the run")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists() and locks.holder(path) is None, "what it left means nothing"
    held = locks.take(path, "the run")
    assert f"process {os.getpid()}" in path.read_text()
    held.release()


def test_of_many_at_once_one_gets_in(tmp_path):
    held, refused, begin = [], [], threading.Barrier(8)

    def enter():
        begin.wait()
        try:
            held.append(locks.take(tmp_path / "run.lock", "the run"))
        except locks.InUse as error:
            refused.append(error)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    held[0].release()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00 no text", b"\x1b[2Jprocess 1" + b"x" * 10_000])
def test_what_stands_in_the_file_is_only_shown(tmp_path, content):
    path = tmp_path / "run.lock"
    path.write_bytes(content)
    held = locks.take(path, "the run")
    path.write_bytes(content)
    with pytest.raises(locks.InUse) as caught:
        locks.take(path, "the run")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 350
    held.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_work_goes_on_and_it_is_said(tmp_path, monkeypatch, caplog, number):
    def refuse(_file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_lock", refuse)
    held = locks.take(tmp_path / "run.lock", "the run")
    assert "no locks on this file system" in caplog.text and "don't start two runs" in caplog.text
    assert locks.holder(tmp_path / "run.lock") is None
    held.release()
