"""llama.cpp's published choices, and the property they lack there: each tensor's choice stands alone."""

from __future__ import annotations

import pytest

from bitmill.allocation.mixture import Mixture
from bitmill.core.axes import Weight

BITS = {"q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "f16": 16}
BITS |= {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
LLAMA_8B = {"heads": 32, "kv_heads": 8, "tied": 0, "experts": 0, "imatrix": 0}
MISTRAL_7B = LLAMA_8B


def _weight(role: str, layer: int | None, shape: tuple[int, int], layers: int = 32, **traits: int) -> Weight:
    return Weight(f"x.{layer}.{role}.weight", role, layer, shape, layers, {**LLAMA_8B, **traits})


def _grid(name: str, weight: Weight) -> str:
    choice = Mixture(name).choose(weight)
    assert choice is not None
    return choice.grid


def _bpw(name: str, vocabulary: int, middle: int, **traits: int) -> float:
    """Bits a weight of a whole Llama-shaped model, norms in f32."""
    width, value, layers = 4096, 1024, 32
    shapes = {"q": (width, width), "k": (value, width), "v": (value, width), "o": (width, width)}
    shapes |= {"gate": (middle, width), "up": (middle, width), "down": (width, middle)}
    matrices = [
        _weight(role, i, shape, layers, **traits) for i in range(layers) for role, shape in shapes.items()
    ]
    matrices += [_weight(role, None, (vocabulary, width), layers, **traits) for role in ("embed", "head")]
    norms = width * (2 * layers + 1)
    bits = sum(BITS[_grid(name, w)] * w.shape[0] * w.shape[1] for w in matrices) + 32 * norms
    return bits / (sum(w.shape[0] * w.shape[1] for w in matrices) + norms)


@pytest.mark.parametrize(
    ("name", "llama", "mistral"),
    [
        ("Q4_0", 4.6358, 4.5383),
        ("Q4_1", 5.1031, 5.0293),
        ("Q5_0", 5.5704, 5.5202),
        ("Q5_1", 6.0377, 6.0111),
        ("Q8_0", 8.5008, 8.5009),
        ("Q2_K_S", 2.9697, 2.7929),
        ("Q2_K", 3.1593, 3.0032),
        ("Q3_K_S", 3.6429, 3.4951),
        ("Q3_K_M", 3.9960, 3.8866),
        ("Q3_K_L", 4.2979, 4.2214),
        ("Q4_K_S", 4.6672, 4.5731),
        ("Q4_K_M", 4.8944, 4.8250),
        ("Q5_K_S", 5.5704, 5.5202),
        ("Q5_K_M", 5.7036, 5.6679),
        ("Q6_K", 6.5633, 6.5634),
    ],
)
def test_sizes_of_published_files(name: str, llama: float, mistral: float):
    assert _bpw(name, 128256, 14336) == pytest.approx(llama, abs=6e-5)
    assert _bpw(name, 32000, 14336) == pytest.approx(mistral, abs=6e-5)


def test_q4_0_with_known_inputs():
    assert _bpw("Q4_0", 128256, 14336, imatrix=1) == pytest.approx(4.6505, abs=6e-5)
    assert _grid("Q5_0", _weight("down", 3, (4096, 14336), imatrix=1)) == "q5_1"
    assert _grid("Q5_0", _weight("down", 4, (4096, 14336), imatrix=1)) == "q5_0"
    assert _grid("Q4_1", _weight("down", 0, (4096, 14336), imatrix=1)) == "q4_1"


def test_q4_k_m_gives_v_and_down_more_bits_in_half_of_32_blocks():
    more = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    for role, shape in (("v", (1024, 4096)), ("down", (4096, 14336))):
        assert {i for i in range(32) if _grid("Q4_K_M", _weight(role, i, shape)) == "q6_k"} == more
    assert {_grid("Q4_K_M", _weight(r, 0, (4096, 4096))) for r in ("q", "k", "o", "gate", "up")} == {"q4_k"}


def test_a_tied_embedding_is_the_head():
    embed = (49152, 1024)
    assert _grid("Q4_0", _weight("embed", None, embed)) == "q4_0"
    assert _grid("Q4_0", _weight("embed", None, embed, tied=1)) == "q6_k"
    assert _grid("Q8_0", _weight("embed", None, embed, tied=1)) == "q8_0"


@pytest.mark.parametrize(
    ("role", "layer", "name", "grid", "asked"),
    [
        ("q", 5, "Q4_K_M", "q5_0", "q4_k"),
        ("v", 0, "Q4_K_M", "q8_0", "q6_k"),
        ("embed", None, "Q4_K_M", "q8_0", "q6_k"),
        ("embed", None, "Q4_0", "q8_0", "q6_k"),
        ("q", 5, "Q4_0", "q4_0", None),
        ("q", 5, "Q6_K", "q8_0", "q6_k"),
        ("q", 5, "Q5_K_M", "q5_1", "q5_k"),
        ("q", 5, "Q3_K_M", "q4_0", "q3_k"),
        ("q", 5, "Q2_K", "q4_0", "q2_k"),
    ],
)
def test_shapes_of_a_small_model_and_what_they_replace(role, layer, name, grid, asked):
    """SmolLM2-135M: rows of 576 are no whole blocks of 256."""
    choice = Mixture(name).choose(_weight(role, layer, (576, 576), 30, tied=1))
    assert choice is not None
    assert (choice.grid, choice.fallback) == (grid, asked)


def test_rows_that_fit_nothing_stay_in_half_precision():
    choice = Mixture("Q4_0").choose(_weight("q", 0, (64, 90)))
    assert choice is not None
    assert (choice.grid, choice.fallback) == ("f16", "q4_0")


def test_large_and_sparse_models():
    large = {"layers": 80, "heads": 64, "kv_heads": 8}
    choice = Mixture("Q4_K_M").choose(_weight("v", 10, (1024, 8192), **large))
    assert choice is not None
    assert (choice.grid, choice.fallback) == ("q5_k", None)
    assert _grid("Q3_K_S", _weight("v", 10, (1024, 8192), **large)) == "q5_k"
    assert _grid("Q4_K_M", _weight("o", 10, (4096, 4096), experts=8)) == "q5_k"
    assert _grid("Q3_K_L", _weight("o", 10, (4096, 4096), experts=8)) == "q3_k"
    assert _grid("Q4_K_M", _weight("v", 10, (1024, 8192), layers=80, heads=8, kv_heads=8)) == "q4_k"
    for role in ("k", "v"):
        assert _grid("Q4_K_M", _weight(role, 9, (1024, 4096), experts=8)) == "q8_0"
    assert _grid("Q4_0", _weight("k", 9, (1024, 4096), experts=8)) == "q8_0"


def test_what_is_not_quantized():
    for role, shape in (("norm", (4096,)), ("router", (8, 4096)), ("bias", (4096,)), ("other", (4096, 4096))):
        assert Mixture("Q4_K_M").choose(Weight("x", role, 3, shape, 32, LLAMA_8B)) is None


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Q4_K_M"):
        Mixture("Q9_K")
    assert "Q4_K_M" in Mixture.names()
