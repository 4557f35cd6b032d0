"""`kvasir bench`: puts load on an endpoint, and measures what its clients see."""
