"""Kvasir's control plane: turns an InferenceService into pods, services and routes."""
