"""Chains over images: normalisation over channels, groups and pixels, changes of layout, bytes and floats."""

from __future__ import annotations

from benchmarks.chains.case import Case, sizes

MAPS = sizes("n c h w", (1, 64, 16, 16), (1, 256, 64, 64), (2, 256, 192, 192))

VISION = (
    Case(
        "groupnorm_swish",
        """(float[n,c,h,w] x, float[c] gain, float[c] shift) => (float[n,c,h,w] y) {
            normal = GroupNormalization<num_groups = 32, epsilon = 1e-5>(x, gain, shift)
            open = Sigmoid(normal)
            y = Mul(normal, open)
        }""",
        MAPS,
        weights=("gain", "shift"),
    ),
    Case(
        "instancenorm_swish",
        """(float[n,c,h,w] x, float[c] gain, float[c] shift) => (float[n,c,h,w] y) {
            normal = InstanceNormalization<epsilon = 1e-5>(x, gain, shift)
            open = Sigmoid(normal)
            y = Mul(normal, open)
        }""",
        MAPS,
        weights=("gain", "shift"),
    ),
    Case(
        "batchnorm_hardswish",
        """(float[n,c,h,w] x, float[n,c,h,w] skip, float[c] gain, float[c] shift, float[c] mean, float[c] variance)
            => (float[n,c,h,w] y) {
            normal = BatchNormalization<epsilon = 1e-5>(x, gain, shift, mean, variance)
            active = HardSwish(normal)
            y = Add(active, skip)
        }""",
        sizes("n c h w", (1, 64, 16, 16), (1, 192, 56, 56), (2, 192, 168, 168)),
        weights=("gain", "shift", "mean", "variance"),
        positive=("variance",),
    ),
    Case(
        "layernorm_channels",
        """(float[n,c,h,w] x, float[c] gain, float[c] shift) => (float[n,c,h,w] y) {
            last = Transpose<perm = [0, 2, 3, 1]>(x)
            normal = LayerNormalization<axis = -1, epsilon = 1e-6>(last, gain, shift)
            y = Transpose<perm = [0, 3, 1, 2]>(normal)
        }""",
        sizes("n c h w", (1, 96, 14, 14), (1, 192, 56, 56), (2, 192, 192, 192)),
        weights=("gain", "shift"),
    ),
    Case(
        "preprocess",
        """(uint8[n,h,w,k] x, float[k] mean, float[k] deviation) => (float[n,k,h,w] y) <float unit = {0.003921569}> {
            pixels = Cast<to = 1>(x)
            scaled = Mul(pixels, unit)
            centred = Sub(scaled, mean)
            normal = Div(centred, deviation)
            y = Transpose<perm = [0, 3, 1, 2]>(normal)
        }""",
        sizes("n h w k", (1, 96, 96, 3), (1, 512, 512, 3), (8, 1024, 1024, 3)),
        weights=("mean", "deviation"),
        positive=("mean", "deviation"),
    ),
    Case(
        "postprocess",
        """(float[n,k,h,w] x) => (uint8[n,h,w,k] y) <float most = {255}, float least = {0}> {
            scaled = Mul(x, most)
            last = Transpose<perm = [0, 2, 3, 1]>(scaled)
            whole = Round(last)
            clipped = Clip(whole, least, most)
            y = Cast<to = 2>(clipped)
        }""",
        sizes("n h w k", (1, 96, 96, 3), (1, 512, 512, 3), (8, 1024, 1024, 3)),
    ),
    Case(
        "bias_transpose",
        """(float[b,s,h] x, float[h] bias) => (float[b,h,s] y) {
            biased = Add(x, bias)
            y = Transpose<perm = [0, 2, 1]>(biased)
        }""",
        sizes("b s h", (1, 64, 256), (8, 128, 768), (8, 2048, 1024)),
        weights=("bias",),
    ),
)
