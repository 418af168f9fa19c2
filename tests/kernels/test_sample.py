"""Choosing a token: what is kept, how it is drawn, and what it must not depend on."""

import pytest
import torch

from kernels.reference import TorchOps
from kernels.reference.philox import philox_4x32, uniform


def arguments(rows, **given):
    """All choices off, but for those given; plain numbers fill all rows."""
    defaults = {
        "temperature": (1.0, torch.float32),
        "top_k": (0, torch.int32),
        "top_p": (1.0, torch.float32),
        "min_p": (0.0, torch.float32),
        "seeds": (0, torch.int64),
        "output_indices": (0, torch.int32),
        "positions": (0, torch.int32),
    }
    return {
        name: torch.as_tensor(given.get(name, value), dtype=kind).expand(rows).contiguous()
        for name, (value, kind) in defaults.items()
    }


def many(ops, logits, draws, **given):
    """`draws` tokens of one row, at as many positions: `[draws]`."""
    rows = logits.expand(draws, -1).contiguous()
    return ops.sample(rows, **arguments(draws, positions=torch.arange(draws), **given))


def test_philox_known_answers():
    """From the authors' own test vectors (Random123, kat_vectors)."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    for word, expected in (
        (zero, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        out = philox_4x32([word] * 4, [word] * 2)
        assert tuple(int(w) for w in out) == expected


def test_uniform_numbers_fill_the_unit_interval():
    numbers = uniform(torch.arange(4096), torch.zeros(4096), torch.full((4096,), 7))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers.float(), bins=16, min=0, max=1)
    assert ((counts - 256).square() / 256).sum() < 60  # 15 degrees of freedom: p < 1e-6


def test_temperature_zero_takes_the_largest_and_the_lowest_id_on_a_tie(ops):
    logits = torch.randn(50, 333)
    assert torch.equal(ops.sample(logits, **arguments(50, temperature=0.0)), logits.argmax(-1))
    tied = torch.zeros(3, 200)
    tied[:, [150, 60, 61]] = 1.0
    assert ops.sample(tied, **arguments(3, temperature=0.0)).tolist() == [60, 60, 60]


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 1000, 20000])
def test_all_paths_draw_the_same_tokens(exact_ops, width):
    rows = 64 if width < 5000 else 16
    logits = torch.randn(rows, width) * 3
    choice = arguments(
        rows,
        temperature=torch.rand(rows) * 1.5,
        top_k=torch.randint(-1, 60, (rows,)),
        top_p=torch.rand(rows) * 1.2,
        min_p=(torch.rand(rows) * 0.3 - 0.1).clamp_min(0),
        seeds=torch.randint(-(2**62), 2**62, (rows,)),
        output_indices=torch.randint(0, 4, (rows,)),
        positions=torch.randint(0, 2**20, (rows,)),
    )
    drawn = exact_ops.sample(logits, **choice)
    expected = TorchOps().sample(logits, **choice)
    # Weights are float32 on one side and float64 on the other: a number so close to an edge that
    # they disagree comes up once in a million rows, and two of them in 64 once in 10^9 such tests.
    assert (drawn != expected).sum() <= 1


def test_draws_follow_the_distribution(ops):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf, 0.5, 1.5, torch.nan, -3.0, 0.7])
    temperature, draws = 0.8, 20_000
    tokens = many(ops, logits, draws, temperature=temperature, seeds=11)
    expected = (logits / temperature).nan_to_num(nan=-torch.inf).double().softmax(-1) * draws
    counts = tokens.bincount(minlength=10).double()
    drawable = expected > 0
    assert counts[~drawable].sum() == 0
    chi_square = ((counts - expected).square() / expected)[drawable].sum()
    assert chi_square < 45  # 7 degrees of freedom: p < 1e-6, and the seed is fixed


def test_filters_keep_what_they_say(ops):
    # Probabilities 0.4, 0.3, 0.2, 0.1 at ids 3, 0, 2, 1.
    logits = torch.tensor([0.3, 0.1, 0.2, 0.4]).log()

    def kept(**given):
        return set(many(ops, logits, 400, **given).tolist())

    assert kept() == {0, 1, 2, 3}
    assert kept(top_k=1) == {3}
    assert kept(top_k=2) == {3, 0}
    assert kept(top_k=99) == {0, 1, 2, 3}
    assert kept(top_p=0.39) == {3}
    assert kept(top_p=0.41) == {3, 0}
    assert kept(top_p=0.0) == {3}
    assert kept(min_p=0.7) == {3, 0}
    assert kept(min_p=0.2) == {0, 1, 2, 3}
    assert kept(top_k=3, top_p=0.75) == {3, 0}  # of the three, 4/9 and 3/9 reach 0.75
    assert kept(top_p=0.95, min_p=0.6) == {3, 0}
    assert kept(top_k=3, min_p=0.6) == {3, 0}


def test_ties_at_the_edge_of_top_k_go_to_the_lower_ids(ops):
    logits = torch.zeros(500)
    assert set(many(ops, logits, 300, top_k=3).tolist()) == {0, 1, 2}
    assert set(many(ops, logits, 300, top_p=2.5 / 500).tolist()) == {0, 1, 2}


def test_hopeless_rows_still_give_a_token(ops):
    for value in (-torch.inf, torch.nan):
        logits = torch.full((2, 70), value)
        for given in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}):
            tokens = ops.sample(logits, **arguments(2, **given))
            assert ((tokens >= 0) & (tokens < 70)).all()
    certain = torch.zeros(1, 70)
    certain[0, 33] = torch.inf
    assert ops.sample(certain, **arguments(1)).tolist() == [33]


def test_a_tiny_temperature_is_greedy_not_nan(ops):
    logits = torch.randn(8, 300)
    tokens = ops.sample(logits, **arguments(8, temperature=1e-30, seeds=5))
    assert torch.equal(tokens, logits.argmax(-1))


def test_a_row_draws_the_same_among_any_others(on_threads):
    rows = 40
    logits = torch.randn(rows, 777)
    choice = arguments(
        rows,
        temperature=torch.rand(rows) + 0.5,
        top_k=torch.randint(0, 50, (rows,)),
        top_p=torch.rand(rows),
        seeds=torch.randint(0, 2**40, (rows,)),
        positions=torch.randint(0, 1000, (rows,)),
    )
    whole = on_threads(1).sample(logits, **choice)
    assert torch.equal(on_threads(3).sample(logits, **choice), whole)
    order = torch.randperm(rows)
    shuffled = {name: value[order] for name, value in choice.items()}
    assert torch.equal(on_threads(2).sample(logits[order], **shuffled), whole[order])
    for r in (0, 17, 39):
        alone = {name: value[r : r + 1] for name, value in choice.items()}
        assert torch.equal(on_threads(1).sample(logits[r : r + 1], **alone), whole[r : r + 1])


def test_seed_output_and_position_each_matter(ops):
    logits = torch.zeros(1, 1 << 14)
    base = {"seeds": 2**40 + 1, "output_indices": 1, "positions": 1}
    first = ops.sample(logits, **arguments(1, **base))
    assert torch.equal(ops.sample(logits, **arguments(1, **base)), first)
    for change in (
        {"seeds": 1},
        {"seeds": 2**41 + 1},
        {"output_indices": 2},
        {"positions": 2},
    ):
        assert ops.sample(logits, **arguments(1, **{**base, **change})) != first
