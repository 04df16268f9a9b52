"""README and documents: every block of code is run, or at least read by what it is for; every name in them exists."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dask_gateway_server.app import DaskGateway
from dask_gateway_server.backends.base import ClusterConfig
from traitlets.config import PyFileConfigLoader

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from prefect_htcdask.condor.diagnosis import Category
from prefect_htcdask.settings import ENV_PREFIX, WORKERS_VARIABLE, HTCDaskSettings, WorkerGroupSettings, load_settings
from tests.support.doc_blocks import ALL, CHECKOUT, PAGES, Block, blocks_of
from tests.support.prefect_fixtures import PrefectServer
from tools.settings_reference import command_reference, default, kind, settings_reference

FIELDS = {
    group: WorkerGroupSettings.model_fields if group == "workers" else getattr(about.annotation, "model_fields", {})
    for group, about in HTCDaskSettings.model_fields.items()
}
VARIABLES = {WORKERS_VARIABLE} | {
    f"{ENV_PREFIX}{group}_{field}".upper() for group, fields in FIELDS.items() if group != "workers" for field in fields
}
RUN = {"python", "bash"}
NOT_RUN = {"README.md": 3, "getting-started.md": 2, "index.md": 1, "site.md": 6}
"""How many blocks of each page are not run; each says why. One more is one to think about."""


def of_language(*languages: str) -> list[Block]:
    return [block for block in ALL if block.language in languages]


def test_what_is_not_run_says_why_and_is_counted() -> None:
    assert Counter(block.page.name for block in ALL if block.not_run) == NOT_RUN
    assert all(len(block.not_run) > 20 for block in ALL if block.not_run)
    assert {block.language for block in ALL} <= RUN | {"toml", "yaml", "text"}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, prefect_server: PrefectServer) -> Iterator[dict[str, str]]:
    """The environment of somebody who reads the documents and has nothing: a pool is started where they need one."""
    home = tmp_path_factory.mktemp("reader")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "200",
        f"{ENV_PREFIX}EMBEDDED_DIRECTORY": str(home / "embedded"),
        f"{ENV_PREFIX}EMBEDDED_USE_CONFIGURED_POOL": "false",
        f"{ENV_PREFIX}CONDOR_DIRECTORY": str(home / "runs"),
    }
    yield environment
    subprocess.run(["prefect-htcdask", "down"], env=environment, check=True, capture_output=True, timeout=60)


@pytest.mark.pool
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language in RUN for b in blocks_of(page))], ids=str)
def test_what_a_page_says_can_be_typed(page: Path, reader: dict[str, str], tmp_path: Path) -> None:
    """The blocks of a page, one after the other, in one directory."""
    for block in blocks_of(page):
        if block.language not in RUN or block.not_run or block.gateway:
            continue
        script = tmp_path / (block.title or f"block.{block.language}")
        script.write_text(block.code)
        command = [sys.executable, str(script)] if block.language == "python" else ["bash", "-eu", str(script)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=reader,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, f"{block}: {done.stdout}{done.stderr}"
        if block.prints is not None:
            assert re.search(rf"(?<!\w){re.escape(block.prints)}(?!\w)", done.stdout), f"{block}: {done.stdout}"


@pytest.mark.parametrize("block", of_language("python"), ids=str)
def test_python_is_python_and_what_it_imports_exists(block: Block) -> None:
    # A line with a decorator alone is half of a function.
    code = f"{block.code}def flow(): ..." if block.code.rstrip().splitlines()[-1].startswith("@") else block.code
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = __import__(str(node.module), fromlist=["*"])
            assert all(hasattr(module, alias.name) for alias in node.names), f"{block}: {ast.unparse(node)}"


@pytest.mark.parametrize("block", of_language("bash"), ids=str)
def test_bash_is_bash_and_its_files_and_targets_exist(block: Block) -> None:
    read = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
    assert read.returncode == 0, read.stderr
    for target in re.findall(r"^make (\w+)", block.code, re.MULTILINE):
        assert re.search(rf"^{target}:", (CHECKOUT / "Makefile").read_text(), re.MULTILINE), target
    for name in re.findall(r"(?:-c|--prefect-file) (\S+\.\w+)", block.code):
        assert (CHECKOUT / name).exists(), name


@pytest.mark.parametrize("block", of_language("toml"), ids=str)
def test_settings_in_toml_are_what_the_settings_become(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert block.title == "prefect.toml"
    (tmp_path / block.title).write_text(block.code)
    groups = tomllib.loads(block.code)["integrations"]["htcdask"]
    settings = load_settings()
    assert groups
    for group, values in groups.items():
        # What is no setting would be ignored without a word.
        assert values and values.keys() <= FIELDS[group].keys(), f"{block}: {group}"
        given = load_settings(**{group: values})
        for name in values:
            assert getattr(getattr(settings, group), name) == getattr(getattr(given, group), name)
            assert name in getattr(settings, group).model_fields_set


@pytest.mark.parametrize("block", of_language("yaml"), ids=str)
def test_yaml_is_a_deployment_of_ours(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = yaml.safe_load((CHECKOUT / "deployments" / "prefect.yaml").read_text())
    for deployment in yaml.safe_load(block.code)["deployments"]:
        assert (deployment["name"], deployment["entrypoint"]) in {
            (one["name"], one["entrypoint"]) for one in ours["deployments"]
        }
        for name, value in deployment["work_pool"]["job_variables"]["env"].items():
            assert name in VARIABLES
            monkeypatch.setenv(name, value)
    assert load_settings().gateway.credentials_block == "our-gateway"


@pytest.mark.parametrize("block", [block for block in ALL if block.gateway], ids=str)
def test_gateway_configuration_is_what_the_gateway_takes(block: Block, tmp_path: Path) -> None:
    (tmp_path / block.title).write_text(block.code)
    loaded = PyFileConfigLoader(block.title, path=str(tmp_path)).load_config()
    classes: dict[str, Any] = {"ClusterConfig": ClusterConfig, "DaskGateway": DaskGateway}
    assert loaded
    for name, values in loaded.items():
        assert values.keys() <= classes[name].class_traits().keys()
    config = ClusterConfig(scheduler_cmd=loaded.ClusterConfig.scheduler_cmd)
    done = subprocess.run(
        [str(Path(sys.executable).parent / config.scheduler_cmd[0]), *config.scheduler_cmd[1:], "--version"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    assert set(re.findall(rf"{ENV_PREFIX}[A-Z_]*[A-Z]", text)) <= VARIABLES
    named = re.findall(rf"`({'|'.join(FIELDS)})\.(\w+)[^`]*`", text)
    # Files, and a setting of Dask's configuration: gateway.http-client.
    others = {("gateway", "log"), ("report", "md"), ("report", "svg"), ("gateway", "http")}
    assert {(group, field) for group, field in named if field not in FIELDS[group]} <= others


FOR_CONTRIBUTORS = [
    CHECKOUT / "CONTRIBUTING.md",
    *(CHECKOUT / "docs" / name for name in ("architecture.md", "end-of-a-flow.md", "how-it-works.md", "upstream.md")),
    CHECKOUT / "docs" / "glossary.md",
    *sorted((CHECKOUT / "docs" / "decisions").glob("*.md")),
]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_outside_of_the_documents_lead_somewhere(name: str) -> None:
    """Those of the documents are checked by the strict build."""
    text = (CHECKOUT / name).read_text()
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert targets and all((CHECKOUT / target.partition("#")[0]).exists() for target in targets)


@pytest.mark.parametrize("page", FOR_CONTRIBUTORS, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Paths count from the package, or from the checkout."""
    for name in set(re.findall(r"`([a-z_]+/[a-z_/]*(?:\.py)?)`", page.read_text())):
        assert (CHECKOUT / "prefect_htcdask" / name).exists() or (CHECKOUT / name).exists(), name


def test_limits_of_the_end_of_a_flow_are_where_its_page_says() -> None:
    """A row of a table that names modules has no other constants than these define."""
    for row in re.findall(r"^\|.*", (CHECKOUT / "docs" / "end-of-a-flow.md").read_text(), re.MULTILINE):
        modules = re.findall(r"`([a-z_]+/[a-z_/]*\.py)`", row)
        code = "".join((CHECKOUT / "prefect_htcdask" / name).read_text() for name in modules)
        for constant in re.findall(r"`(_?[A-Z]{2}[A-Z_]+)`", row) if modules else ():
            assert re.search(rf"^{constant} = ", code, re.MULTILINE), row


def test_every_diagnosis_has_a_section_and_no_other_has() -> None:
    text = (CHECKOUT / "docs" / "troubleshooting.md").read_text()
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        title, _, body = section.partition("\n")
        named = re.fullmatch(r"`(\w+)` \{#(\w+)\}", title)
        assert named and named[1] == named[2], title
        found[named[1]] = body.split("\n## ")[0].strip()
    assert list(found) == [category.value for category in Category], "all of them, in the order of the code"
    assert all(len(body) > 80 for body in found.values())


def test_the_reference_has_every_setting_with_its_variable() -> None:
    text = settings_reference()
    for group, fields in FIELDS.items():
        for name, field in fields.items():
            if group == "workers":
                continue
            section = text.split(f"### `{group}.{name}` ")[1].split("### ")[0]
            assert f"`{ENV_PREFIX}{group.upper()}_{name.upper()}`" in section
            assert field.description in section and kind(field) in section and default(field) in section
    assert "### `workers.NAME.minimum`" in text and "### `workers.NAME.cpus`" not in text


@pytest.mark.parametrize(
    ("group", "name", "takes", "has"),
    [
        ("worker", "memory", "size", "`2 GiB`"),
        ("worker", "cpus", "whole number, at least 1", "`1`"),
        ("worker", "nthreads", "whole number, at least 1", "unset"),
        ("worker", "lifetime", "duration", "unset"),
        ("worker", "environment", "mapping of text to text", "empty"),
        ("worker", "resources", "mapping of text to number", "empty"),
        ("condor", "keep_logs", "duration", "`7 days`"),
        ("condor", "spool", "true or false", "`false`"),
        ("gateway", "password", "secret text", "unset"),
        ("adaptive", "residence", "duration", "`4 s`"),
        ("lease", "duration", "duration, at least 5", "`3 minutes`"),
        ("embedded", "memory", "size", "unset"),
    ],
)
def test_a_field_in_words(group: str, name: str, takes: str, has: str) -> None:
    field = FIELDS[group][name]
    assert (kind(field), default(field)) == (takes, has)


def test_the_reference_has_every_command_with_its_options() -> None:
    text = command_reference()
    said = subprocess.run([sys.executable, "-m", "prefect_htcdask.cli", "--help"], capture_output=True, text=True)
    commands = re.findall(r"^[│ ]*([a-z]+)  ", said.stdout, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        assert f"## `prefect-htcdask {command}`" in text
    assert "- `--dry-run`: Only say what would be removed" in text


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_site_builds_without_a_warning_and_needs_no_other_host(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.stem: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in PAGES} - {"README"} <= pages.keys()
    for name, text in pages.items():
        assert "<!--" not in re.sub(r"<!-- test:.*?-->", "", text) or name == "404", f"{name}: a part was not put in"
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*?(?:src|href)="(https?://[^"]+)"', text)
        assert [url for url in loaded if "fonts" in url or "cdn" in url or "unpkg" in url] == []
    assert "held_memory" in pages["troubleshooting"] and "scheduler_duration" not in pages["settings"]
    assert f"{ENV_PREFIX}GATEWAY_CREDENTIALS_BLOCK" in pages["settings"]
