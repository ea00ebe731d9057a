"""The pytest plugin: fixtures `device`, `update`, `faults`, and the verdict of each scenario.

A test that takes `device` is a scenario. When its body has ended, everything that was seen is
judged by all invariants; a broken one fails the test (`ViolationError`), a rig that lost contact
breaks it (`InfrastructureError`). A result file and Allure attachments are left either way.

Markers:
    base(variant): the image in slot a at the beginning (default v1).
    update(variant): the image in the update (default v2).
    images(variants...): further images that it uses.
    planted(violates=n): something is broken on purpose; the scenario must turn red with invariant
        n (or all of a tuple), and the test passes if it does.
    managed: the device's daemon gets its updates from a management server.
    demo, smoke: subsets of the suite.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import re
import zlib
from collections.abc import Generator, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import allure
import pytest

from framework.campaign.collect import Collector
from framework.campaign.manner import OPTION
from framework.explore.recording import SUFFIX
from framework.faults import Fault, MissingFeatureError, Trigger, UnfiredError
from framework.network import FaultProxy
from framework.report import ResultStore, cause_of
from framework.report.allure import leave_context
from framework.report.results import name_of
from framework.scenario.arming import Faults, missing_features
from framework.scenario.bench import Bench, BenchError, open_bench
from framework.scenario.capture import Scribe, scribe_of
from framework.scenario.device import Device, Update
from framework.scenario.record import attach, record
from framework.scenario.stage import staged_device, staged_faults
from framework.targets.errors import InfrastructureError, RigError
from framework.targets.qemu import RecordedQEMUDriver
from framework.targets.rig import board_recipe, check_rig, load_rig, rig_features
from framework.verdict import Outcome, Verdict, ViolationError
from images import ImageError, Progress, build_target, recipe_names


class NoVerdictError(Exception):
    """A scenario ended without anything to judge: it proved nothing, so it is wrong."""


DEFAULT_BASE = "v1"
DEFAULT_UPDATE = "v2"
MARKERS = (
    "base(variant): image in slot a at the beginning",
    "update(variant): image in the update",
    "images(*variants): further images that the scenario uses",
    "planted(violates): broken on purpose; must turn red with this invariant",
    "demo(cost): part of `make demo`; the relative cost, to balance its processes",
    "smoke: the few scenarios that say most",
    "managed: the device's daemon gets its updates from a management server",
)
MANAGED_NEEDS = frozenset({"network", "linux"})
SLOW_STEP_S = 1.0
COLLECTOR = pytest.StashKey[Collector]()
DEVICE = pytest.StashKey[Device]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Our options."""
    group = parser.getgroup("brownout")
    group.addoption(
        "--brownout-results",
        type=Path,
        default=None,
        metavar="DIR",
        help="leave one result file a scenario in DIR (for `brownout report html`)",
    )
    group.addoption(
        "--brownout-bundles",
        type=Path,
        default=None,
        metavar="DIR",
        help="leave a bundle of each scenario in DIR (for `brownout replay`)",
    )
    group.addoption(
        "--brownout-recordings",
        type=Path,
        default=None,
        metavar="DIR",
        help="leave a recording of each scenario in DIR (for `brownout explore`)",
    )
    group.addoption(
        "--brownout-allure-history",
        type=Path,
        default=None,
        metavar="DIR",
        help="the folder `history` of the last Allure report, whose trends the next one goes on",
    )
    group.addoption(
        "--brownout-share",
        type=_share,
        default=None,
        metavar="I/N",
        help="run only the Ith of N shares of the scenarios (one process each, without xdist)",
    )
    group.addoption(
        OPTION,
        action="store_true",
        help="count the machine's time in instructions, so that a scenario without network does "
        "the same to the disks in each run; scenarios with network are skipped",
    )
    group.addoption(
        "--brownout-seed",
        type=int,
        default=1,
        metavar="N",
        help="seed of every random choice; each scenario derives its own (default: 1)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers; refuse a rig file that makes no sense before anything runs."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    rig = config.getoption("lg_env", default=None)
    if rig is not None and not _worker(config):
        target = Path(rig).stem
        try:
            if target in recipe_names():
                build_target(target, progress=_tell_build, relock_if_gone=True)
            check_rig(rig)
        except (RigError, ImageError) as error:
            raise pytest.UsageError(str(error)) from error


def _tell_build(progress: Progress) -> None:
    """Say which part of an image was built: the first build takes a while."""
    if progress.finished and progress.seconds >= SLOW_STEP_S:
        print(f"images: {progress.step} ({progress.seconds:.0f} s)", flush=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what the rig can't do; keep this process's share of the scenarios, longest first."""
    _skip_what_the_rig_lacks(config, items)
    share = config.getoption("brownout_share")
    if share is None:
        return
    index, count = share
    items.sort(key=_cost, reverse=True)
    # There and back again (0 1 1 0 0 1 ...), so that the long ones are spread evenly.
    mine = [
        item
        for place, item in enumerate(items)
        if (place % count if place // count % 2 == 0 else count - 1 - place % count) == index
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine


def _skip_what_the_rig_lacks(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip scenarios that are for other rigs, naming the features, as far as that is known yet."""
    rig = config.getoption("lg_env", default=None)
    if rig is None:
        return
    features: frozenset[str] | None = None
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
        managed = item.get_closest_marker("managed") is not None
        if not managed and not any(isinstance(value, Fault | Trigger) for value in parameters):
            continue
        if features is None:
            features = rig_features(Path(rig))
        lacking = missing_features(parameters, features)
        if managed:
            lacking |= MANAGED_NEEDS - features
        missing = sorted(lacking)
        if missing:
            lacks = f"needs the feature {', '.join(missing)}, which {Path(rig).name} does not have"
            item.add_marker(pytest.mark.skip(reason=lacks))


def _cost(item: pytest.Item) -> int:
    marker = item.get_closest_marker("demo")
    return 0 if marker is None else int(marker.kwargs.get("cost", 1))


def _share(text: str) -> tuple[int, int]:
    """`1/2` is the first of two shares: (0, 2)."""
    match = re.fullmatch(r"([1-9]\d?)/([1-9]\d?)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1/2")
    return int(match[1]) - 1, int(match[2])


@pytest.hookimpl(wrapper=True)
def pytest_collection_finish(session: pytest.Session) -> Generator[None, None, None]:
    """Build a board's images before anything holds it; tell how many scenarios there are."""
    rig = session.config.getoption("lg_env", default=None)
    if rig is not None and not session.config.option.collectonly:
        uses = [item for item in session.items if "bench" in getattr(item, "fixturenames", ())]
        recipe = board_recipe(load_rig(rig)) if uses else ""
        if recipe:
            try:
                build_target(recipe, _variants(uses), progress=_tell_build, relock_if_gone=True)
            except ImageError as error:
                raise pytest.UsageError(str(error)) from error
    _tell_count(session)
    return (yield)


def _tell_count(session: pytest.Session) -> None:
    """Tell a live display how many scenarios this process has."""
    store = _store(session.config)
    if store is None or _worker(session.config) not in ("", "gw0"):
        return
    scenarios = [item for item in session.items if "device" in getattr(item, "fixturenames", ())]
    store.progress("", "count", str(len(scenarios)))


def _worker(config: pytest.Config) -> str:
    """The xdist worker's name, empty without xdist."""
    return str(getattr(config, "workerinput", {}).get("workerid", ""))


def _store(config: pytest.Config) -> ResultStore | None:
    directory = config.getoption("brownout_results")
    return None if directory is None else ResultStore(directory)


def _variants(items: Iterable[pytest.Item]) -> list[str]:
    """All images that some scenarios use."""
    wanted = {DEFAULT_BASE, DEFAULT_UPDATE}
    for item in items:
        for name in ("base", "update"):
            wanted.update(str(marker.args[0]) for marker in item.iter_markers(name))
        for marker in item.iter_markers("images"):
            wanted.update(str(name) for name in marker.args)
    return sorted(wanted)


def _variant(request: pytest.FixtureRequest, marker: str, default: str) -> str:
    found = request.node.get_closest_marker(marker)
    return str(found.args[0]) if found is not None else default


def _seed(request: pytest.FixtureRequest) -> int:
    """The scenario's own seed: of its node id and the run's seed."""
    base = int(request.config.getoption("brownout_seed"))
    return zlib.crc32(f"{base}:{request.node.nodeid}".encode())


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The rig's machine, its images, and a TLS server with artifacts, for the whole session."""
    if request.config.getoption("lg_env", default=None) is None:
        pytest.skip("needs a rig: pytest --lg-env rigs/qemu-arm64.yaml")
    try:
        opened = open_bench(request, _variants(request.session.items))
        if request.config.getoption(OPTION.removeprefix("--").replace("-", "_")):
            opened.make_deterministic()
    except (BenchError, RigError) as error:
        raise pytest.UsageError(str(error)) from error
    with contextlib.closing(opened):
        keeps = request.config.getoption("brownout_recordings") is not None
        if keeps and not isinstance(opened.machine, RecordedQEMUDriver):
            rig = Path(request.config.getoption("lg_env"))
            raise pytest.UsageError(f"--brownout-recordings: the disks of {rig} are not recorded")
        yield opened


@pytest.fixture
def proxy(bench: Bench) -> Iterator[FaultProxy]:
    """The fault proxy between this scenario's device and the server."""
    with FaultProxy((bench.server.host, bench.server.port)) as running:
        yield running


@pytest.fixture
def device(request: pytest.FixtureRequest, bench: Bench, proxy: FaultProxy) -> Iterator[Device]:
    """A device with a pristine disk, started and ready on slot a."""
    store = _store(request.config)
    nodeid = request.node.nodeid

    def say(text: str) -> None:
        if store is not None:
            store.progress(nodeid, "step", text)

    if store is not None:
        store.progress(nodeid, "begin", _title(request.node))
    bundles = request.config.getoption("brownout_bundles")
    recordings = request.config.getoption("brownout_recordings")
    scribes: list[Scribe] = []
    listening = contextlib.ExitStack()

    def collect(made: Device) -> None:
        request.node.stash[DEVICE] = made
        if recordings is not None:
            scribe = listening.enter_context(scribe_of(made))
            scribe.listen_to(proxy)
            scribes.append(scribe)
        if bundles is not None:
            rig = Path(request.config.getoption("lg_env"))
            run_seed = int(request.config.getoption("brownout_seed"))
            request.node.stash[COLLECTOR] = Collector(bundles, rig, run_seed, made)

    base = _variant(request, "base", DEFAULT_BASE)
    golden = getattr(bench.machine, "golden", base)
    if base != golden:
        pytest.skip(f"begins with {base}, and this board's recovery writes {golden}")
    with (
        listening,
        staged_device(
            bench,
            proxy,
            base,
            say=say,
            step=allure.step,
            managed=request.node.get_closest_marker("managed") is not None,
            prepare=collect,
        ) as made,
    ):
        for scribe in scribes:
            scribe.synced()
        yield made
    for scribe in scribes:
        scribe.keep(bench, recordings / f"{name_of(nodeid)}{SUFFIX}")


@pytest.fixture
def update(request: pytest.FixtureRequest, bench: Bench, proxy: FaultProxy) -> Update:
    """The update that the scenario installs."""
    return bench.update(_variant(request, "update", DEFAULT_UPDATE), proxy.port)


@pytest.fixture
def faults(
    request: pytest.FixtureRequest, device: Device, update: Update, proxy: FaultProxy
) -> Iterator[Faults]:
    """The vocabulary of faults, armed on this device."""
    store = _store(request.config)
    rig = Path(request.config.getoption("lg_env"))
    features = rig_features(rig)
    with staged_faults(device, update, proxy, _seed(request), features, rig.name) as made:

        def armed() -> None:
            if store is not None:
                store.progress(request.node.nodeid, "fault", made.sentence())

        made.on_armed = armed
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """A rig that is lost before a scenario begins is counted, too."""
    try:
        return (yield)
    except InfrastructureError as error:
        device = item.stash.get(DEVICE, None)
        if device is not None:
            _leave(item, device, None, device.verdict(), error)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Judge a scenario when its body has ended, and leave its result."""
    arguments: dict[str, Any] = getattr(item, "funcargs", {})
    device = arguments.get("device")
    if not isinstance(device, Device):
        return (yield)
    faults = arguments.get("faults")
    planted = item.get_closest_marker("planted")
    failure: BaseException | None = None
    outcome = None
    seen_before = len(device.events)
    try:
        outcome = yield
        if isinstance(faults, Faults) and planted is None and faults.unfired():
            sentence = "; ".join(map(str, faults.unfired()))
            raise UnfiredError(f"the fault never happened: {sentence}")
        if len(device.events) == seen_before:
            raise NoVerdictError(
                "the scenario did nothing with the device that could be judged: "
                "install(), reboot(), restore() or another step is missing"
            )
    except MissingFeatureError as error:
        pytest.skip(str(error))
    except BaseException as error:  # noqa: BLE001 - recorded, then raised again
        failure = error
    verdict = device.verdict()
    _leave(item, device, faults, verdict, failure)
    if failure is not None:
        raise failure
    if planted is not None:
        _expect_violations(verdict, planted.kwargs["violates"])
    elif verdict.outcome is not Outcome.PASS:
        raise ViolationError(verdict)
    return outcome


def _expect_violations(verdict: Verdict, numbers: int | tuple[int, ...]) -> None:
    for number in (numbers,) if isinstance(numbers, int) else numbers:
        if number not in verdict.violated:
            raise AssertionError(
                f"the planted bug was not caught: wanted VIOLATION({number}), verdict is {verdict}"
            )


def _leave(
    item: pytest.Item,
    device: Device,
    faults: Faults | None,
    verdict: Verdict,
    failure: BaseException | None,
) -> None:
    """Write the result file, the progress line and the Allure attachments."""
    result = record(
        scenario=item.nodeid,
        title=_title(item),
        device=device,
        faults=faults,
        proxy=getattr(item, "funcargs", {}).get("proxy"),
        verdict=verdict,
        failure=failure,
        feature=_label(item, "feature"),
        story=_label(item, "story"),
    )
    attach(result)
    # In the JUnit file these are the test case's properties.
    item.user_properties += [
        ("verdict", result.verdict),
        ("fault", result.fault),
        ("state", ", ".join(strike.state for strike in result.strikes)),
        ("cause", cause_of(result)),
        ("rig", result.rig),
        ("seed", str(result.seed)),
    ]
    store = _store(item.config)
    if store is not None:
        store.write(result)
        store.progress(item.nodeid, "verdict", result.verdict)
    collector = item.stash.get(COLLECTOR, None)
    if collector is not None:
        collector.write(result, faults)


def _label(item: pytest.Item, kind: str) -> str:
    """What an Allure decorator says of a scenario, such as its feature; or nothing."""
    for marker in item.iter_markers("allure_label"):
        if marker.kwargs.get("label_type") == kind:
            return str(marker.args[0])
    return ""


def _title(item: pytest.Item) -> str:
    """The scenario's title: its docstring's first line, or its name in words."""
    text = getattr(getattr(item, "function", None), "__doc__", None) or ""
    first = text.strip().splitlines()[0] if text.strip() else ""
    return first.rstrip(".") or item.name.removeprefix("test_").replace("_", " ")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave what Allure's report needs besides results (after --clean-alluredir had its turn)."""
    config = session.config
    directory = config.getoption("allure_report_dir", default=None)
    rig = config.getoption("lg_env", default=None)
    if directory is None or rig is None or _worker(config):
        return
    seed = str(config.getoption("brownout_seed"))
    leave_context(
        Path(directory),
        {"rig": Path(rig).stem, "seed": seed, **versions_of(Path(rig))},
        history=config.getoption("brownout_allure_history"),
    )


def versions_of(rig: Path) -> dict[str, str]:
    """What the run ran on, for Allure's environment."""
    return {
        "brownout": metadata.version("brownout"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "features": ", ".join(sorted(rig_features(rig))),
    }
