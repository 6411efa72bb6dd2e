"""Chains of a transformer's rows: normalisation, activation, softmax, gates, rotation; the same in half precision."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.chains.case import Case, sizes

LAYERNORM_GELU = Case(
    "layernorm_gelu",
    """(float[r,h] x, float[r,h] skip, float[h] gain, float[h] shift) => (float[r,h] y) {
        total = Add(x, skip)
        normal = LayerNormalization<axis = -1, epsilon = 1e-5>(total, gain, shift)
        y = Gelu(normal)
    }""",
    sizes("r h", (16, 768), (1024, 768), (16384, 768)),
    weights=("gain", "shift"),
)
SOFTMAX = Case(
    "scale_mask_softmax",
    """(float[b,a,s,s] x, float[b,1,s,s] mask, float[1] scale) => (float[b,a,s,s] y) {
        scaled = Mul(x, scale)
        masked = Add(scaled, mask)
        y = Softmax<axis = -1>(masked)
    }""",
    sizes("b a s", (1, 4, 64), (1, 8, 256), (4, 12, 512)),
    weights=("scale",),
    positive=("scale",),
)
SWIGLU = Case(
    "rmsnorm_swiglu",
    """(float[r,h] x, float[r,h] gate, float[h] gain) => (float[r,h] y) {
        normal = RMSNormalization<axis = -1, epsilon = 1e-6>(x, gain)
        open = Sigmoid(gate)
        swish = Mul(gate, open)
        y = Mul(normal, swish)
    }""",
    sizes("r h", (8, 2048), (256, 2048), (4096, 2048)),
    weights=("gain",),
)
TRANSFORMER = (
    LAYERNORM_GELU,
    replace(
        LAYERNORM_GELU,
        name="layernorm_gelu_tanh",
        graph=LAYERNORM_GELU.graph.replace("Gelu(", 'Gelu<approximate = "tanh">('),
    ),
    SOFTMAX,
    SWIGLU,
    Case(
        "rmsnorm_geglu",
        """(float[r,h] x, float[r,h] gate, float[h] gain) => (float[r,h] y) {
            normal = RMSNormalization<axis = -1, epsilon = 1e-6>(x, gain)
            open = Gelu(gate)
            y = Mul(normal, open)
        }""",
        SWIGLU.sizes,
        weights=("gain",),
    ),
    Case(
        "rope",
        """(float[b,a,s,d] x, float[s,e] cos, float[s,e] sin) => (float[b,a,s,d] y) {
            left, right = Split<axis = -1, num_outputs = 2>(x)
            left_cos = Mul(left, cos)
            right_sin = Mul(right, sin)
            first = Sub(left_cos, right_sin)
            right_cos = Mul(right, cos)
            left_sin = Mul(left, sin)
            second = Add(right_cos, left_sin)
            y = Concat<axis = -1>(first, second)
        }""",
        sizes("b a s d e", (1, 4, 64, 64, 32), (1, 16, 512, 128, 64), (2, 32, 2048, 128, 64)),
    ),
    Case(
        "layernorm_gelu_softmax",
        """(float[b,s,h] x, float[b,s,h] skip, float[h] gain, float[h] shift) => (float[b,s,h] y) {
            total = Add(x, skip)
            normal = LayerNormalization<axis = -1, epsilon = 1e-5>(total, gain, shift)
            active = Gelu(normal)
            y = Softmax<axis = -1>(active)
        }""",
        sizes("b s h", (1, 16, 768), (8, 128, 768), (32, 512, 768)),
        weights=("gain", "shift"),
        symbolic=True,
    ),
    *(case.typed(dtype) for dtype in ("float16", "bfloat16") for case in (LAYERNORM_GELU, SOFTMAX, SWIGLU)),
)
