"""Sets the fields that a spec leaves to the release of its service (`plan/release.py`)."""

import msgspec

from kvasir_operator.api import InferenceService
from kvasir_operator.render.options import CERTIFICATES, Options


def with_release_defaults(service: InferenceService, options: Options) -> InferenceService:
    """The service with every field set that the release of `options` decides."""
    transfer = service.spec.transfer
    if transfer.encryption is not None:
        return service
    encryption = "Auto" if options.defaults >= CERTIFICATES else "Off"
    transfer = msgspec.structs.replace(transfer, encryption=encryption)
    return msgspec.structs.replace(service, spec=msgspec.structs.replace(service.spec, transfer=transfer))
