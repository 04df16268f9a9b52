"""What a person sees of a flow run in the Prefect UI, looked at in a real browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_htcdask.embedded import EmbeddedEndpoint
from tests.support.prefect_fixtures import PrefectServer
from tests.support.waiting import wait_until
from tools.browser import BrowserError, browser, chromium
from tools.prefect_server import prefect_server as running_server

SCREENSHOTS = "HTCDASK_SCREENSHOTS"
"""Environment variable with a directory that takes the screenshots; else they are beside the test's other files."""

FLOW = """
    import json, time
    from prefect import flow, task
    from prefect.runtime import flow_run
    from prefect_htcdask import HTCDaskTaskRunner

    @task
    def work(seconds):
        time.sleep(seconds)

    @flow(name="Dimuon analysis", task_runner=HTCDaskTaskRunner(
        worker={"memory": "300 MiB", "disk": "100 MiB"}, adapt_kwargs={"maximum": 3}))
    def computing():
        first = work.map([1.0] * 12)
        work.submit(12.0, wait_for=first).wait()
        print(json.dumps(str(flow_run.id)), flush=True)

    computing()
"""


@pytest.fixture(scope="module")
def installed_browser() -> None:
    """Chromium: the machine's, or one that is brought now."""
    try:
        chromium()
    except BrowserError as exc:
        pytest.skip(str(exc))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PrefectServer]:
    """A Prefect server with its UI."""
    with running_server(tmp_path / "prefect", ui=True) as one:
        yield one


@pytest.fixture
def page(installed_browser: None, tmp_path: Path) -> Iterator[Any]:
    with browser(tmp_path / "profile") as driver:
        yield driver


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    directory = Path(os.environ.get(SCREENSHOTS) or tmp_path / "screenshots")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def text_of(page: Any) -> str:
    return str(page.find_element("tag name", "body").text)


def see(page: Any, address: str, words: str) -> None:
    """Open a page, and wait until it shows some words."""
    page.get(address)
    wait_until(lambda: words in text_of(page), 60, f"{words!r} at {address}")


def drawn_lines(page: Any) -> list[int]:
    """How many lines each diagram on the page has: SVG paths in Mermaid's groups of lines."""
    script = """
        return Array.from(document.querySelectorAll('svg[aria-roledescription=xychart]')).map(
            svg => svg.querySelectorAll('g.plot path').length)
    """
    found: list[int] = page.execute_script(script)
    return found


@pytest.mark.pool
@pytest.mark.timeout(600)
def test_the_flow_run_s_page_has_the_artifacts_and_the_report_a_diagram(
    condor_environment: EmbeddedEndpoint,
    server: PrefectServer,
    page: Any,
    screenshots: Path,
    tmp_path: Path,
) -> None:
    script = tmp_path / "analysis.py"
    script.write_text(textwrap.dedent(FLOW))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **server.environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    flow_run_id = json.loads(done.stdout.splitlines()[-1])
    wanted = {"flow_runs": {"id": {"any_": [flow_run_id]}}}
    answer = httpx.post(f"{server.url}/artifacts/filter", json=wanted).raise_for_status().json()
    artifacts = {one["key"].removeprefix("dimuon-analysis-"): one["id"] for one in answer if one["key"]}
    assert set(artifacts) == {"dask-dashboard", "task-progress", "htcondor-jobs", "htcondor-report"}

    new = f"{server.ui}/v2"
    see(page, f"{new}/runs/flow-run/{flow_run_id}?tab=Artifacts", "dimuon-analysis-htcondor-report")
    page.save_screenshot(str(screenshots / "flow-run.png"))
    listed = text_of(page)
    assert all(f"dimuon-analysis-{name}" in listed for name in artifacts)

    see(page, f"{new}/artifacts/artifact/{artifacts['htcondor-report']}", "What to change")
    wait_until(lambda: drawn_lines(page) == [3, 1], 60, "two diagrams, of three lines and of one")
    page.save_screenshot(str(screenshots / "report.png"))
    shown = text_of(page)
    assert "xychart" not in shown, "the diagrams are drawn, their source is not shown"
    for words in ("13 ended of 13 known", "Core-hours wasted", "Queue wait", "Evictions"):
        assert words in shown

    see(page, f"{new}/artifacts/artifact/{artifacts['htcondor-jobs']}", "peak memory")
    page.save_screenshot(str(screenshots / "jobs.png"))
    assert "core-hours" in text_of(page) and "of 300 MiB" in text_of(page)

    see(page, f"{new}/artifacts/artifact/{artifacts['task-progress']}", "13 of 13 tasks")
    page.save_screenshot(str(screenshots / "progress.png"))

    # What a user of a scheduled flow looks through.
    see(page, f"{new}/artifacts", "dimuon-analysis-htcondor-report")
    page.save_screenshot(str(screenshots / "artifacts.png"))

    # The first version of the UI draws no Mermaid: the table shows the course of it.
    see(page, f"{server.ui}/artifacts/artifact/{artifacts['htcondor-report']}", "from the beginning to the end")
    page.save_screenshot(str(screenshots / "report-v1.png"))
    assert any(block in text_of(page) for block in "▁▂▃▄▅▆▇█")
