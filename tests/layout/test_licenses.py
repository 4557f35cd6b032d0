"""Every package of an image is listed with its licence, and none forbids what Apache-2.0 allows."""

import re

import licenses

# Weak or no copyleft: a package may be used unchanged by a program of any licence.
ALLOWED = re.compile(
    r"(Apache-2\.0|MIT|MIT-0|BSD-[23]-Clause|BSD|ISC|MPL-2\.0|PSF-2\.0|0BSD|Unlicense|HPND|CC0-1\.0|Zlib"
    r"|Apache-2\.0 WITH LLVM-exception|BSL-1\.0|NCSA|CNRI-Python)"
)


def test_every_package_of_an_image_is_listed_with_its_licence() -> None:
    listed = dict(re.findall(r"^\| ([\w.-]+) \| ([^|]+) \|", licenses.LISTED.read_text(), flags=re.M))
    found = {name: said for name, (said, _) in licenses.rows().items()}
    assert {"torch", "cryptography", "kopf", "uvicorn"} <= set(found)
    missing = {name: said for name, said in found.items() if listed.get(name) != said}
    assert not missing, f"`make licenses`: {missing}"


def test_all_licences_may_be_used_by_a_program_of_another() -> None:
    for name, (said, _) in licenses.rows().items():
        parts = re.split(r" AND | OR |[()]", said)
        assert all(ALLOWED.fullmatch(part.strip()) for part in parts if part.strip()), f"{name}: {said}"
