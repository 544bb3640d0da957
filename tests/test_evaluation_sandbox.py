"""Each limit of an evaluated program is tried; once by what the kernel enforces, once by the interpreter alone."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_lora.evaluation.sandbox import Limits, enforcement, run_program
from mindspeed_lora.evaluation.tasks_code import build_programs, pass_at_1

SHORT = Limits(seconds=1.5)


@pytest.fixture(params=[True, False], ids=["kernel", "interpreter"])
def limits(request: pytest.FixtureRequest) -> Limits:
    limits = replace(SHORT, kernel=request.param)
    enforced = run_program("pass", limits).enforced
    if request.param and any("interpreter" in one for one in enforced):
        pytest.skip(f"this machine's kernel or container does not allow all of it: {', '.join(enforced)}")
    return limits


def test_a_program_that_ends_has_passed_and_one_that_raises_or_leaves_has_not(limits: Limits) -> None:
    assert run_program("assert sum(range(4)) == 6\nprint('noise')", limits).passed
    for program, detail in (
        ("assert 1 == 2", "AssertionError"),
        ("1/0", "ZeroDivisionError"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early, with exit code 0"),
        ("print('0' * 32 + '{\"passed\": true}'); import os; os._exit(0)", "ended early"),
    ):
        outcome = run_program(program, limits)
        assert not outcome.passed and detail in outcome.detail, (program, outcome)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_limited(limits: Limits, program: str) -> None:
    start = time.perf_counter()
    outcome = run_program(program, limits)
    assert not outcome.passed and outcome.detail == "took longer than 1.5 s" and time.perf_counter() - start < 10


def test_time_is_limited_also_where_the_program_catches_the_alarm() -> None:
    start = time.perf_counter()
    program = "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(60)"
    assert not run_program(program, replace(SHORT, seconds=0.5)).passed and time.perf_counter() - start < 15


def test_memory_is_limited(limits: Limits) -> None:
    assert "MemoryError" in run_program("x = bytearray(1 << 31)", limits).detail
    assert run_program("x = bytearray(1 << 20)", limits).passed


def test_files_can_be_written_in_the_programs_own_folder_only(limits: Limits, tmp_path: Path) -> None:
    assert run_program("open('own', 'w').write('x'); assert open('own').read() == 'x'", limits).passed
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'a').write('x')",
        f"import os; os.open({str(kept)!r}, os.O_WRONLY | os.O_TRUNC)",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, 'own')",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
        f"import os; os.symlink('/etc/passwd', {str(tmp_path / 'link')!r})",
        f"import pathlib; pathlib.Path('link').symlink_to({str(kept)!r}); open('link', 'w').write('x')",
    ):
        outcome = run_program(program, limits)
        assert not outcome.passed and "PermissionError" in outcome.detail, (program, outcome)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and kept.read_text() == "kept"
    large = "file = open('own', 'wb')\nfor _ in range(64): file.write(bytes(1 << 20))"
    assert "File too large" in run_program(large, limits).detail


@contextlib.contextmanager
def server() -> Iterator[tuple[int, list[bool]]]:
    """A port of this machine, and whether somebody came."""
    came: list[bool] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        done = threading.Event()

        def wait() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    listening.accept()
                    came.append(True)

        thread = threading.Thread(target=wait)
        thread.start()
        try:
            yield listening.getsockname()[1], came
        finally:
            done.set()
            thread.join()


def test_there_is_no_network_not_even_this_machine(limits: Limits) -> None:
    with server() as (port, came):
        outcome = run_program(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)", limits)
    assert not outcome.passed and not came and outcome.detail.startswith(("OSError", "PermissionError")), outcome


def test_a_child_process_is_bound_as_well_or_cannot_be_started(limits: Limits, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    assert not run_program(f"import subprocess; subprocess.run(['touch', {str(target)!r}], check=True)", limits).passed
    run_program(f"import os\nif os.fork() == 0:\n    os.execvp('touch', ['touch', {str(target)!r}])\nos.wait()", limits)
    assert not target.exists()


def test_nothing_of_the_parents_environment_or_input_is_seen(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_program("import os, sys; assert 'HF_TOKEN' not in os.environ and sys.stdin.read() == ''", limits).passed


def test_it_says_what_is_enforced_here() -> None:
    assert [one.split()[0] for one in enforcement()] == ["time", "memory", "files", "network"]


def test_an_answer_counts_where_its_function_passes_the_tests() -> None:
    docs = [{"prompt": "def add(a, b):\n"}]
    ((good,), (bad,)) = build_programs([["    return a + b\n"]], docs)[0:1] + build_programs([["    return a - b\n"]], docs)
    test = "def check(f):\n    assert f(2, 3) == 5\ncheck(add)"
    assert pass_at_1([test], [[good]]) == 1.0 and pass_at_1([test], [[bad]]) == 0.0 and pass_at_1([test], [[good, bad]]) == 0.5
