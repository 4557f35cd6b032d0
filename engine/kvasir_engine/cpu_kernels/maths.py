"""Scalar pieces that LLVM turns into vector code: conversions of bfloat16 and the exponential."""

import numba
import numpy as np


@numba.njit(inline="always")
def widen(bits):  # type: ignore[no-untyped-def]
    """bfloat16, as uint16, to float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@numba.njit(inline="always")
def narrow(value):  # type: ignore[no-untyped-def]
    """float32 to bfloat16, as uint16: to the nearest, ties to even. Not for NaN."""
    bits = np.float32(value).view(np.int32)
    bits += np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))
    return np.uint16(bits >> np.int32(16))


@numba.njit(inline="always")
def exp(x):  # type: ignore[no-untyped-def]
    """e to the x in float32, within 2e-7 relatively, from -87 up; below that, e to the -87. For x up to 88."""
    x = max(np.float32(x), np.float32(-87.0))
    scaled = x * np.float32(1.4426950408889634)
    whole = np.int32(scaled + (np.float32(0.5) if x > 0 else np.float32(-0.5)))
    n = np.float32(whole)
    rest = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    # Cephes' expf polynomial (Moshier)
    y = np.float32(1.9875691500e-4)
    y = y * rest + np.float32(1.3981999507e-3)
    y = y * rest + np.float32(8.3334519073e-3)
    y = y * rest + np.float32(4.1665795894e-2)
    y = y * rest + np.float32(1.6666665459e-1)
    y = y * rest + np.float32(5.0000001201e-1)
    y = y * rest * rest + rest + np.float32(1.0)
    power = np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)
    return y * power
