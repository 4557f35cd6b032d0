"""How many layers go in one push over a link, by what its descriptors and its bytes cost. Pure.

A layer of a page is one run of bytes, and so is any number of layers of a page that follow one another: a write of
them is one descriptor a page, whatever their number. So a push of few layers begins early and leaves little for the
end, and one of many has few descriptors. Over RDMA a descriptor costs little beside its bytes, and each layer goes
as it is computed; where a copy is fast and its descriptor is not, as by CUDA IPC, whole pages go.
"""

from dataclasses import dataclass

SHARE = 0.25
"""Of the bytes' own time, what the descriptors of a push may cost."""


@dataclass(frozen=True)
class LinkCost:
    """What a link takes: so many seconds a descriptor, and its bytes at `bytes_per_second`."""

    descriptor_seconds: float
    bytes_per_second: float

    def seconds(self, descriptors: int, size: int) -> float:
        """Of one write."""
        return descriptors * self.descriptor_seconds + size / self.bytes_per_second


def cost_of(few: "Timed", many: "Timed") -> LinkCost:
    """The cost by which two writes took what they took.

    `many` has more descriptors a byte. Where the times disagree with any such cost (a clock's grain, another load),
    descriptors are free, and the rate is the faster one of the two: nothing is made of noise.
    """
    # seconds = descriptors * c + size * b, twice
    determinant = few.descriptors * many.size - many.descriptors * few.size
    if determinant:
        c = (few.seconds * many.size - many.seconds * few.size) / determinant
        b = (few.descriptors * many.seconds - many.descriptors * few.seconds) / determinant
        if c >= 0 and b > 0:
            return LinkCost(c, 1 / b)
    return LinkCost(0.0, max(few.rate, many.rate))


@dataclass(frozen=True)
class Timed:
    """A write of `descriptors` runs of `size` bytes in all, in so many seconds (above 0)."""

    descriptors: int
    size: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.size / self.seconds


def layers_a_push(cost: LinkCost, layer_bytes: int, layers: int) -> int:
    """Of pages whose layers have `layer_bytes`: the fewest layers whose bytes outweigh their one descriptor.

    Fewest, as what is left when the prompt's last layer is computed is one push. All `layers` where none do.
    Pushes of a page are as equal as they can be.
    """
    if layers <= 1 or layer_bytes <= 0:
        return max(layers, 1)
    wanted = cost.descriptor_seconds * cost.bytes_per_second / SHARE
    fewest = (
        1 if wanted <= layer_bytes else layers if wanted >= layer_bytes * layers else -int(-wanted // layer_bytes)
    )
    pushes = layers // fewest
    return -(-layers // pushes)
