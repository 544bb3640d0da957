"""The process of :mod:`sandbox`: limits itself for good, then runs the program that it reads from standard input.

It stands alone (``python -I``), so that nothing of the package is loaded beside the program.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_NO_NEW_PRIVS = 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same number on every architecture
_LANDLOCK_RULE_PATH_BENEATH, _LANDLOCK_CREATE_RULESET_VERSION = 1, 1
_LANDLOCK_WRITES = 0b1_1111_1111_0010  # write a file, remove, make of every kind: all of version 1 but execute and read
_LANDLOCK_REFER, _LANDLOCK_TRUNCATE = 1 << 13, 1 << 14  # of versions 2 and 3

_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "ctypes.", "pty.")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.")


def limit_resources(limits: dict[str, Any]) -> None:
    """Time, memory, size and number of files, children."""
    seconds = int(limits["seconds"]) + 1
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    signal.setitimer(signal.ITIMER_REAL, limits["seconds"])  # SIGALRM ends the process


def leave_network(libc: ctypes.CDLL) -> bool:
    """Move to a network namespace of its own, which has no way out."""
    return libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWNET) == 0


def write_only_into(folder: str, libc: ctypes.CDLL) -> bool:
    """Let Landlock refuse every change to the file system outside ``folder``."""
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)
    if version < 1:
        return False
    rights = _LANDLOCK_WRITES | (_LANDLOCK_REFER if version >= 2 else 0) | (_LANDLOCK_TRUNCATE if version >= 3 else 0)
    handled = struct.pack("Q", rights)
    rules = libc.syscall(_LANDLOCK_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if rules < 0:
        return False
    beneath = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        allowed = struct.pack("=Qi", rights, beneath)
        if libc.syscall(_LANDLOCK_ADD_RULE, rules, _LANDLOCK_RULE_PATH_BENEATH, allowed, 0) != 0:
            return False
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return bool(libc.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0) == 0)
    finally:
        os.close(beneath)
        os.close(rules)


def refuse_in_interpreter(folder: str) -> None:
    """What the kernel does not enforce here; a hook cannot be taken back."""

    def inside(path: Any) -> bool:
        return isinstance(path, str) and os.path.realpath(path).startswith(folder + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed to an evaluated program")
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not inside(path):
                raise PermissionError(f"{path}: an evaluated program may write into its own folder only")
        elif event.startswith(_CHANGES) and not all(inside(path) for path in arguments if isinstance(path, str | bytes)):
            raise PermissionError(f"{event}: an evaluated program may change its own folder only")

    sys.addaudithook(hook)


def main() -> None:
    """Read the order, limit, run, and say how it ended on the real standard output, behind the order's token."""
    order = json.load(sys.stdin)
    folder = os.path.realpath(order["folder"])
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    libc = ctypes.CDLL(None, use_errno=True)
    kernel = order["limits"]["kernel"]
    network, files = kernel and leave_network(libc), kernel and write_only_into(folder, libc)
    limit_resources(order["limits"])
    enforced = ["time", "memory", f"files ({'kernel' if files else 'interpreter'})", f"network ({'kernel' if network else 'interpreter'})"]
    if not (network and files):
        refuse_in_interpreter(folder)
    passed, detail = True, ""
    try:
        exec(compile(order["program"], "<evaluated>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        passed, detail = False, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    answers.write(order["token"] + json.dumps({"passed": passed, "detail": detail, "enforced": enforced}) + "\n")
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
