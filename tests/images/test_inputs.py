"""Recipes, locks, package sources, keys: what goes in, and what is said when it is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from images import recipe as recipe_module
from images.apt import select_sources
from images.cli import main
from images.errors import ImageError, LockError, MissingToolError, RecipeError
from images.host import run
from images.keys import ensure_keys
from images.locks import LOCK_DIR, Lock, LockedPackage, format_lock, parse_lock, read_lock
from images.recipe import load_recipe, parse_variant, recipe_names

SHA = "ab" * 32


@pytest.mark.parametrize("target", recipe_names())
def test_every_recipe_is_locked_completely(target: str) -> None:
    recipe = load_recipe(target)
    lock = read_lock(LOCK_DIR / f"{recipe.architecture}.lock", recipe.architecture)
    for name in (*recipe.packages, *recipe.bootloader_packages, recipe.kernel):
        assert len(lock.get(name).sha256) == 64


def test_systemd_replaces_init_and_nothing_else_of_the_sd_target() -> None:
    systemd, plain = load_recipe("qemu-arm64-sd-systemd"), load_recipe("qemu-arm64-sd")
    changed = {f.name for f in fields(plain) if getattr(systemd, f.name) != getattr(plain, f.name)}
    assert changed == {
        *("target", "description"),
        *("packages", "drop", "overlays", "initrd_modules"),
    }
    assert set(systemd.packages) > {*plain.packages, "systemd", "libsystemd-shared"}
    assert systemd.overlays == (*plain.overlays, "systemd")
    init = recipe_module.OVERLAY_DIR / "systemd/sbin/init"
    assert init.readlink() == Path("../lib/systemd/systemd")


def test_lock_files_hold_no_addresses() -> None:
    for path in LOCK_DIR.glob("*.lock"):
        assert "://" not in path.read_text()


def test_a_lock_is_read_back_as_it_was_written() -> None:
    lock = Lock(
        "arm64",
        (LockedPackage("a", "1:2.3~rc1-4+b1", SHA), LockedPackage("b+", "1", SHA)),
        (("meta", "a"),),
    )
    again = parse_lock(format_lock(lock, ["made by a test"]), "arm64")
    assert again == lock
    assert again.get("meta").name == "a"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("a 1", "line 1: expected"),
        (f"a 1 {SHA}\na 2 {SHA}", "line 2: a is there twice"),
        (f"a 1 {SHA[:-1]}", "line 1: expected"),
    ],
)
def test_a_wrong_lock_is_refused_with_its_line(text: str, cause: str) -> None:
    with pytest.raises(LockError, match=cause):
        parse_lock(text, "arm64")


def test_a_package_that_is_not_locked_is_named() -> None:
    with pytest.raises(LockError, match=r"arm64.lock lacks zz: run"):
        Lock("arm64", ()).get("zz")


def test_sources_of_both_forms_are_taken_and_others_left_out() -> None:
    deb822 = (
        "Types: deb deb-src\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates "
        "trixie\nComponents: main\nSigned-By: /usr/share/keyrings/k.gpg\nArchitectures: amd64\n"
        "\nTypes: deb\nURIs: http://other.test\nSuites: nodistro\nComponents: main\n"
        "\nEnabled: no\nTypes: deb\nURIs: http://off.test\nSuites: bookworm\nComponents: main\n"
    )
    one_line = (
        "# deb http://commented.test bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://security.test bookworm-security main contrib\n"
        "deb http://cloud.test cloud-sdk-bookworm main\n"
    )
    text = select_sources([("a.sources", deb822), ("b.list", one_line)], "bookworm")
    assert "suites: bookworm bookworm-updates\n" in text
    assert "http://mirror.test/debian" in text
    assert "signed-by: /usr/share/keyrings/k.gpg" in text
    assert "uris: http://security.test\nsuites: bookworm-security\ncomponents: main contrib" in text
    for absent in ("other.test", "off.test", "commented", "cloud.test", "rchitectures", "deb-src"):
        assert absent not in text


def test_an_embedded_key_stays_with_its_source() -> None:
    text = (
        "Types: deb\nURIs: http://m.test\nSuites: bookworm\nComponents: main\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"
    )
    assert "signed-by: \n -----BEGIN" in select_sources([("a.sources", text)], "bookworm")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("v9", "no variant 'v9': choose v1, v2"),
        ("v1+nonsense", "nothing called 'nonsense' can be planted: choose always-healthy"),
    ],
)
def test_an_unknown_variant_is_refused_with_the_choice(name: str, cause: str) -> None:
    with pytest.raises(RecipeError, match=cause):
        parse_variant(load_recipe("qemu-arm64"), name)


def test_a_variant_name_is_taken_apart() -> None:
    variant = parse_variant(load_recipe("qemu-arm64"), "v1+never-fsync+single-env")
    assert (variant.base, variant.plants, variant.single_env) == ("v1", ("never_fsync",), True)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("extends = 'nothing'", "no recipe nothing.toml"),
        ("a = [", "broken.toml"),
        ("description = 'x'", "lacks 'packages'"),
    ],
)
def test_a_broken_recipe_is_said_in_one_line(
    text: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.toml").write_text(text)
    monkeypatch.setattr(recipe_module, "RECIPE_DIR", tmp_path)
    with pytest.raises(RecipeError, match=cause) as caught:
        load_recipe("broken")
    assert "\n" not in str(caught.value)


def test_a_missing_program_is_said_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("images.host._SBIN", ())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingToolError, match="mke2fs is not installed: run `apt-get install e2f"):
        run(["mke2fs"])


def test_the_server_certificate_serves_the_names_devices_use(tmp_path: Path) -> None:
    keys = ensure_keys(tmp_path / "keys")
    authority = x509.load_pem_x509_certificate(keys.ca_certificate.read_bytes())
    server = x509.load_pem_x509_certificate(keys.server_certificate.read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["updates.brownout.test", "localhost"]
    addresses = [str(a) for a in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["10.0.2.2", "127.0.0.1"]
    assert isinstance(server.public_key(), ec.EllipticCurvePublicKey)
    assert keys.server_key.stat().st_mode & 0o077 == 0


def test_keys_are_made_once_and_never_silently_replaced(tmp_path: Path) -> None:
    keys = ensure_keys(tmp_path / "keys")
    before = keys.artifact_public.read_bytes()
    assert ensure_keys(tmp_path / "keys").artifact_public.read_bytes() == before
    keys.ca_key.unlink()
    with pytest.raises(ImageError, match=r"lacks ca.key"):
        ensure_keys(tmp_path / "keys")


def test_keys_asked_for_by_many_at_once_are_one_set(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from images.keys import ensure_keys;"
        "print(ensure_keys(Path(sys.argv[1])).artifact_public.read_text())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "keys")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({process.communicate(timeout=60)[0] for process in running}) == 1


def test_the_command_line_says_what_is_wrong_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["build", "nothing"]) == 1
    said = capsys.readouterr().err
    assert "images: error: there is no target 'nothing': choose qemu-arm64" in said
    assert "Traceback" not in said


def test_a_target_that_is_not_built_has_no_manifest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["manifest", "qemu-arm64", "--build-dir", str(tmp_path)]) == 1
    assert "run `python -m images build qemu-arm64`" in capsys.readouterr().err


def test_the_list_names_targets_variants_and_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for word in ("qemu-arm64:", "qemu-x86_64:", "panics", "never-fsync", "single-env"):
        assert word in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_short_line(small_disk: Path) -> None:
    """Copying a tree fails in a thousand files at once: the first says enough."""
    command = [sys.executable, "-m", "images", "build", "qemu-arm64"]
    done = subprocess.run(
        [*command, "--build-dir", small_disk / "build"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("images: error: qemu-arm64 can't be built: ")
    assert "No space left on device" in last
    assert len(last) < 1000
    assert [p.name for p in (small_disk / "build/qemu-arm64").iterdir()] == [".lock"]
