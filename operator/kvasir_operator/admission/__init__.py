"""PURE: whether an InferenceService is valid: its fields, and the pods that they render to."""

from kvasir_operator.admission.parse import parse

__all__ = ["parse"]
