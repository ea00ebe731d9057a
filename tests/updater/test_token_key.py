"""A device whose key is in a PKCS#11 token: SoftHSM 2, a real token in software."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_updater_managed import Fleet
from updater_manager import Manager, managing, verify
from updater_server import Authority
from updater_world import DEVICE_TYPE, world_artifact

from updater.device.errors import ConfigError
from updater.device.token_key import TokenKey, TokenUri, parse_uri

MODULE = next(
    iter(sorted(Path("/usr/lib").glob("**/softhsm/libsofthsm2.so"))),
    Path("/usr/lib/softhsm/libsofthsm2.so"),
)
PIN = "20-8-15"
# secp256r1 and secp384r1, as DER names them.
P256 = bytes.fromhex("06082a8648ce3d030107")
P384 = bytes.fromhex("06052b81040022")

kit: Any = pytest.importorskip("PyKCS11", reason="the extra device-pkcs11 is not installed")
pytestmark = pytest.mark.skipif(
    not shutil.which("softhsm2-util") or not MODULE.exists(), reason="needs softhsm2"
)


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A token "device" with several keys, and one "other"; the folder with the PIN's file.

    One for the module: the library stays loaded, and reads its settings once.
    """
    folder = tmp_path_factory.mktemp("token")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder}/tokens\n")
    (folder / "pin").write_text(PIN + "\n")
    (folder / "wrong-pin").write_text("1234")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(folder / "softhsm2.conf"))
        for label in ("device", "other"):
            command = ["softhsm2-util", "--init-token", "--free", "--label", label]
            command += ["--pin", PIN, "--so-pin", "12345678"]
            subprocess.run(command, check=True, capture_output=True)
        make_keys()
        yield folder


def make_keys() -> None:
    library = kit.PyKCS11Lib()
    library.load(str(MODULE))
    slot = next(
        each
        for each in library.getSlotList(tokenPresent=True)
        if library.getTokenInfo(each).label.strip() == "device"
    )
    session = library.openSession(slot, kit.CKF_SERIAL_SESSION | kit.CKF_RW_SESSION)
    session.login(PIN)
    public = [(kit.CKA_TOKEN, True), (kit.CKA_VERIFY, True)]
    private = [
        (kit.CKA_TOKEN, True),
        (kit.CKA_PRIVATE, True),
        (kit.CKA_SENSITIVE, True),
        (kit.CKA_EXTRACTABLE, False),
        (kit.CKA_SIGN, True),
    ]
    curve_mechanism = kit.Mechanism(kit.CKM_EC_KEY_PAIR_GEN)
    rsa = [(kit.CKA_MODULUS_BITS, 2048), (kit.CKA_PUBLIC_EXPONENT, (1, 0, 1))]
    for number, (label, mechanism, kind) in enumerate(
        [
            ("ecdsa", curve_mechanism, [(kit.CKA_EC_PARAMS, P256)]),
            ("rsa", kit.MechanismRSAGENERATEKEYPAIR, rsa),
            ("large", curve_mechanism, [(kit.CKA_EC_PARAMS, P384)]),
            ("twice", curve_mechanism, [(kit.CKA_EC_PARAMS, P256)]),
            ("twice", curve_mechanism, [(kit.CKA_EC_PARAMS, P256)]),
        ]
    ):
        names = [(kit.CKA_LABEL, label), (kit.CKA_ID, (number,))]
        session.generateKeyPair(public + kind + names, private + names, mecha=mechanism)
    # A pair that does not belong together: the private one of 4, the public one of 3.
    handles = session.findObjects([(kit.CKA_CLASS, kit.CKO_PUBLIC_KEY), (kit.CKA_ID, (3,))])
    (point,) = session.getAttributeValue(handles[0], [kit.CKA_EC_POINT])
    session.createObject(
        [
            (kit.CKA_CLASS, kit.CKO_PUBLIC_KEY),
            (kit.CKA_KEY_TYPE, kit.CKK_EC),
            (kit.CKA_TOKEN, True),
            (kit.CKA_EC_PARAMS, P256),
            (kit.CKA_EC_POINT, tuple(point)),
            (kit.CKA_LABEL, "mixed"),
            (kit.CKA_ID, (9,)),
        ]
    )
    session.generateKeyPair(
        [*public, (kit.CKA_EC_PARAMS, P256), (kit.CKA_LABEL, "unused"), (kit.CKA_ID, (8,))],
        [*private, (kit.CKA_LABEL, "mixed"), (kit.CKA_ID, (9,))],
        mecha=curve_mechanism,
    )
    session.closeSession()


def uri(folder: Path, path: str = "token=device;object=ecdsa", pin: str = "pin") -> str:
    return f"pkcs11:{path}?module-path={MODULE}&pin-source=file:{folder}/{pin}"


@pytest.mark.parametrize("label", ["ecdsa", "rsa"])
def test_a_key_in_a_token_signs_the_raw_body_and_no_key_is_on_the_disk(
    token: Path, tmp_path: Path, label: str
) -> None:
    """A whole deployment, from the acceptance to the commit."""
    (tmp_path / "server").mkdir()
    (tmp_path / "device").mkdir()
    authority = Authority(tmp_path / "server")
    context = authority.server_context("127.0.0.1")
    with managing(context, Manager(world_artifact(tmp_path), DEVICE_TYPE)) as manager:
        where = uri(token, f"token=device;object={label}")
        fleet = Fleet(tmp_path / "device", manager, authority.ca_file, key_uri=where, key_file="")
        fleet.settle()
        assert manager.reported()[-1] == "success"
        assert "committed v2 (slot b)" in fleet.said
    files = (tmp_path / "device").rglob("*")
    texts = [path.read_bytes() for path in files if path.is_file()]
    assert not any(b"PRIVATE KEY" in text for text in texts)


def test_the_private_key_never_leaves_the_token(token: Path) -> None:
    """The signature is the token's: what the test's own eyes can read of the key is refused."""
    key = TokenKey(uri(token))
    body = b'{"id_data":"x"}\n'
    verify(key.public_pem, key.sign(body), body)
    with key._session() as session:
        handle = key._find(session, kit.CKO_PRIVATE_KEY, "private")
        (value,) = session.getAttributeValue(handle, [kit.CKA_VALUE])
    assert not value


@pytest.mark.parametrize(
    ("path", "pin", "message"),
    [
        ("token=absent;object=ecdsa", "pin", "key ecdsa in token absent: there is no such token"),
        ("token=device;object=absent", "pin", "there is no such private key"),
        ("token=device;object=twice", "pin", "2 private keys fit"),
        ("object=ecdsa", "pin", "key ecdsa: "),
        ("token=device;object=large", "pin", "not a key of a kind that is used"),
        ("token=device;object=ecdsa", "wrong-pin", "CKR_PIN_INCORRECT"),
        ("token=device;object=ecdsa", "no-pin", "no-pin: No such file or directory"),
    ],
)
def test_what_is_wrong_with_a_token_is_one_line(
    token: Path, path: str, pin: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TokenKey(uri(token, path, pin))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert PIN not in str(caught.value)


def test_a_signature_that_does_not_fit_the_public_key_is_never_used(token: Path) -> None:
    key = TokenKey(uri(token, "token=device;object=mixed"))
    with pytest.raises(ConfigError, match="does not fit the public key beside it"):
        key.sign(b"body\n")


def test_a_token_that_was_away_is_found_again(token: Path) -> None:
    """What the token has is taken away: as near as software comes to pulling it."""
    key = TokenKey(uri(token))
    (token / "tokens").rename(token / "pulled")
    with pytest.raises(ConfigError, match="CKR_GENERAL_ERROR"):
        key.sign(b"body\n")
    (token / "pulled").rename(token / "tokens")
    verify(key.public_pem, key.sign(b"body\n"), b"body\n")


def test_a_uri_is_read_as_the_standard_writes_it() -> None:
    read = parse_uri(
        "pkcs11:token=my%20device;object=a%2fb;id=%01%ff;type=private;serial=7"
        "?module-path=/lib/x.so&pin-source=file:/etc/pin"
    )
    assert read == TokenUri("/lib/x.so", "my device", "7", "a/b", b"\x01\xff", "/etc/pin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file:/etc/key.pem", "must begin with pkcs11:"),
        ("pkcs11:object=k", "module-path=… is missing"),
        ("pkcs11:token=t?module-path=/x.so", "which key?"),
        ("pkcs11:object=k?module-path=x.so", "module-path must be an absolute path"),
        ("pkcs11:object=k;slot-id=3?module-path=/x.so", "'slot-id' is not understood"),
        ("pkcs11:object=k?module-path=/x.so&pin-value=1234", "a PIN does not belong"),
    ],
)
def test_a_uri_that_is_not_understood_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_uri(text)
    assert message in str(caught.value)
    assert "1234" not in str(caught.value)


def test_a_library_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.so: cannot be used"):
        TokenKey(f"pkcs11:object=k?module-path={tmp_path}/no.so")
