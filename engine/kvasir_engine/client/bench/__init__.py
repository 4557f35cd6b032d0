"""`kvasir bench`: load on an endpoint, and what its clients see."""
