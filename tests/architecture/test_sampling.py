import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpnas_jax.architecture.sampling import (
    all_survivors,
    num_sampled_epochs,
    num_surviving,
    operation_names,
    operation_positions,
    stage_permutations,
)
from cpnas_jax.models.space import OPERATIONS

FIRST_SAMPLE_OF_SEED_7 = [
    [1, 5, 1, 2, 7, 1, 6, 5, 5, 7, 0, 5, 5, 5],
    [0, 6, 1, 1, 5, 4, 2, 6, 2, 1, 5, 2, 3, 3],
]

SEEDS = st.integers(0, 2**64)


def random_survivors(seed, stage):
    generator = np.random.default_rng(seed)
    ranks = generator.permuted(np.tile(np.arange(8), (2, 14, 1)), axis=-1)
    return ranks < stage


@given(SEEDS, st.integers(1, 8), st.integers(1, 5))
def test_each_survivor_of_each_edge_is_sampled_exactly_once_a_round(seed, stage, rounds):
    survivors = random_survivors(seed, stage)
    counts = np.zeros((2, 14, 8), int)
    for t in range(1, rounds + 1):
        permutations = stage_permutations(seed, stage, t, survivors)
        assert permutations.shape == (stage, 2, 14)
        assert permutations.dtype == np.int32
        counts += np.eye(8, dtype=int)[permutations].sum(axis=0)
    np.testing.assert_array_equal(counts, np.where(survivors, rounds, 0))


@given(SEEDS, st.integers(2, 8), st.integers(1, 9))
def test_permutations_are_a_function_of_their_arguments_and_of_each_of_them(seed, stage, t):
    survivors = random_survivors(1, stage)
    drawn = stage_permutations(seed, stage, t, survivors)
    np.testing.assert_array_equal(drawn, stage_permutations(seed, stage, t, survivors))
    assert (drawn != stage_permutations(seed + 1, stage, t, survivors)).any()
    assert (drawn != stage_permutations(seed, stage, t + 1, survivors)).any()


def test_permutations_never_change_between_versions():
    drawn = stage_permutations(7, 8, 1, all_survivors())
    # A log written by an earlier version must still replay.
    assert drawn[0].tolist() == FIRST_SAMPLE_OF_SEED_7


def test_permutations_are_uniform_and_edges_independent():
    draws = np.concatenate([stage_permutations(3, 8, t, all_survivors()) for t in range(1, 501)])
    positions = np.arange(8)
    first = np.stack([stage_permutations(3, 8, t, all_survivors())[0] for t in range(1, 501)])
    # Each operation comes first in 500 / 8 = 62.5 rounds, standard deviation 7.4.
    frequencies = (first[..., None] == positions).sum(axis=0)
    assert abs(frequencies - 62.5).max() < 5 * 7.4
    flat = draws.reshape(len(draws), 28).astype(float)
    correlation = np.corrcoef(flat, rowvar=False) - np.eye(28)
    assert abs(correlation).max() < 5 / np.sqrt(len(draws))


def test_num_sampled_epochs_is_35_per_round():
    assert [num_sampled_epochs(rounds) for rounds in (1, 3)] == [35, 105]
    with pytest.raises(ValueError, match="rounds is 0"):
        num_sampled_epochs(0)


def test_stage_must_be_the_survivors_count():
    with pytest.raises(ValueError, match="stage is 7, but 8"):
        stage_permutations(0, 7, 1, all_survivors())


@pytest.mark.parametrize(("seed", "t"), [(-1, 1), (0, 0)])
def test_seed_and_round_must_be_in_range(seed, t):
    with pytest.raises(ValueError, match="seed"):
        stage_permutations(seed, 8, t, all_survivors())


def test_survivors_must_be_equal_in_number():
    survivors = all_survivors()
    survivors[1, 3, 2] = False
    with pytest.raises(ValueError, match="7 to 8"):
        num_surviving(survivors)
    with pytest.raises(ValueError, match=r"int64\[2, 14, 8\]"):
        num_surviving(survivors.astype(np.int64))


@given(st.lists(st.integers(0, 7), min_size=28, max_size=28))
def test_names_and_positions_invert_each_other(values):
    architecture = np.array(values, np.int32).reshape(2, 14)
    names = operation_names(architecture)
    assert names[1][13] == OPERATIONS[values[-1]]
    back = operation_positions(names)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, architecture)


def test_names_are_checked():
    with pytest.raises(ValueError, match="operations 0 to 8"):
        operation_names(np.full((2, 14), 8) * (np.arange(14) > 0))
    with pytest.raises(ValueError, match="shape"):
        operation_names(np.zeros((14, 2), int))
    with pytest.raises(ValueError, match="unknown operation 'conv'"):
        operation_positions([["none"] * 14, ["none"] * 13 + ["conv"]])
    with pytest.raises(ValueError, match=r"\[14, 13\]"):
        operation_positions([["none"] * 14, ["none"] * 13])
