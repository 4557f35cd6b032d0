"""Who is believed, and which files are taken for a credential."""

import contextlib
import datetime
import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from certificates import Authority, mount
from cryptography.hazmat.primitives import serialization

from kvasir_engine.tls import LOOK_SECONDS, CredentialError, Credentials, Identity, Untrusted, check_role

URI = "spiffe://kvasir/ns/models/inferenceservice/chat/role/router"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shake(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends of a connection, client first. Raises ssl.SSLError."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends


def test_a_peer_of_the_same_service_is_believed_in_the_roles_that_may(tmp_path: Path) -> None:
    ca = Authority()
    router = Credentials(ca.folder(tmp_path / "router", "router"))
    decode = Credentials(ca.folder(tmp_path / "decode", "decode"))
    ours, theirs = shake(router.client, decode.server)
    assert decode.peer(theirs, "router") == Identity("models", "chat", "router")
    assert router.peer(ours, "prefill", "decode").role == "decode"
    with pytest.raises(Untrusted, match="its role is router, only decode may connect here"):
        decode.peer(theirs, "decode")
    with pytest.raises(Untrusted, match="0 URI SANs"):
        decode.peer(None, "router")


@pytest.mark.parametrize(("service", "namespace"), [("other", "models"), ("chat", "elsewhere")])
def test_a_foreign_service_is_refused_by_name_though_its_ca_is_ours(
    tmp_path: Path, service: str, namespace: str
) -> None:
    ca = Authority()
    decode = Credentials(ca.folder(tmp_path / "decode", "decode"))
    foreign = Credentials(ca.folder(tmp_path / "foreign", "router", service, namespace))
    _, theirs = shake(foreign.client, decode.server)
    with pytest.raises(Untrusted, match=f"InferenceService {namespace}/{service}, this is models/chat"):
        decode.peer(theirs, "router")


def test_another_ca_and_no_certificate_fail_the_handshake(tmp_path: Path) -> None:
    decode = Credentials(Authority().folder(tmp_path / "decode", "decode"))
    stranger = Credentials(Authority().folder(tmp_path / "stranger", "router"))
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        shake(stranger.client, decode.server)
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match="peer did not return a certificate"):
        shake(nobody, decode.server)


BAD_URIS = [
    [],
    [URI, URI + "2"],
    ["https://kvasir/ns/models/inferenceservice/chat/role/router"],
    [URI + "/more"],
    ["spiffe://other/ns/models/inferenceservice/chat/role/router"],
    ["spiffe://kvasir/ns//inferenceservice/chat/role/router"],
]


@pytest.mark.parametrize("uris", BAD_URIS)
def test_what_names_no_one_role_is_no_credential_and_no_peer(tmp_path: Path, uris: list[str]) -> None:
    ca = Authority()
    mount(tmp_path / "odd", ca.pem, *ca.leaf("router", uris=uris))
    with pytest.raises(CredentialError, match=r"tls\.crt"):
        Credentials(tmp_path / "odd")
    with pytest.raises(Untrusted):
        Identity.of({"subjectAltName": tuple(("URI", uri) for uri in uris)})


def test_a_set_that_is_not_whole_is_no_credential_and_the_message_says_what_is_wrong(tmp_path: Path) -> None:
    ca, other = Authority(), Authority()
    certificate, key = ca.leaf("decode")
    expired = ca.leaf("decode", valid=-datetime.timedelta(hours=1))
    for name, files, why in (
        ("key", (ca.pem, certificate, other.leaf("decode")[1]), "key values mismatch"),
        ("ca", (other.pem, certificate, key), "certificate verify failed"),
        ("garbage", (b"no PEM", certificate, key), r"ca\.crt"),
        ("old", (ca.pem, *expired), "certificate has expired"),
        ("half", (ca.pem, certificate[:100], key), r"tls\.crt"),
    ):
        mount(tmp_path / name, *files)
        with pytest.raises(CredentialError, match=why):
            Credentials(tmp_path / name)
    with pytest.raises(CredentialError, match=r"ca\.crt"):
        Credentials(tmp_path / "nowhere")


def test_new_files_are_taken_for_new_connections_once_they_are_whole(tmp_path: Path) -> None:
    clock, old, new = Clock(), Authority("old"), Authority("new")
    folder = old.folder(tmp_path / "decode", "decode")
    decode = Credentials(folder, clock)
    router_of_new = Credentials(new.folder(tmp_path / "router", "router"))
    before = decode.server
    mount(folder, new.pem, *old.leaf("decode"))  # a half-written rotation
    clock.now += LOOK_SECONDS
    assert decode.server is before
    (folder / "..data" / "tls.crt").unlink()
    clock.now += LOOK_SECONDS
    assert decode.server is before
    mount(folder, old.pem + new.pem, *new.leaf("decode"))
    assert decode.server is before, "the files are not looked at for every connection"
    clock.now += LOOK_SECONDS
    assert decode.server is not before
    _, theirs = shake(router_of_new.client, decode.server)
    assert decode.peer(theirs, "router").role == "router"
    router_of_old = Credentials(old.folder(tmp_path / "late", "router"))
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        shake(router_of_old.client, decode.server)  # the late router knows the old CA only


def test_a_process_refuses_a_certificate_of_another_role(tmp_path: Path) -> None:
    credentials = Credentials(Authority().folder(tmp_path / "decode", "decode"))
    check_role(credentials, "decode")
    check_role(credentials, "both")
    with pytest.raises(CredentialError, match="role decode, this is router"):
        check_role(credentials, "router")


def test_a_new_set_of_somebody_elses_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, ca = Clock(), Authority()
    folder = ca.folder(tmp_path / "decode", "decode")
    decode = Credentials(folder, clock)
    for role, service, namespace in (
        ("router", "chat", "models"),
        ("decode", "other", "models"),
        ("decode", "chat", "x"),
    ):
        mount(folder, ca.pem, *ca.leaf(role, service, namespace))
        clock.now += LOOK_SECONDS
        assert decode.identity == Identity("models", "chat", "decode")
        assert f"it is of {namespace}/{service} {role}, this is models/chat decode" in caplog.text
    before = decode.server
    mount(folder, ca.pem, *ca.leaf("decode"))
    clock.now += LOOK_SECONDS
    assert decode.server is not before


def test_who_comes_back_has_to_show_its_certificate_again(tmp_path: Path) -> None:
    ca = Authority()
    decode = Credentials(ca.folder(tmp_path / "decode", "decode"))
    router = Credentials(ca.folder(tmp_path / "router", "router")).client
    ours, theirs = shake(router, decode.server)
    theirs.write(b"hello")
    assert ours.read(5) == b"hello"  # and what came before it: tickets
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    assert not (ours.session and ours.session.has_ticket)
    again = router.wrap_bio(back, there, session=ours.session)
    answers = decode.server.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for end in (again, answers):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert not again.session_reused
    assert decode.peer(answers, "router").role == "router"


ASKS = """
import os, sys
from pathlib import Path
os.setsid()
os.open(sys.argv[2], os.O_RDWR)  # the terminal that OpenSSL would ask
from kvasir_engine.tls import CredentialError, Credentials
try:
    Credentials(Path(sys.argv[1]))
except CredentialError as error:
    print(error)
"""


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(tmp_path: Path) -> None:
    ca = Authority()
    certificate, plain = ca.leaf("decode")
    form = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    key = serialization.load_pem_private_key(plain, None).private_bytes(serialization.Encoding.PEM, *form)
    mount(tmp_path / "decode", ca.pem, certificate, key)
    there, terminal = os.openpty()
    try:
        asks = [sys.executable, "-c", ASKS, str(tmp_path / "decode"), os.ttyname(terminal)]
        said = subprocess.run(asks, capture_output=True, text=True, timeout=120)
        assert "tls.crt, tls.key: the key is encrypted" in said.stdout, said.stderr
    finally:
        os.close(there)
        os.close(terminal)
