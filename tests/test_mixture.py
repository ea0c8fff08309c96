"""llama.cpp's published choices, and the property they lack there: each tensor's choice stands alone."""

from __future__ import annotations

import pytest

from bitmill.allocation.mixture import Mixture, demands_importance
from bitmill.containers.gguf import MIXTURES
from bitmill.core.axes import Weight

BITS = {"q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "f16": 16}
BITS |= {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
BITS |= {"iq1_s": 1.5625, "iq1_m": 1.75, "iq2_xxs": 2.0625, "iq2_xs": 2.3125, "iq2_s": 2.5625}
BITS |= {"iq3_xxs": 3.0625, "iq3_s": 3.4375, "iq4_nl": 4.5, "iq4_xs": 4.25}
LLAMA_8B = {"heads": 32, "kv_heads": 8, "tied": 0, "experts": 0, "imatrix": 0}
MIXTRAL = {"heads": 32, "kv_heads": 8, "experts": 8}
QWEN3_MOE = {"heads": 32, "kv_heads": 4, "experts": 128, "layers": 48}
GEMMA3 = {"heads": 8, "kv_heads": 4, "tied": 1, "layers": 34}
EXPERTS = (8, 14336, 4096)
EIGHTH, MIDDLE = {0, 1, 2, 3}, set(range(4, 28))
MORE = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}


def _weight(
    role: str, layer: int | None, shape: tuple[int, ...] = (4096, 4096), layers: int = 32, **traits: int
) -> Weight:
    return Weight(f"x.{layer}.{role}.weight", role, layer, shape, layers, {**LLAMA_8B, **traits})


def _grid(name: str, weight: Weight) -> str:
    choice = Mixture(name).choose(weight)
    assert choice is not None
    return choice.grid


def _blocks(name: str, role: str, grid: str, layers: int = 32, **traits: int) -> set[int]:
    """Blocks whose ``role`` is stored as ``grid``."""
    return {i for i in range(layers) if _grid(name, _weight(role, i, layers=layers, **traits)) == grid}


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
    ("name", "imatrix", "llama", "mistral"),
    [
        ("IQ1_S", 1, 2.0042, 1.7801),
        ("IQ1_M", 1, 2.1460, 1.9373),
        ("IQ2_XXS", 1, 2.3824, 2.1994),
        ("IQ2_XS", 1, 2.5882, 2.4276),
        ("IQ2_S", 1, 2.7403, 2.5521),
        ("IQ2_M", 1, 2.9294, 2.7617),
        ("Q2_K_S", 1, 2.9697, 2.7929),
        ("Q2_K", 0, 3.1593, 3.0032),
        ("IQ3_XXS", 1, 3.2548, 3.1226),
        ("IQ3_XS", 1, 3.4977, 3.3341),
        ("Q3_K_S", 0, 3.6429, 3.4951),
        ("IQ3_S", 0, 3.6606, 3.5148),
        ("IQ3_M", 0, 3.7628, 3.6280),
        ("Q3_K_M", 0, 3.9960, 3.8866),
        ("Q3_K_L", 0, 4.2979, 4.2214),
        ("IQ4_XS", 1, 4.4231, 4.3160),
        ("IQ4_XS", 0, 4.4597, None),
        ("Q4_0", 0, 4.6358, 4.5383),
        ("Q4_0", 1, 4.6505, None),
        ("IQ4_NL", 1, 4.6526, 4.5569),
        ("IQ4_NL", 0, 4.6818, None),
        ("Q4_K_S", 0, 4.6672, 4.5731),
        ("Q4_K_M", 0, 4.8944, 4.8250),
        ("Q4_1", 0, 5.1031, 5.0293),
        ("Q5_0", 0, 5.5704, 5.5202),
        ("Q5_K_S", 0, 5.5704, 5.5202),
        ("Q5_K_M", 0, 5.7036, 5.6679),
        ("Q5_1", 0, 6.0377, 6.0111),
        ("Q6_K", 0, 6.5633, 6.5634),
        ("Q8_0", 0, 8.5008, 8.5009),
    ],
)
def test_sizes_of_published_files(name: str, imatrix: int, llama: float, mistral: float | None) -> None:
    assert round(_bpw(name, 128256, 14336, imatrix=imatrix), 4) == pytest.approx(llama, abs=1e-9)
    if mistral is not None:
        assert round(_bpw(name, 32000, 14336, imatrix=imatrix), 4) == pytest.approx(mistral, abs=1e-9)


def test_q4_0_with_known_inputs():
    assert _grid("Q5_0", _weight("down", 3, (4096, 14336), imatrix=1)) == "q5_1"
    assert _grid("Q5_0", _weight("down", 4, (4096, 14336), imatrix=1)) == "q5_0"
    assert _grid("Q4_1", _weight("down", 0, (4096, 14336), imatrix=1)) == "q4_1"


def test_q4_k_m_gives_v_and_down_more_bits_in_half_of_32_blocks():
    for role in ("v", "down"):
        assert _blocks("Q4_K_M", role, "q6_k") == MORE
        assert _blocks("Q4_K_M", role, "q4_k") == set(range(32)) - MORE
    assert {_grid("Q4_K_M", _weight(r, 0, (4096, 4096))) for r in ("q", "k", "o", "gate", "up")} == {"q4_k"}


@pytest.mark.parametrize(
    ("name", "q", "k", "v", "o", "early", "down", "embed", "head"),
    [
        ("IQ1_S", "iq1_s", "iq1_s", "q4_k", "iq2_xxs", "q2_k", "iq1_s", "q2_k", "q5_k"),
        ("IQ1_M", "iq1_m", "iq1_m", "q4_k", "iq2_xxs", "q2_k", "iq1_m", "q2_k", "q5_k"),
        ("IQ2_XXS", "iq2_xxs", "iq2_xxs", "q4_k", "iq2_xxs", "q2_k", "iq2_xxs", "q2_k", "q5_k"),
        ("IQ2_XS", "iq2_xs", "iq2_xs", "q4_k", "iq2_xs", "q2_k", "iq2_xs", "q2_k", "q5_k"),
        ("IQ2_S", "iq2_xs", "iq2_xs", "q4_k", "iq3_s", "iq3_s", "iq2_xs", "iq3_s", "q5_k"),
        ("IQ2_M", "iq2_s", "iq2_s", "q4_k", "iq3_s", "iq3_s", "iq2_s", "iq3_s", "q5_k"),
        ("IQ3_XXS", "iq2_s", "iq2_s", "q4_k", "iq3_s", "iq3_xxs", "iq3_xxs", "iq3_s", "q5_k"),
        ("IQ3_XS", "iq3_xxs", "iq3_xxs", "q4_k", "iq3_s", "iq3_s", "iq3_s", "iq3_s", "q6_k"),
        ("IQ3_S", "iq3_s", "iq3_s", "q4_k", "iq3_s", "iq3_s", "iq3_s", "iq3_s", "q6_k"),
        ("IQ3_M", "iq3_s", "iq3_s", "q4_k", "q4_k", "q4_k", "iq3_s", "iq3_s", "q6_k"),
        ("IQ4_NL", "iq4_nl", "iq4_nl", "q5_k", "iq4_nl", "iq4_nl", "iq4_nl", "iq4_nl", "q6_k"),
        ("IQ4_XS", "iq4_xs", "iq4_xs", "q5_k", "iq4_xs", "iq4_xs", "iq4_xs", "iq4_xs", "q6_k"),
        ("TQ1_0", "tq1_0", "tq1_0", "tq1_0", "tq1_0", "tq1_0", "tq1_0", "q4_k", "q6_k"),
        ("TQ2_0", "tq2_0", "tq2_0", "tq2_0", "tq2_0", "tq2_0", "tq2_0", "q4_k", "q6_k"),
        ("MXFP4_MOE", "q8_0", "q8_0", "q8_0", "q8_0", "q8_0", "q8_0", "q8_0", "q8_0"),
    ],
)
def test_llama_3_8b_with_known_inputs(name, q, k, v, o, early, down, embed, head):
    found = {r: {_grid(name, _weight(r, i, imatrix=1)) for i in range(32)} for r in ("q", "k", "v", "o")}
    assert found == {"q": {q}, "k": {k}, "v": {v}, "o": {o}}
    assert [_grid(name, _weight("down", i, imatrix=1)) for i in range(32)] == [early] * 4 + [down] * 28
    assert [_grid(name, _weight(r, None)) for r in ("embed", "head")] == [embed, head]


def test_where_the_inputs_are_unknown():
    assert _blocks("IQ3_XXS", "down", "q4_k") == EIGHTH
    assert _blocks("IQ3_XXS", "down", "q3_k") == set(range(4, 32))
    assert _grid("IQ3_XXS", _weight("v", 0, kv_heads=32)) == "iq3_s"
    assert _grid("IQ3_XXS", _weight("v", 0, kv_heads=32, imatrix=1)) == "iq3_xxs"
    for name in ("IQ4_NL", "IQ4_XS"):
        assert _blocks(name, "down", "q5_k") == EIGHTH
        assert not _blocks(name, "down", "q5_k", imatrix=1)


def test_keys_of_their_own_or_shared():
    for name, shared, own in (
        ("IQ1_S", "q4_k", "q2_k"),
        ("IQ2_M", "q4_k", "iq3_s"),
        ("IQ3_S", "q4_k", "iq3_s"),
        ("IQ4_XS", "q5_k", "iq4_xs"),
        ("Q2_K", "q4_k", "q3_k"),
        ("Q2_K_S", "q4_k", "q2_k"),
    ):
        assert _grid(name, _weight("v", 9)) == shared
        assert _grid(name, _weight("v", 9, kv_heads=32)) == own


def test_iq3_xs_gives_the_middle_fewer_bits():
    for role in ("gate", "up"):
        assert _blocks("IQ3_XS", role, "iq3_xxs") == MIDDLE
        assert _blocks("IQ3_XS", role, "iq3_s") == set(range(32)) - MIDDLE


@pytest.mark.parametrize(
    ("name", "k", "v", "o"),
    [
        ("Q4_K_M", "q8_0", "q8_0", "q5_k"),
        ("Q5_K_M", "q8_0", "q8_0", "q5_k"),
        ("Q3_K_L", "q8_0", "q8_0", "q3_k"),
        ("Q2_K_S", "q8_0", "q8_0", "q2_k"),
        ("Q6_K", "q8_0", "q8_0", "q6_k"),
        ("Q4_0", "q8_0", "q8_0", "q4_0"),
        ("IQ4_XS", "q8_0", "q8_0", "q5_k"),
        ("IQ3_XXS", "q8_0", "q8_0", "q5_k"),
        ("IQ2_XS", "q4_k", "q4_k", "q5_k"),
        ("IQ1_M", "q4_k", "q4_k", "q5_k"),
        ("TQ2_0", "q8_0", "q8_0", "tq2_0"),
        ("MXFP4_MOE", "q8_0", "q8_0", "q8_0"),
    ],
)
def test_mixtral(name, k, v, o):
    found = {r: {_grid(name, _weight(r, i, **MIXTRAL)) for i in range(32)} for r in ("k", "v", "o")}
    assert found == {"k": {k}, "v": {v}, "o": {o}}


def test_stacks_of_experts_go_by_the_number_of_their_block():
    def more(name: str, role: str, grid: str) -> set[int]:
        return {i for i in range(32) if _grid(name, _weight(role, i, EXPERTS, **MIXTRAL)) == grid}

    assert more("Q4_K_M", "down", "q6_k") == more("IQ3_M", "down", "q4_k") == MORE
    assert more("Q4_K_S", "down", "q5_k") == more("IQ2_M", "down", "iq3_s") == EIGHTH
    assert more("IQ3_XS", "gate", "iq3_xxs") == more("IQ3_XS", "up", "iq3_xxs") == MIDDLE
    assert _blocks("IQ3_M", "down", "q4_k") == EIGHTH
    for role in ("gate", "up", "down"):
        assert more("MXFP4_MOE", role, "mxfp4-floor") == set(range(32))
        assert _grid("MXFP4_MOE", _weight(role, 3)) == "q8_0"


def test_qwen3_moe_is_not_a_mixture_of_eight():
    assert (
        _grid("Q4_K_M", _weight("k", 9, **QWEN3_MOE))
        == _grid("Q4_K_M", _weight("o", 9, **QWEN3_MOE))
        == "q4_k"
    )
    more = {*range(6), *range(8, 42, 3), *range(42, 48)}
    assert (
        _blocks("Q4_K_M", "v", "q6_k", **QWEN3_MOE) == _blocks("Q4_K_M", "down", "q6_k", **QWEN3_MOE) == more
    )
    assert _blocks("Q2_K", "v", "q4_k", **QWEN3_MOE) == set(range(48))
    assert _blocks("IQ2_XXS", "down", "q2_k", **QWEN3_MOE) == set(range(6))
    assert _grid("IQ2_XXS", _weight("v", 9, **{**QWEN3_MOE, "kv_heads": 32})) == "q4_k"
    assert _grid("IQ3_S", _weight("v", 9, **{**QWEN3_MOE, "kv_heads": 32})) == "iq3_s"


def test_gemma_3_4b_is_tied_and_shares_a_key_between_two():
    embed = _weight("embed", None, (262208, 2560), **GEMMA3)
    assert [_grid(n, embed) for n in ("Q4_K_M", "Q4_0", "IQ2_M", "Q8_0", "MXFP4_MOE")] == [
        "q6_k", "q6_k", "q5_k", "q8_0", "q8_0",
    ]  # fmt: skip
    more = {*range(4), *range(6, 29, 3), *range(29, 34)}
    assert _blocks("Q4_K_M", "v", "q6_k", **GEMMA3) == _blocks("Q4_K_M", "down", "q6_k", **GEMMA3) == more
    assert _grid("Q2_K", _weight("v", 9, **GEMMA3)) == "q3_k"
    assert _grid("IQ4_XS", _weight("v", 9, **GEMMA3)) == "iq4_xs"


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
        ("q", 5, "IQ1_S", "iq4_nl", "iq1_s"),
        ("q", 5, "IQ3_S", "iq4_nl", "iq3_s"),
        ("q", 5, "IQ4_XS", "iq4_nl", "iq4_xs"),
        ("q", 5, "IQ4_NL", "iq4_nl", None),
        ("q", 5, "TQ1_0", "q4_0", "tq1_0"),
        ("embed", None, "IQ2_XXS", "q8_0", "q6_k"),
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
    assert _grid("IQ3_M", _weight("v", 10, (1024, 8192), **large)) == "q5_k"
    assert _grid("IQ2_M", _weight("v", 10, (1024, 8192), **large)) == "q4_k"
    for role in ("k", "v"):
        assert _grid("Q4_K_M", _weight(role, 9, (1024, 4096), experts=8)) == "q8_0"
    assert _grid("Q4_0", _weight("k", 9, (1024, 4096), experts=8)) == "q8_0"


def test_what_is_not_quantized():
    for role, shape in (("norm", (4096,)), ("router", (8, 4096)), ("bias", (4096,)), ("other", (4096, 4096))):
        assert Mixture("Q4_K_M").choose(Weight("x", role, 3, shape, 32, LLAMA_8B)) is None


def _stored(name: str, role: str, layer: int | None, columns: int = 4096, **traits: int) -> Weight:
    return Weight("x", role, layer, (4096, columns), 32, {**LLAMA_8B, **traits}, name)


def test_the_first_pattern_that_is_found_decides():
    mixture = Mixture(
        "Q4_K_M", tensors=((r"blk\.[0-3]\.ffn_down", "q8_0"), ("ffn_", "q5_k"), ("output", "f16"))
    )

    def grid(name: str, role: str, layer: int | None) -> str:
        choice = mixture.choose(_stored(name, role, layer))
        assert choice is not None
        return choice.grid

    assert grid("blk.3.ffn_down.weight", "down", 3) == "q8_0"
    assert grid("blk.4.ffn_down.weight", "down", 4) == "q5_k"
    assert grid("blk.4.attn_q.weight", "q", 4) == "q4_k"
    assert grid("blk.4.attn_output.weight", "o", 4) == grid("output.weight", "head", None) == "f16"
    assert mixture.choose(_stored("blk.4.ffn_norm.weight", "mlp_in_norm", 4)) is None


def test_pure_is_the_default_everywhere_but_for_patterns_and_shapes():
    pure = Mixture("Q4_K_M", pure=True, tensors=(("attn_v", "q8_0"),))
    weights = {
        "q4_k": [_stored("output.weight", "head", None), _stored("blk.0.ffn_down.weight", "down", 0)],
        "q5_0": [_stored("token_embd.weight", "embed", None, 576, tied=1)],
        "q8_0": [_stored("blk.0.attn_v.weight", "v", 0)],
    }
    for grid, found in weights.items():
        assert [c.grid for w in found if (c := pure.choose(w))] == [grid] * len(found)


def test_the_head_s_type_where_the_embedding_is_the_head():
    tied = _stored("token_embd.weight", "embed", None, tied=1)
    for mixture, grid in (
        (Mixture("Q4_K_M", output="q8_0"), "q8_0"),
        (Mixture("Q4_K_M", output="q8_0", pure=True), "q4_k"),
        (Mixture("Q4_K_M", output="q8_0", tensors=(("token", "q5_k"),)), "q5_k"),
    ):
        choice = mixture.choose(tied)
        assert choice is not None and choice.grid == grid
    untied = Mixture("Q4_K_M", output="q8_0").choose(_stored("token_embd.weight", "embed", None))
    assert untied is not None and untied.grid == "q4_k"


def test_which_types_need_to_know_their_inputs():
    assert demands_importance("IQ3_XS", "q", "iq3_xxs")
    assert not demands_importance("IQ3_S", "q", "iq3_s")
    assert demands_importance("Q2_K_S", "q", "q2_k")
    assert not demands_importance("Q2_K", "q", "q2_k")
    assert not demands_importance("IQ1_S", "embed", "iq1_s")


def test_every_mixture_has_its_number():
    assert set(Mixture.names()) <= set(MIXTURES)
    numbers = [MIXTURES[name] for name in Mixture.names()]
    assert len(set(numbers)) == len(numbers)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Q4_K_M"):
        Mixture("Q9_K")
    assert "Q4_K_M" in Mixture.names()
