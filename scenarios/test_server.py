"""The server answers, and wrongly: errors, other content, certificates that prove nothing."""

import allure
import pytest

from framework.faults import (
    Fault,
    bad_certificate,
    captive_portal,
    downloaded,
    server_answers,
    wrong_content,
)
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update
from framework.scenario.outcomes import fails_cleanly, goes_through

pytestmark = [allure.feature("Server"), pytest.mark.lg_feature("network")]


@allure.story("Errors")
@pytest.mark.parametrize(
    "fault",
    [
        server_answers(503, times=2),
        server_answers(500).when(downloaded(percent=60)),
        server_answers(429, retry_after_s=3),
    ],
    ids=str,
)
def test_an_error_that_passes_costs_only_time(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """The server is overloaded or restarted: the client tries again, as late as it is told."""
    faults.arm(fault)
    goes_through(device, update)


@allure.story("Errors")
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (server_answers(404, times=None), "404"),
        (server_answers(403, times=None).when(downloaded(percent=50)), "403"),
        (server_answers(302, times=None), "302"),
    ],
    ids=str,
)
def test_an_error_that_stays_is_told(
    device: Device, update: Update, faults: Faults, fault: Fault, says: str
) -> None:
    """The file is gone or forbidden, or a login is wanted: a clean failure at once."""
    faults.arm(fault)
    fails_cleanly(device, update, says=says)


@allure.story("Errors")
def test_a_server_that_is_broken_for_good_is_given_up(
    device: Device, update: Update, faults: Faults
) -> None:
    """The server answers 500 to everything: the retries end."""
    faults.arm(server_answers(500, times=None))
    fails_cleanly(device, update, says="500")


@allure.story("Wrong content")
@pytest.mark.smoke
def test_a_captive_portal_is_named_for_what_it_is(
    device: Device, update: Update, faults: Faults
) -> None:
    """A web page comes instead of the artifact."""
    faults.arm(captive_portal())
    fails_cleanly(device, update, says="portal")


@allure.story("Wrong content")
@pytest.mark.parametrize(
    "fault",
    [
        wrong_content("garbage"),
        wrong_content("garbage").when(downloaded(percent=50)),
        wrong_content("truncated"),
    ],
    ids=str,
)
def test_what_is_not_the_artifact_is_not_installed(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """Something else comes, from the start or in the middle: refused, nothing changed."""
    faults.arm(fault)
    fails_cleanly(device, update)


@allure.story("Certificates")
@pytest.mark.parametrize(
    "fault",
    [
        bad_certificate("expired"),
        bad_certificate("not-yet-valid"),
        bad_certificate("wrong-name"),
        bad_certificate("unknown-authority"),
        bad_certificate("unknown-authority").when(downloaded(percent=50)),
    ],
    ids=str,
)
def test_a_bad_certificate_is_never_accepted(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """The server can't prove who it is: refused at once, and said so."""
    faults.arm(fault)
    fails_cleanly(device, update, says="certificate")
