"""The CI examples in rigs/ci: their commands, as they stand, on a farm of little boards.

What is run is the text of their steps, with the variables that they declare; only the values that
the files tell people to change are changed. The systems themselves are not here.
"""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from attrs import frozen
from bench_desk import ROOT, SCENARIOS, FarmDesk

CI = ROOT / "rigs" / "ci"
Farm = Callable[..., FarmDesk]


@frozen
class Job:
    """What a system would run: variables, steps until one fails, and steps after that."""

    variables: dict[str, str]
    steps: tuple[str, ...]
    after: tuple[str, ...]


def gitlab() -> Job:
    told = yaml.safe_load((CI / "gitlab-ci.yml").read_text())
    job = told["scenarios on boards"]
    assert job["allow_failure"]["exit_codes"] == 4
    return Job(told["variables"], tuple(job["script"]), tuple(job["after_script"]))


def github() -> Job:
    told = yaml.safe_load((CI / "github-actions.yml").read_text())
    steps = [s for s in told["jobs"]["scenarios"]["steps"] if "run" in s]
    always = [s for s in steps if s.get("if") == "always()"]
    return Job(
        told["env"],
        tuple(s["run"] for s in steps if s not in always),
        tuple(s["run"] for s in always),
    )


def jenkins() -> Job:
    text = (CI / "Jenkinsfile").read_text()
    assert text.count("{") == text.count("}")
    body, _, post = text.partition("    post {")
    sh = re.compile(
        r"sh\(?(?:returnStatus: true, script: )?\s*(?:'''(.*?)'''|'([^']*)')", re.DOTALL
    )

    def scripts(part: str) -> tuple[str, ...]:
        # Groovy takes the backslash and the line's end away, as the shell would.
        return tuple(textwrap.dedent(a or b) for a, b in sh.findall(part.replace("\\\n", "")))

    variables = dict(re.findall(r"^\s+([A-Z_]+) = '([^']*)'$", text, re.MULTILINE))
    return Job(variables, scripts(body), scripts(post))


def ran(job: Job, farm: FarmDesk, scenarios: str) -> tuple[int, str]:
    """Run a job as its system would; the exit code of what failed first, and all that was told."""
    changed = {
        "LG_COORDINATOR": farm.coordinator,
        "FARM_RIG": str(farm.rig),
        "FARM_TAGS": "board=little",
        "FARM_BOARDS": "2",
        "FARM_SCENARIOS": scenarios,
    }
    assert set(changed) == set(job.variables)
    work = farm.folder / "work"  # a checkout: what it makes must not stay in this one
    work.mkdir(exist_ok=True)
    for name in (".ci", ".venv", "framework", "images", "pyproject.toml", "rigs", "tests"):
        if not (work / name).is_symlink():
            (work / name).symlink_to(ROOT / name)
    environment = {**os.environ, "FARM_MARK": str(farm.folder / "mark"), **changed}
    told, code = "", 0
    for step in job.steps:
        ended = shell(step, work, environment)
        told += ended.stdout
        if ended.returncode:
            code = ended.returncode
            break
    for step in job.after:
        ended = shell(step, work, environment)
        told += ended.stdout
        assert ended.returncode == 0, ended.stdout
    return code, told


def shell(step: str, work: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    if step.strip() == ".ci/bootstrap":
        work = ROOT  # it knows where it is by its own path; everything is there already
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", step],
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("example", [gitlab, github, jenkins])
def test_its_commands_are_those_that_there_are(example: Callable[[], Job]) -> None:
    """Cheap, and for every run: a renamed option would break all users' jobs."""
    from click.testing import CliRunner

    from framework.cli import cli

    job = example()
    text = " ".join((*job.steps, *job.after))
    assert job.steps[0].strip() == ".ci/bootstrap"
    for verb in ("run", "free", "stats"):
        assert f"brownout farm {verb}" in text
    helped = CliRunner().invoke(cli, ["farm", "run", "--help"]).output
    for option in re.findall(r" (--[a-z-]+)", text):
        assert option in helped
    assert (ROOT / job.variables["FARM_RIG"]).exists()
    assert (ROOT / job.variables["FARM_SCENARIOS"].split()[0]).exists()


@pytest.mark.night
@pytest.mark.parametrize("example", [gitlab, github, jenkins])
def test_its_steps_run_as_they_stand(example: Callable[[], Job], farm_desk: Farm) -> None:
    farm = farm_desk("", "")
    job = example()
    killed = farm.start("--skip-check", "-k", "meanwhile")
    farm.mark()
    killed.kill()
    killed.communicate()
    code, told = ran(job, farm, f"{SCENARIOS} -k [0]")
    assert code == 0, told
    assert "its process has ended; freed" in told
    assert "1 PASS; 0 tried again" in told
    build = farm.folder / "work" / "build" / "farm"
    assert (build / "report.html").exists()
    assert 'failures="0"' in (build / "junit.xml").read_text()
    assert not farm.held()
    code, told = ran(job, farm, f"{SCENARIOS} -k product_fails")
    assert code == 1, told
    assert not farm.held()
