"""Run one command as a child that dies with its parent, and, for root, as an ordinary user of a user namespace.

Started by file path and kept to the standard library, because it stands before every daemon that the keeper starts::

    python child.py PARENT SIGNAL UID:GID|- COMMAND [ARGUMENT ...]

HTCondor refuses to run jobs as root. In a user namespace that maps root to an ordinary user, its daemons and jobs see
themselves as that user, while the kernel still treats their files as root's: an interpreter or package under a
home directory of mode 0700 stays readable. See user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)
CLONE_NEWUSER = 0x10000000  # unshare(2)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def enter_user_namespace(uid: int, gid: int) -> None:
    """Become `uid`:`gid` of a new user namespace, in which nobody else exists.

    Raises:
        OSError: where the kernel or a container forbids user namespaces.
    """
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(CLONE_NEWUSER), "unshare")
    # A process without CAP_SETGID outside may map a group only once setgroups is given up.
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {outer_uid} 1"),
        ("gid_map", f"{gid} {outer_gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def die_with_parent(parent: int, number: int) -> None:
    """Have the kernel send signal `number` when `parent` (a process id) ends. Exits if it has ended already."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        sys.exit(1)


def main(arguments: list[str]) -> None:
    parent, number, mapping, *command = arguments
    try:
        if mapping != "-":
            uid, gid = mapping.split(":")
            enter_user_namespace(int(uid), int(gid))
        # After the change of credentials, which would clear it.
        die_with_parent(int(parent), signal.Signals[number])
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error}", file=sys.stderr)
        sys.exit(126)


if __name__ == "__main__":
    main(sys.argv[1:])
