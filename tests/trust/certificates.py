"""Certificates for tests: a CA, and folders as a pod of a role has them mounted."""

import datetime
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Authority:
    """A CA of its own, of one InferenceService or of nobody in particular."""

    def __init__(self, name: str = "ca") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name))
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * DAY)
            .not_valid_after(now + 100 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def leaf(
        self,
        role: str,
        service: str = "chat",
        namespace: str = "models",
        valid: datetime.timedelta = 10 * DAY,
        uris: list[str] | None = None,
    ) -> tuple[bytes, bytes]:
        """Certificate and key, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        if uris is None:
            uris = [f"spiffe://kvasir/ns/{namespace}/inferenceservice/{service}/role/{role}"]
        names = [x509.UniformResourceIdentifier(uri) for uri in uris] or [x509.DNSName("pod")]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(f"{service}-{role}"))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * DAY)
            .not_valid_after(now + valid)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        private = key.private_bytes(serialization.Encoding.PEM, *form)
        return certificate.public_bytes(serialization.Encoding.PEM), private

    def folder(self, path: Path, role: str, service: str = "chat", namespace: str = "models") -> Path:
        """A folder with a leaf of the role."""
        mount(path, self.pem, *self.leaf(role, service, namespace))
        return path


def mount(path: Path, ca: bytes, certificate: bytes, key: bytes) -> None:
    """Let `path` hold these, all at once, as a kubelet changes a Secret's mount: by a symbolic link."""
    path.mkdir(exist_ok=True)
    data = path / f"..{os.urandom(4).hex()}"
    data.mkdir()
    for name, content in (("ca.crt", ca), ("tls.crt", certificate), ("tls.key", key)):
        (data / name).write_bytes(content)
        if not (path / name).is_symlink():
            (path / name).symlink_to(f"..data/{name}")
    new = path / "..data_new"
    new.symlink_to(data.name)
    new.rename(path / "..data")
