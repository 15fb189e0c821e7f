"""`openunirl evaluate --images` by two processes that are killed, continued by one."""

import os
import signal
import socket
import subprocess
import sys
import time

from openunirl.tasks.records import read_jsonl
from picture_folders import Counting, call, draw, rows

SLOW = """
import sys, time
import openunirl.tasks.shapes_oracle as oracle
real = oracle.Oracle._detect_one
oracle.Oracle._detect_one = lambda self, image: (time.sleep(0.3), real(self, image))[1]
from openunirl.cli import main
main(sys.argv[1:])
"""


def whole_lines(out):
    """process -> the pictures with a whole row in its journal."""
    files = {file.stem: file.read_text() for file in (out / "journal").glob("process-*.jsonl")}
    return {name: text.count("\n") for name, text in files.items()}


def test_two_killed_processes_are_continued_by_one(tmp_path, monkeypatch):
    """SIGKILL of both, at an arbitrary moment after each has written: no picture is lost, and none is scored twice."""
    folder, out = draw(tmp_path / "pictures"), tmp_path / "out"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    argv = ["evaluate", "--images", str(folder), "--output-dir", str(out), "--detector", "oracle", "--batch-size", "2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW, *argv],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (len(done := whole_lines(out)) == 2 and all(done.values())):
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()
    done = whole_lines(out)
    assert len(done) == 2 and all(done.values()) and sum(done.values()) < 24
    with open(out / "journal" / "process-0001.jsonl", "a") as file:
        file.write('{"filename": "00011/samples/0001.png", "ta')  # the half-written line that a kill may leave
    judge = Counting()
    monkeypatch.setattr("openunirl.tasks.shapes_oracle.Oracle", lambda: judge)
    call(folder, out)
    assert judge.seen == 24 - sum(done.values())
    call(folder, tmp_path / "whole")
    assert rows(out) == rows(tmp_path / "whole") and len(read_jsonl(out / "results.jsonl")) == 24
