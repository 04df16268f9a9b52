"""The configuration of the personal HTCondor pool. Only the keeper's process uses this: it imports the bindings."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Collection
from pathlib import Path

from prefect_htcdask.embedded.condor_binaries import CondorBinaries
from prefect_htcdask.embedded.errors import EmbeddedError
from prefect_htcdask.embedded.listeners import PORT_OWNERS

MINIMUM_CPUS = 4
"""Cores that the pool offers at least, so that a small machine runs several workers too."""

LONGEST_SOCKET_NAME = 40
"""Characters to allow for HTCondor's socket names, such as negotiator_1234567_abcd_12."""

SOCKET_PATH_LIMIT = 107
"""Bytes of a Unix socket's path, without the final zero: unix(7)."""


def pool_user() -> pwd.struct_passwd:
    """The user that the daemons and jobs see themselves as.

    That is the caller, except for root: HTCondor runs no jobs as root, so another user's name stands for it
    inside the pool's user namespace.

    Raises:
        EmbeddedError: where the caller has no entry in the password database.
    """
    uid = os.geteuid()
    if uid == 0:
        uid = min(entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid not in (0, 65534))
    try:
        return pwd.getpwuid(uid)
    except KeyError as error:
        raise EmbeddedError(
            f"user id {uid} has no entry in the password database, which HTCondor needs; add one"
        ) from error


def kernel_uids(identity: str) -> set[int]:
    """Under which user ids the kernel knows sockets that the daemons make: see `child` for the ways of root."""
    way, *ids = identity.split(":")
    return {int(ids[0])} if way == "capability" else {os.geteuid()}


def socket_directory(pool: Path) -> Path | None:
    """A short private directory for sockets where those of `pool` would have too long a path, else `None`."""
    if len(os.fsencode(pool / "sock")) + 1 + LONGEST_SOCKET_NAME <= SOCKET_PATH_LIMIT:
        return None
    return Path(tempfile.mkdtemp(prefix="htcdask-", dir="/tmp"))


def configure_pool(
    pool: Path,
    binaries: CondorBinaries,
    *,
    port: int,
    cpus: int | None,
    memory: int | None,
    sockets: Path | None,
    identity: str,
    owners: Collection[int],
) -> Path:
    """Write the directories and the configuration of a personal pool.

    Args:
        pool: where the pool keeps all it has.
        binaries: HTCondor's programs.
        port: the collector's, and every daemon's, TCP port on loopback.
        cpus: cores to offer; `None` for the machine's, and `MINIMUM_CPUS` at least.
        memory: bytes to offer; `None` for the machine's.
        sockets: directory for Unix sockets, if not `pool`'s own.
        identity: as whom the daemons will run: see `child`.
        owners: ids of the users whose the pool's port may be, as the kernel tells them.

    Returns:
        the configuration file (CONDOR_CONFIG).
    """
    # The bindings read a configuration when they are imported, and complain where there is none.
    os.environ["CONDOR_CONFIG"] = "/dev/null"
    from htcondor2.personal import PersonalPool

    config = {
        "RELEASE_DIR": str(binaries.release),
        "BIN": str(binaries.release / "bin"),
        "SBIN": str(binaries.release / "sbin"),
        "LIB": str(binaries.lib),
        "LIBEXEC": str(binaries.libexec),
        "SHARE": str(binaries.release / "share" / "condor"),
        **_network(port, sockets or pool / "sock"),
        **_security(),
        **_cycles(),
        # Read by our own programs alone, before they prove to whoever listens there who they are.
        PORT_OWNERS: " ".join(map(str, sorted(owners))),
        "NUM_CPUS": str(cpus or max(MINIMUM_CPUS, len(os.sched_getaffinity(0)))),
        # History is of no use to a pool that forgets its queue.
        "MAX_HISTORY_ROTATIONS": "1",
        "MAX_HISTORY_LOG": "1000000",
        "MAX_JOBS_PER_OWNER": "1000000",
        "MAX_JOBS_PER_SUBMISSION": "100000",
        "MAX_JOBS_RUNNING": "10000",
    }
    if memory is not None:
        config["MEMORY"] = str(memory // 1024**2)
    if os.geteuid() == 0:
        # Jobs look for their home directory under the user name that stands for root, which has none of use.
        config["STARTER_JOB_ENVIRONMENT"] = f'"HOME={pwd.getpwuid(0).pw_dir}"'
        # Root's own programs (condor_q and so on) stay root, instead of looking for a user "condor".
        config["CONDOR_IDS"] = "0.0"
    if identity.startswith("capability"):
        config["CERTIFICATE_MAPFILE"] = str(pool / "mapfile")
    # Detached: the keeper ends the daemons itself, and not at some deletion of this object.
    personal = PersonalPool(local_dir=pool, config=config, detach=True, use_config=False)
    personal.initialize()
    pool.chmod(0o700)
    (sockets or pool / "sock").mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() == 0:
        (pool / "mapfile").write_text(f"FS root {pool_user().pw_name}\n")
        owner = pool_user() if identity.startswith("capability") else pwd.getpwuid(0)
        for top in (pool, *([sockets] if sockets else [])):
            _give_to(owner, top)
    return Path(personal.config_file)


def _give_to(owner: pwd.struct_passwd, top: Path) -> None:
    """Have the user as whom the kernel knows the daemons own their files, also those of an earlier start."""
    for directory, _, files in os.walk(top):
        for path in (directory, *(os.path.join(directory, name) for name in files)):
            os.chown(path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)


def _network(port: int, sockets: Path) -> dict[str, str]:
    """Loopback only, one port for all daemons, and no look-up of names."""
    return {
        "NETWORK_INTERFACE": "127.0.0.1",
        "BIND_ALL_INTERFACES": "False",
        "ENABLE_IPV6": "False",
        "NETWORK_HOSTNAME": "localhost",
        "UID_DOMAIN": "localhost",
        "FILESYSTEM_DOMAIN": "localhost",
        "CONDOR_HOST": "127.0.0.1",
        "COLLECTOR_HOST": f"127.0.0.1:{port}",
        "USE_SHARED_PORT": "True",
        "DAEMON_SOCKET_DIR": str(sockets),
        # The daemons' own user would reach these two past the shared port, at ports that nobody keeps for them.
        "SCHEDD_SUPER_ADDRESS_FILE": "",
        "COLLECTOR_SUPER_ADDRESS_FILE": "",
        "CONDOR_ADMIN": "",
        "CONDOR_DEVELOPERS": "NONE",
    }


def _security() -> dict[str, str]:
    """Everyone proves by the file system who they are, and nobody but the pool's own user may do anything."""
    return {
        "SEC_DEFAULT_AUTHENTICATION": "REQUIRED",
        "SEC_DEFAULT_AUTHENTICATION_METHODS": "FS",
        **{
            f"SEC_{level}_AUTHENTICATION": "REQUIRED"
            for level in ("READ", "WRITE", "NEGOTIATOR", "ADMINISTRATOR", "CONFIG", "ADVERTISE_STARTD")
        },
        # Bindings of release 25 expect what the daemons of release 23 do not offer.
        "SEC_FS_ENFORCE_CHANNEL_BINDING": "False",
        "self": f"{pool_user().pw_name}@$(UID_DOMAIN)",
        "ALLOW_CONFIG": "",
        "ALLOW_CLIENT": "*",
    }


def _cycles() -> dict[str, str]:
    """Short cycles: one user and one machine, so a job need not wait."""
    return {
        "NEGOTIATOR_INTERVAL": "1",
        "NEGOTIATOR_MIN_INTERVAL": "1",
        "NEGOTIATOR_CYCLE_DELAY": "1",
        # The schedd tells of new jobs at once, not 5 s after its last word.
        "SCHEDD_MIN_INTERVAL": "0",
        "SCHEDD_INTERVAL": "5",
        "PERIODIC_EXPR_INTERVAL": "5",
        # Shadows hear of a job's edits, such as a renewed lease, after this time; 30 s by default.
        "SCHEDD_JOB_QUEUE_NOTIFY_UPDATES": "1",
        "MAX_PERIODIC_EXPR_INTERVAL": "5",
        "MASTER_BACKOFF_CONSTANT": "1",
        "MASTER_NEW_BINARY_RESTART": "NEVER",
        "SHUTDOWN_FAST_TIMEOUT": "30",
        "SHUTDOWN_GRACEFUL_TIMEOUT": "20",
        "JOB_START_COUNT": "50",
        "JOB_STOP_COUNT": "100",
    }
