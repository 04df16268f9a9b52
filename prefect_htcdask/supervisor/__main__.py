"""Entry of the supervisor process: ``python -m prefect_htcdask.supervisor``, with the hand-off on stdin."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from typing import Any

from prefect_htcdask.condor.schedd import ScheddClient, ScheddError, check_description
from prefect_htcdask.condor.submit_description import JobFiles, WorkerJobError, bare_words, submit_description
from prefect_htcdask.supervisor.flow_run_watch import flow_run_ended, tell_of_cleanup
from prefect_htcdask.supervisor.loop import Supervisor
from prefect_htcdask.supervisor.parent_watch import ParentWatch
from prefect_htcdask.supervisor.protocol import GatewayAccess, Preflight, SupervisorConfig, decode, from_line
from prefect_htcdask.supervisor.report.events import cleanup_event
from prefect_htcdask.supervisor.report.files import write_report
from prefect_htcdask.supervisor.rpc import GatewayLink
from prefect_htcdask.supervisor.stdout_writer import StdoutWriter

logger = logging.getLogger(__name__)

_STOP_TIMEOUT = 60.0

_PROCESS_GONE = "the flow's process is gone"
_FLOW_RUN_OVER = "the flow run is"
ALONE = (_PROCESS_GONE, _FLOW_RUN_OVER)
"""How the reasons begin for which a supervisor ends with nobody left to tell Prefect of its cleanup."""


def preflight(request: Preflight) -> ScheddClient:
    """Check what can be checked before anything is started.

    Raises:
        ScheddError: the schedd is unreachable, unknown, or refuses us.
        WorkerJobError: the worker's settings make no submit description.
    """
    for group, spec in request.groups.items():
        files = JobFiles("/", "start.py", (), (), None)
        commands = submit_description(
            spec,
            files,
            cluster_name="preflight",
            group=group,
            flow_run=None,
            lease_expires=0,
            lost_schedd_lease=1,
        )
        check_description(commands)
    schedd = ScheddClient(request.schedd)
    try:
        schedd.query("false", ["ClusterId"], limit=1)
        schedd.user()
    except BaseException:
        schedd.close()
        raise
    return schedd


async def serve(
    schedd: ScheddClient, plan: SupervisorConfig, takeover: bool, commands: asyncio.StreamReader, outbox: StdoutWriter
) -> None:
    """Run the supervisor for a plan until it is over, then clean up."""
    say = outbox.say
    supervisor = Supervisor(plan, schedd, say)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(signum, supervisor.end, f"the supervisor got {signum.name}")
    await supervisor.start(takeover)
    say({"kind": "ready"})

    detached = plan.detached

    def parent_gone() -> None:
        if not detached:
            supervisor.end(_PROCESS_GONE)

    watch = ParentWatch(plan.parent_pid, parent_gone)
    close_request: dict[str, Any] | None = None

    async def take_commands() -> None:
        nonlocal close_request, detached
        while line := await commands.readline():
            command = from_line(line)
            reply: dict[str, Any] = {"kind": "reply", "id": command.get("id"), "ok": True}
            try:
                if command["op"] in ("scale", "adapt", "hold"):
                    group = supervisor.set_target(command)
                    reply.update(group=group.name, fixed=group.target.fixed)
                elif command["op"] == "status":
                    reply["summary"] = supervisor.worker_table.summary(time.time())
                elif command["op"] == "detach":
                    detached = True
                elif command["op"] == "close":
                    close_request = command
                    supervisor.end(command.get("reason") or "the cluster was closed")
                    continue
                else:
                    reply.update(ok=False, error=f"unknown command {command['op']!r}")
            except ValueError as exc:
                reply.update(ok=False, error=str(exc))
            say(reply)
        parent_gone()

    async def watch_flow() -> None:
        if plan.flow_run is not None:
            state = await flow_run_ended(plan.flow_run.id, plan.worker_secrets)
            say({"kind": "flow_run_ended", "state": state})
            if state in ("COMPLETED", "FAILED"):
                # Its process may still wait for task runs that nobody awaited; its end is seen without the API.
                return
            # The flow's own process, where there is one, is given time to close in its own way.
            await asyncio.sleep(10)
            supervisor.end(f"{_FLOW_RUN_OVER} {state}")

    # Kept by name: asyncio itself holds tasks weakly only.
    helpers = [asyncio.ensure_future(take_commands()), asyncio.ensure_future(watch_flow())]
    await supervisor.run()
    cleanup = supervisor.shutdown()
    await supervisor.last_look()
    await cleanup.close()
    summary = supervisor.summary()
    write_report(plan, summary)
    say({"kind": "summary", **summary, "ended_because": supervisor.ended_because})
    await asyncio.sleep(0)  # a close request may stand in the pipe behind what ended us
    if close_request is not None:
        say({"kind": "reply", "id": close_request.get("id"), "ok": True, "summary": summary})
    await cleanup.finish()
    if plan.flow_run is not None and supervisor.ended_because.startswith(ALONE):
        name = plan.access.cluster_name
        event = cleanup_event(plan.flow_run.id, cleanup.found, [name], cleanup.problems, by="supervisor")
        await tell_of_cleanup(event, plan.flow_run, plan.worker_secrets)
    watch.close()
    for helper in helpers:
        helper.cancel()


async def main() -> int:
    """Preflight, then hand-off, then the loop. Returns the exit status."""
    loop = asyncio.get_running_loop()
    outbox = StdoutWriter()
    await outbox.open()
    try:
        return await work(loop, outbox)
    finally:
        await outbox.flush()


async def next_line(commands: asyncio.StreamReader, gone: asyncio.Event) -> bytes:
    """The parent's next line; empty where there comes none any more."""
    reading = asyncio.ensure_future(commands.readline())
    ending = asyncio.ensure_future(gone.wait())
    await asyncio.wait([reading, ending], return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    # What a parent wrote before its end is in the pipe already.
    await asyncio.wait([reading], timeout=0.5)
    if reading.done():
        return reading.result()
    reading.cancel()
    return b""


async def stop_registered(access: GatewayAccess) -> None:
    """Stop a gateway cluster that never got workers, for as long as its gateway may take to come back."""
    deadline = time.monotonic() + _STOP_TIMEOUT
    while not await GatewayLink(access).stop() and time.monotonic() < deadline:
        await asyncio.sleep(1)


async def work(loop: asyncio.AbstractEventLoop, outbox: StdoutWriter) -> int:
    """What `main` does, between the opening of the outbox and its flush."""
    # By the pipe's end alone it would not be known: a forked child of the parent may hold the pipe.
    gone = asyncio.Event()
    early = ParentWatch(os.getppid(), gone.set)
    commands = asyncio.StreamReader(limit=2**26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin.buffer)
    line = await next_line(commands, gone)
    if not line:
        return 0
    request = decode(line)
    assert isinstance(request, Preflight)
    try:
        schedd = await asyncio.to_thread(preflight, request)
    except (ScheddError, WorkerJobError) as exc:
        outbox.say({"kind": "refused", "text": str(exc)})
        return 1
    for text in dict.fromkeys(text for spec in request.groups.values() for text in bare_words(spec.extra_submit)):
        outbox.say({"kind": "log", "level": "warning", "text": text})
    outbox.say({"kind": "checked"})
    try:
        return await take_over(schedd, commands, gone, early, outbox)
    finally:
        # Its token, if it has one, is in a file.
        schedd.close()


async def take_over(
    schedd: ScheddClient, commands: asyncio.StreamReader, gone: asyncio.Event, early: ParentWatch, outbox: StdoutWriter
) -> int:
    """Wait for the cluster to look after, and look after it. Returns the exit status."""
    registered: GatewayAccess | None = None
    while line := await next_line(commands, gone):
        message = decode(line)
        if not isinstance(message, GatewayAccess):
            break
        registered = message
    if not line:
        if registered is not None:
            logger.info("the flow's process went away while its gateway cluster started")
            await stop_registered(registered)
        return 0
    plan, takeover = message
    try:
        early.close()
        await serve(schedd, plan, takeover, commands, outbox)
    except Exception as exc:
        logger.exception("the supervisor failed")
        outbox.say({"kind": "refused", "text": f"{type(exc).__name__}: {exc}"})
        return 1
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("distributed").setLevel(logging.WARNING)
    status = asyncio.run(main())
    sys.stderr.flush()
    # Threads of the bindings or of dask_gateway must not keep a finished supervisor.
    os._exit(status)
