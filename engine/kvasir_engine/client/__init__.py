"""Clients of any OpenAI-compatible endpoint: `kvasir bench`, `kvasir chat` and `kvasir complete`."""
