"""When certificates are due, and by which authority. Pure: times and authorities in, a decision out.

A new authority is believed for a while before it signs: `ca.crt` of all pods has it then, wherever a peer's
certificate comes from. The old one is believed until it ends, which is later than whatever it signed.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec

from kvasir_operator.certificates.authority import LEAF_LIFETIME, SKEW, Authority

# Two thirds of a certificate's life are left for an operator that is away or refused.
RENEW_AFTER = LEAF_LIFETIME / 3
# The next authority is made when the newest one has so long left: what it signs then still ends before it does.
AUTHORITY_MARGIN = timedelta(days=90)
# Until a new authority signs: kubelets bring a Secret to its pods in two minutes, and pods look every ten seconds.
SPREAD = timedelta(hours=1)


class TrustedAuthority(msgspec.Struct, frozen=True, rename="camel"):
    """An authority that a service's pods trust, by its name, and since when."""

    authority: str
    since: str


class IssuedCertificates(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The last certificates of a service's pods. `asked`: a digest of the annotation's value at that time."""

    signed_by: str = ""
    issued_at: str = ""
    expires_at: str = ""
    trusted: list[TrustedAuthority] = []
    asked: str = ""


def overdue(authorities: Sequence[Authority], now: datetime) -> bool:
    """Whether a new authority is to be created. One from a clock that was ahead is not valid yet."""
    return all(each.ends - now < AUTHORITY_MARGIN or not _valid(each, now) for each in authorities)


def due(
    before: IssuedCertificates | None,
    authorities: Sequence[Authority],
    now: datetime,
    asked: str = "",
    lost: bool = False,
) -> tuple[IssuedCertificates, Authority, list[Authority]] | None:
    """What to issue now, who signs it and which authorities to trust; `None` while nothing is due.

    `authorities`: at least one of them valid. `before`: what was issued last. `asked`: a value other than the last
    one requests new certificates at once; `lost` does so too.
    """
    trusted = sorted((each for each in authorities if each.ends > now), key=lambda each: (each.begins, each.name))
    since = {each.authority: each.since for each in before.trusted} if before else {}
    signer = _signer(trusted, since, now)
    believed = [TrustedAuthority(each.name, since.get(each.name, stamp(now))) for each in trusted]
    if (
        before is not None
        and not lost
        and before.trusted == believed
        and before.signed_by == signer.name
        and before.asked == asked
        and -SKEW <= now - _time(before.issued_at) < RENEW_AFTER
        and now < _time(before.expires_at)
    ):
        return None
    ends = min(now + LEAF_LIFETIME, signer.ends)
    return IssuedCertificates(signer.name, stamp(now), stamp(ends), believed, asked), signer, trusted


def _signer(trusted: Sequence[Authority], since: dict[str, str], now: datetime) -> Authority:
    """The newest authority that all pods have trusted for long enough; if that is unknown, the newest old one."""
    valid = [each for each in trusted if _valid(each, now)] or trusted
    spread = [each for each in valid if each.name in since and now - _time(since[each.name]) >= SPREAD]
    known = [each for each in valid if each.name in since]
    old = [each for each in valid if now - each.begins >= SPREAD]
    return next((found[-1] for found in (spread, known[:1], old) if found), valid[-1])


def _valid(authority: Authority, now: datetime) -> bool:
    """Whether peers accept it by now."""
    return authority.begins - SKEW <= now < authority.ends


def stamp(time: datetime) -> str:
    """A time as RFC 3339, in seconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _time(text: str) -> datetime:
    """A time of the status; one that cannot be read counts as long ago."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
