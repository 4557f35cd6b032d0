"""Certificates of pods: who is believed, and that none is ever without one that its peers believe."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from kvasir_operator.certificates import (
    Authority,
    IssuedCertificates,
    Leaf,
    due,
    files,
    identity,
    new_authority,
    new_leaf,
    overdue,
)
from kvasir_operator.certificates.authority import AUTHORITY_LIFETIME, LEAF_LIFETIME
from kvasir_operator.certificates.renewal import AUTHORITY_MARGIN, RENEW_AFTER, SPREAD

NOW = datetime(2026, 1, 1, tzinfo=UTC)
URI = identity("default", "llama", "prefill")


def context(folder: Path, made: dict[str, bytes], server: bool) -> ssl.SSLContext:
    folder.mkdir(exist_ok=True)
    for name, data in made.items():
        (folder / name).write_bytes(data)
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    found.check_hostname = False
    found.verify_mode = ssl.CERT_REQUIRED
    found.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    found.load_verify_locations(folder / "ca.crt")
    return found


def meet(tmp_path: Path, one: dict[str, bytes], other: dict[str, bytes]) -> tuple[str, str]:
    """Both ends' identities, as the other has seen them. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context(tmp_path / "client", one, False).wrap_bio(to_client, to_server)
    server = context(tmp_path / "server", other, True).wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for each in (client, server):
            try:
                each.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return _uri(server), _uri(client)


def _uri(end: ssl.SSLObject) -> str:
    found = end.getpeercert()
    assert found is not None
    ((kind, uri),) = found["subjectAltName"]
    assert kind == "URI"
    return str(uri)


def issue(authority: Authority, role: str = "prefill", now: datetime | None = None) -> Leaf:
    return new_leaf(authority, identity("default", "llama", role), now or datetime.now(UTC))


def test_both_ends_see_who_the_other_is(tmp_path: Path) -> None:
    authority = new_authority(datetime.now(UTC))
    router, prefill = (files(issue(authority, role), [authority]) for role in ("router", "prefill"))
    assert meet(tmp_path, router, prefill) == (identity("default", "llama", "router"), URI)
    assert URI == "spiffe://kvasir/ns/default/inferenceservice/llama/role/prefill"


def test_who_is_signed_by_another_authority_is_not_believed(tmp_path: Path) -> None:
    ours, theirs = new_authority(datetime.now(UTC)), new_authority(datetime.now(UTC))
    good = files(issue(ours), [ours])
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        meet(tmp_path, files(issue(theirs), [ours]), good)
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        meet(tmp_path, good, files(issue(theirs), [ours]))


def test_a_pods_certificate_signs_no_other(tmp_path: Path) -> None:
    authority = new_authority(datetime.now(UTC))
    leaf = issue(authority)
    forged = issue(Authority(leaf.certificate, leaf.key))
    chained = Leaf(forged.certificate + leaf.certificate, forged.key)
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        meet(tmp_path, files(chained, [authority]), files(issue(authority), [authority]))


def test_an_ended_certificate_is_not_believed(tmp_path: Path) -> None:
    authority = new_authority(datetime.now(UTC) - LEAF_LIFETIME * 2)
    ended = issue(authority, now=datetime.now(UTC) - LEAF_LIFETIME * 1.01)
    with pytest.raises(ssl.SSLError, match="expired"):
        meet(tmp_path, files(ended, [authority]), files(issue(authority), [authority]))


def test_no_certificate_outlives_its_authority() -> None:
    authority = new_authority(NOW)
    late = NOW + AUTHORITY_LIFETIME - timedelta(days=1)
    found = due(None, [authority], late)
    assert found is not None
    assert found[0].expires_at == "2027-01-01T00:00:00Z"


def test_what_was_issued_stands_until_a_third_of_its_life_is_over() -> None:
    authority = new_authority(NOW)
    first = due(None, [authority], NOW)
    assert first is not None
    issued = first[0]
    assert due(issued, [authority], NOW + RENEW_AFTER - timedelta(seconds=1)) is None
    again = due(issued, [authority], NOW + RENEW_AFTER)
    assert again is not None
    assert again[0].signed_by == issued.signed_by


def test_a_new_text_asks_for_new_certificates_once() -> None:
    authority = new_authority(NOW)
    first = due(None, [authority], NOW)
    assert first is not None
    again = due(first[0], [authority], NOW, "key lost on 2026-01-01")
    assert again is not None
    assert due(again[0], [authority], NOW, "key lost on 2026-01-01") is None


def test_an_authority_that_is_gone_is_replaced_at_once() -> None:
    gone, there = new_authority(NOW - AUTHORITY_LIFETIME / 2), new_authority(NOW)
    first = due(None, [gone], NOW)
    assert first is not None
    found = due(first[0], [there], NOW)
    assert found is not None
    assert found[1] == there


def test_what_is_no_time_is_long_over() -> None:
    authority = new_authority(NOW)
    first = due(None, [authority], NOW)
    assert first is not None
    broken = IssuedCertificates(first[0].signed_by, "soon", "", first[0].trusted)
    assert due(broken, [authority], NOW) is not None


@pytest.mark.parametrize("step", [timedelta(minutes=59), timedelta(hours=5), timedelta(days=9)])
def test_for_two_years_all_pods_believe_each_other_whenever_their_files_came(step: timedelta) -> None:
    """Each pod has the files of now or of the time before; operators look in steps, or not for days."""
    now, authorities = NOW, [new_authority(NOW)]
    issued: IssuedCertificates | None = None
    shown: list[tuple[datetime, IssuedCertificates]] = []
    signers: dict[str, Authority] = {}
    while now < NOW + 2 * AUTHORITY_LIFETIME:
        authorities = [each for each in authorities if each.ends > now]
        if overdue(authorities, now):
            authorities.append(new_authority(now))
        signers |= {each.name: each for each in authorities}
        if found := due(issued, authorities, now):
            issued = found[0]
            shown.append((now, issued))
        assert issued is not None
        # What came within the last minutes has not reached all pods.
        recent = [each for since, each in shown if now - since < SPREAD / 2]
        before = [each for since, each in shown if now - since >= SPREAD / 2][-1:]
        for one in (*recent, *before):
            for other in (*recent, *before):
                assert signers[one.signed_by].ends > now
                assert one.signed_by in {each.authority for each in other.trusted}
            assert datetime.fromisoformat(one.expires_at) > now
        now += step
    assert len({each.signed_by for _, each in shown}) >= 3
    assert LEAF_LIFETIME + step < AUTHORITY_MARGIN


def test_a_clock_that_was_ahead_leaves_nothing_that_is_never_renewed() -> None:
    ahead = NOW + timedelta(days=200)
    early, wrong = new_authority(NOW), new_authority(ahead)
    found = due(None, [early, wrong], ahead)
    assert found is not None
    issued = found[0]
    assert issued.issued_at > "2026-07"
    back = due(issued, [early, wrong], NOW + timedelta(hours=2))  # the clock is right again
    assert back is not None
    assert back[0].issued_at == "2026-01-01T02:00:00Z"
    assert back[1].name == early.name, "what the other has signed nobody believes yet"
    assert overdue([wrong], NOW)
    assert not overdue([early, wrong], NOW)


def test_what_has_ended_is_made_anew_whatever_else_the_status_says() -> None:
    authority = new_authority(NOW)
    first = due(None, [authority], NOW)
    assert first is not None
    forged = msgspec.structs.replace(first[0], expires_at="2025-12-31T00:00:00Z")
    assert due(forged, [authority], NOW + timedelta(hours=1)) is not None
