"""Kvasir's data plane: the router and the prefill and decode workers."""
