"""Run one command as a child that dies with its parent, and, for root, as an ordinary user who reads root's files.

Started by file path and kept to the standard library, because it stands before every daemon that the keeper starts::

    python child.py PARENT SIGNAL IDENTITY SOCKET COMMAND [ARGUMENT ...]

IDENTITY is "same", or one of the two ways in which root has HTCondor, which runs no jobs as root, be someone else:

"namespace:UID:GID": a user namespace that maps root to that user. Daemons and jobs see themselves as that user, while
the kernel still treats their files as root's: an interpreter under a home directory of mode 0700 stays readable, and
they may do nothing to the files of others. See user_namespaces(7).

"capability:UID:GID": that very user, with the ambient capabilities to pass over file permissions. For containers, which
often forbid user namespaces. See capabilities(7).

SOCKET is the descriptor of a listening socket that the command is given as a service manager would, by the protocol of
sd_listen_fds(3), or "none".
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)
PR_SET_SECUREBITS = 28
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
LISTEN_FDS_START = 3  # sd_listen_fds(3)
SECBIT_NO_SETUID_FIXUP = 1 << 2  # capabilities(7): keep capabilities over setuid, and heed them in access(2)
CAP_DAC_OVERRIDE = 1
CAP_FOWNER = 3
CAPABILITY_VERSION_3 = 0x20080522  # capset(2)
CLONE_NEWUSER = 0x10000000  # unshare(2)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


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
    _check(_libc().unshare(CLONE_NEWUSER), "unshare")
    # A process without CAP_SETGID outside may map a group only once setgroups is given up.
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {outer_uid} 1"),
        ("gid_map", f"{gid} {outer_gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def become_user_with_file_access(uid: int, gid: int) -> None:
    """Become `uid`:`gid`, who with all children may still read and write root's files.

    Raises:
        OSError: where root itself lacks these capabilities.
    """
    libc = _libc()
    _check(libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0), "PR_SET_SECUREBITS")
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    capabilities = (CAP_DAC_OVERRIDE, CAP_FOWNER)
    mask = sum(1 << capability for capability in capabilities)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    # Effective, permitted, inheritable; then the same for capabilities above 31.
    sets = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)
    _check(libc.capset(header, sets), "capset")
    for capability in capabilities:
        _check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0), "PR_CAP_AMBIENT_RAISE")


def die_with_parent(parent: int, number: int) -> None:
    """Have the kernel send signal `number` when `parent` (a process id) ends. Exits if it has ended already."""
    _check(_libc().prctl(PR_SET_PDEATHSIG, number, 0, 0, 0), "PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        sys.exit(1)


def hand_over(listener: int) -> None:
    """Leave a listening socket to the command that this process becomes."""
    if listener == LISTEN_FDS_START:
        os.set_inheritable(listener, True)
    else:
        os.dup2(listener, LISTEN_FDS_START)
        os.close(listener)
    os.environ["LISTEN_FDS"] = "1"
    os.environ["LISTEN_PID"] = str(os.getpid())


def main(arguments: list[str]) -> None:
    parent, number, identity, handed_over, *command = arguments
    try:
        if handed_over != "none":
            hand_over(int(handed_over))
        way, *ids = identity.split(":")
        if way == "namespace":
            enter_user_namespace(*map(int, ids))
        elif way == "capability":
            become_user_with_file_access(*map(int, ids))
        # After the change of credentials, which would clear it.
        die_with_parent(int(parent), signal.Signals[number])
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error}", file=sys.stderr)
        sys.exit(126)


if __name__ == "__main__":
    main(sys.argv[1:])
