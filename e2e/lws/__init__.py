"""LeaderWorkerSet in a cluster, as far as the tests need it: the resource, and a controller of our own."""
