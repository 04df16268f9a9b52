"""The README's code runs as it is printed, and its settings and files exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.settings import ENV_PREFIX, WORKERS_VARIABLE, HTCDaskSettings
from tests.prefect_fixtures import PrefectServer

CHECKOUT = Path(__file__).resolve().parent.parent
README = (CHECKOUT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("block", "prints"), list(zip(BLOCKS, ["285", "6", "6561"], strict=True)))
def test_code_of_the_readme_runs(
    block: str, prints: str, tmp_path: Path, prefect_api: PrefectServer, htcdask_environment: EmbeddedEndpoint
) -> None:
    script = tmp_path / "own_flow.py"
    script.write_text(block)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [prints], done.stderr


def test_settings_of_the_readme_exist() -> None:
    known = {WORKERS_VARIABLE} | {
        f"{ENV_PREFIX}{group}_{field}".upper()
        for group, about in HTCDaskSettings.model_fields.items()
        for field in getattr(about.annotation, "model_fields", ())
    }
    named = set(re.findall(rf"{ENV_PREFIX}\w+", README))
    assert len(named) > 5 and named <= known


def test_links_of_the_readme_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets and all((CHECKOUT / target).exists() for target in targets)
