"""The web page in a real headless browser, and its defences without one."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from updater_server_world import World, world

SHOTS = "BROWNOUT_SCREENSHOTS"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("site")) as there:
        yield there


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's Chromium, headless. It trusts nothing here, so certificate errors are let be."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("Chromium is not installed (apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,1000",
        f"--user-data-dir={profile}",
        "--disable-background-networking",
        "--no-first-run",
        # No name but ours resolves: no traffic leaves the machine.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
    ):
        options.add_argument(argument)
    options.accept_insecure_certs = True
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def shoot(browser: Any, name: str) -> None:
    """Keep a screenshot if the environment names a folder for them."""
    if folder := os.environ.get(SHOTS):
        Path(folder).mkdir(parents=True, exist_ok=True)
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.set_window_size(1280, max(700, min(height + 140, 4000)))
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def wait_for(browser: Any, text: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(
        # In one step: htmx may replace elements at any moment.
        lambda b: text in b.execute_script("return document.body.innerText"),
        f"no {text!r} on the page",
    )


def click(browser: Any, selector: str) -> None:
    browser.find_element("css selector", selector).click()


@pytest.mark.slow
def test_an_operator_goes_from_login_to_the_cause_of_a_failure(
    site: World, browser: Any, artifact_v2: Path
) -> None:
    site.reset()
    browser.get(f"{site.url}/")
    assert browser.current_url == f"{site.url}/login"
    browser.find_element("name", "name").send_keys("admin")
    browser.find_element("name", "password").send_keys("wrong password")
    click(browser, "main button")
    wait_for(browser, "the name or the password is wrong")
    shoot(browser, "login")
    browser.find_element("name", "name").send_keys("admin")
    browser.find_element("name", "password").send_keys(site.password)
    click(browser, "main button")
    wait_for(browser, "Overview")

    # A device comes, the operator accepts it.
    device = site.device("52:54:00:00:00:01")
    device.authenticate()
    browser.get(f"{site.url}/")
    wait_for(browser, "Waiting for a decision")
    shoot(browser, "overview-waiting")
    click(browser, "form[action$='/accept'] button")
    wait_for(browser, "1\ndevices accepted")
    assert device.authenticate().status_code == 200
    device.id = site.device_id("52:54:00:00:00:01")
    device.send_inventory(kernel="6.1.0-28-arm64", site="lab", mac_eth0="52:54:00:00:00:01")
    others = [site.accepted(f"52:54:00:00:01:{n:02x}") for n in range(9)]

    # The artifact is uploaded, first a broken one.
    browser.get(f"{site.url}/artifacts")
    broken = artifact_v2.parent / "broken.mender"
    broken.write_bytes(artifact_v2.read_bytes()[:-30_000])
    browser.find_element("css selector", "input[type=file]").send_keys(str(broken))
    click(browser, "#upload button")
    wait_for(browser, "Not uploaded: not a valid artifact")
    browser.find_element("css selector", "input[type=file]").send_keys(str(artifact_v2))
    click(browser, "#upload button")
    wait_for(browser, "rootfs-image")
    shoot(browser, "artifacts")

    # A deployment in phases.
    browser.get(f"{site.url}/deployments")
    click(browser, "summary")
    browser.find_element("name", "phases").send_keys("1, 50%")
    shoot(browser, "new-deployment")
    click(browser, ".fields button")
    wait_for(browser, "10 waiting")
    deployment = browser.current_url.rsplit("/", 1)[1]

    # Progress shows by itself.
    fleet = [device, *others]
    (first,) = [d for d in fleet if d.next().status_code == 200]
    first.report(deployment, "downloading")
    wait_for(browser, "1 in progress")
    first.update(deployment)
    wait_for(browser, "1 succeeded")
    second = [d for d in fleet if d is not first and d.next().status_code == 200]
    assert len(second) == 5
    for one in second[:3]:
        one.update(deployment)
    second[3].report(deployment, "installing")
    wait_for(browser, "4 succeeded · 1 in progress")
    shoot(browser, "deployment-running")
    cause = "slot B does not read back: sector 4711 differs"
    second[4].update(deployment, ends="failure", cause=cause)
    second[4].send_log(
        deployment,
        [
            {"timestamp": "2026-01-01T12:00:00Z", "level": "info", "message": "writing slot B"},
            {"timestamp": "2026-01-01T12:00:09Z", "level": "error", "message": cause},
        ],
    )
    wait_for(browser, "1 of 6 devices failed")
    wait_for(browser, "stopped here")
    # What was collected of when devices called is written.
    asyncio.run(site.tick())
    shoot(browser, "deployment-stopped")

    # Why did it fail?
    browser.get(f"{site.url}/")
    wait_for(browser, cause)
    shoot(browser, "overview")
    browser.find_element("link text", "mac " + second[4].identity["mac"]).click()
    wait_for(browser, "Last failure")
    shoot(browser, "device")
    browser.find_element("link text", "Log").click()
    wait_for(browser, "writing slot B")
    wait_for(browser, f"Log of mac {second[4].identity['mac']} for v2")
    shoot(browser, "log")
    browser.get(f"{site.url}/devices?where=site%3Dlab")
    wait_for(browser, "mac 52:54:00:00:00:01")
    assert len(browser.find_elements("css selector", "tbody tr")) == 1
    browser.get(f"{site.url}/devices")
    shoot(browser, "devices")
    browser.get(f"{site.url}/audit")
    wait_for(browser, "deployment.stop")
    shoot(browser, "audit")
    severe = [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    # The broken upload's 422, and the wrong password's 401.
    assert all("422" in e["message"] or "401" in e["message"] for e in severe), severe
    click(browser, ".who button")
    wait_for(browser, "Log in")


def test_names_from_devices_are_text_not_markup(site: World) -> None:
    site.reset()
    device = site.device("<script>alert(1)</script>")
    device.authenticate()
    client = logged_in(site)
    page = client.get("/").text
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_change_from_another_site_is_refused(site: World) -> None:
    site.reset()
    site.device().authenticate()
    client = logged_in(site)
    path = f"/devices/{site.device_id('d1')}/accept"
    for foreign in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.post(path, headers=foreign).status_code == 403
    assert client.post(path, headers={"Origin": site.url}).status_code == 303


def test_every_page_needs_a_login(site: World) -> None:
    site.reset()
    client = site.client()
    for path in ("/", "/devices", "/devices/x", "/deployments", "/artifacts", "/audit"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert client.post("/artifacts", content=b"x").status_code == 303


def test_a_viewer_sees_no_buttons_and_can_change_nothing(site: World) -> None:
    site.reset()
    site.device().authenticate()
    body = {"name": "eve", "password": "long enough", "role": "viewer"}
    site.admin.post("/users", json=body)
    client = logged_in(site, "eve", "long enough")
    assert "Accept" not in client.get("/").text
    answer = client.post(f"/devices/{site.device_id('d1')}/accept")
    assert answer.status_code == 403
    assert "needs the role operator" in answer.text


def logged_in(site: World, name: str = "admin", password: str = "") -> Any:
    client = site.client()
    answer = client.post("/login", data={"name": name, "password": password or site.password})
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"].lower()
    assert all(word in cookie for word in ("secure", "httponly", "samesite=strict"))
    return client
