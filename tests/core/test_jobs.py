"""A router's frame decides which kind of job it is, and a job has the fields of its kind alone."""

from dataclasses import fields

import pytest

from kvasir_engine.core.jobs import DecodeJob, Job, PrefillJob, job_of
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.protocol import Endpoint, Fingerprint, Lease, Region, Reserve, Sampling, Submit

SAMPLING = Sampling(1)
PEER = Endpoint("peer", 1, b"", Region(0, 8, 64), Fingerprint("m", "", "float32", "pages", 16, 4, 1, 16, "rope"))
LEASE = Lease(7, 1, [4], 0, 60.0, "us", 1)


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (Submit("r", [1, 2], SAMPLING, canary=True), Job),
        (Submit("r", [1, 2], SAMPLING, lease=LEASE, to=PEER, canary=True), PrefillJob),
        (Reserve("r", [1, 2], SAMPLING, PEER, canary=True), DecodeJob),
    ],
)
def test_the_frame_decides_the_kind_of_the_job(frame: Submit | Reserve, kind: type[Job]) -> None:
    job = job_of(frame, 3, Sequence("r", [1, 2], SAMPLING, 1), 5.0)
    assert type(job) is kind
    assert (job.id, job.canary, job.came) == ((3, "r"), True, 5.0)


def test_a_prefill_job_is_named_by_its_lease_and_a_decode_job_keeps_what_was_asked() -> None:
    prefill = job_of(Submit("r", [1], SAMPLING, lease=LEASE, to=PEER), 1, Sequence("r", [1], SAMPLING, 1), 0.0)
    assert isinstance(prefill, PrefillJob)
    assert prefill.key == ("peer", 7)
    reserve = Reserve("r", [1], SAMPLING, PEER, threshold=4, lend_from=2, nonces=True)
    decode = job_of(reserve, 1, Sequence("r", [1], SAMPLING, 1), 0.0)
    assert isinstance(decode, DecodeJob)
    assert (decode.writer, decode.threshold, decode.lend_from, decode.nonces) == (PEER, 4, 2, True)


def test_no_field_of_one_role_is_in_a_job_of_the_other() -> None:
    common, prefill, decode = ({field.name for field in fields(kind)} for kind in (Job, PrefillJob, DecodeJob))
    assert prefill & decode == common | {"lease"}  # held by the one, granted by the other
    assert common < prefill
    assert common < decode
