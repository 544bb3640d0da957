"""Runs a program that a model wrote, in a process of its own that can do little harm.

| limit    | enforced by                                                                                              |
|----------|----------------------------------------------------------------------------------------------------------|
| time     | the process group is killed at ``Limits.seconds`` of wall clock; RLIMIT_CPU                              |
| memory   | RLIMIT_AS                                                                                                |
| files    | a temporary working folder; Landlock (Linux 5.13): nothing can be written elsewhere; RLIMIT_FSIZE, NOFILE |
| network  | a network namespace of its own, without devices                                                          |
| children | RLIMIT_NPROC 0 (not for root)                                                                            |

Where the kernel or the container forbids Landlock or the namespace, the interpreter's audit hook refuses to open files for writing,
to change them, to open sockets, and to start processes or load foreign code instead: that stops programs that are careless, not
programs that are malicious. :func:`enforcement` says what holds on this machine.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
_OUTPUT_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """Of one program. ``file_bytes``: of one file. ``kernel`` False: only what the interpreter can enforce, for tests of that."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 24
    kernel: bool = True


@dataclass(frozen=True)
class Outcome:
    """``passed``: the program ran to its end. ``detail``: the last line of what went wrong."""

    passed: bool
    detail: str = ""
    enforced: tuple[str, ...] = ()


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run ``program`` under ``limits``; it has passed where it ended without an exception and did not leave early."""
    limits = limits or Limits()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="evaluated_") as folder:
        order = json.dumps({"program": program, "folder": folder, "token": token, "limits": asdict(limits)})
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(order.encode(), timeout=limits.seconds + 5.0)  # the child's own alarm is first
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            _end(process)
    return _read(output[-_OUTPUT_BYTES:].decode(errors="replace"), token, process.returncode, limits)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process group, the process's children too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _read(output: str, token: str, code: int, limits: Limits) -> Outcome:
    for line in output.splitlines():
        if line.startswith(token):  # only the child's own code knows it
            answer = json.loads(line.removeprefix(token))
            return Outcome(answer["passed"], answer["detail"], tuple(answer["enforced"]))
    if code == -signal.SIGALRM or code == -signal.SIGXCPU:
        return Outcome(False, f"took longer than {limits.seconds:g} s")
    return Outcome(False, f"ended early, with exit code {code}")


def enforcement() -> tuple[str, ...]:
    """What holds on this machine, found by running a program that does nothing."""
    return run_program("pass").enforced
