"""The arithmetic of the predictions for TPUs, and the counting that it rests on."""

import chips
import jax
import jax.numpy as jnp
import pytest
import scaling
from jax import lax
from tpu_cycles import Case, count_cycles, operation_cost
from workloads import Work, full_config, search_work, training_work

from cpnas_jax import config as configs
from cpnas_jax.runtime import costs
from cpnas_jax.runtime.costs import Cost

AXIS = ("devices", 8)
IMAGES = jax.ShapeDtypeStruct((4, 8, 8, 16), jnp.float32)
MATRIX = jax.ShapeDtypeStruct((32, 32), jnp.float32)
NUMBER = jax.ShapeDtypeStruct((), jnp.int32)
PRODUCT = 2 * 32**3


def product(x):
    return jnp.dot(x, x)


@pytest.mark.parametrize("operation", ["dil_conv_3x3", "max_pool_3x3"])
def test_without_loops_all_operations_are_those_of_xla(operation):
    case = Case(operation, "native", 4, 8, 16)
    arguments = case.params(), case.image(), case.image()
    found = operation_cost(case)
    reference = jax.jit(case.both).lower(*arguments).cost_analysis()
    assert found.flops == pytest.approx(reference["flops"], rel=1e-3)
    assert found.most_bytes == pytest.approx(reference["bytes accessed"], rel=0.1)
    assert 0 < found.least_bytes < found.most_bytes


def test_depthwise_and_mixing_convolutions_are_told_apart():
    found = operation_cost(Case("dil_conv_3x3", "native", 4, 8, 16))
    pixels = 4 * 8 * 8
    # One product of matrices forward and two backward.
    assert found.matrix == 3 * 2 * pixels * 16 * 16
    # Three depthwise convolutions of nine taps; the border is padded before.
    assert found.depthwise == 3 * 2 * pixels * 9 * 16


def test_a_scan_counts_as_often_as_it_runs():
    def function(x):
        return lax.scan(lambda x, _: (product(x), None), x, None, length=10)[0]

    assert costs.program_cost(function, MATRIX).matrix == 10 * PRODUCT


def test_a_loop_of_unknown_length_counts_once():
    def function(x, n):
        return lax.fori_loop(0, n, lambda _, x: product(x), x)

    assert costs.program_cost(function, MATRIX, NUMBER).matrix == PRODUCT


def test_a_switch_counts_as_the_mean_of_its_branches():
    def function(i, x):
        branches = [lambda x: x, product, lambda x: product(product(product(x)))]
        return lax.switch(i, branches, x)

    found = costs.program_cost(function, NUMBER, MATRIX).matrix
    assert found == pytest.approx(PRODUCT * 4 / 3)


def test_collectives_are_counted_for_devices_that_are_not_there():
    def function(x):
        return lax.scan(lambda x, _: (lax.pmean(x, AXIS[0]), None), x, None, length=3)[0]

    found = costs.program_cost(function, MATRIX, axis=AXIS)
    assert found.collectives == {("psum", 4 * 32 * 32): 3}
    assert (found.num_collectives(), found.collective_bytes()) == (3, 3 * 4096)


def test_a_rings_all_reduce_sends_nearly_twice_its_bytes():
    seconds = chips.collective_seconds(100e9, 7, 4, 1e-3)
    assert seconds == pytest.approx(1.5 + 7e-3)
    assert chips.collective_seconds(100e9, 7, 1, 1e-3) == 0


def test_shares_between_numbers_of_images_are_interpolated_and_not_beyond():
    shares = {64: 0.3, 4: 0.1}
    assert [scaling.share_at(n, shares) for n in (1, 4, 16, 64, 256)] == pytest.approx(
        [0.1, 0.1, 0.2, 0.3, 0.3]
    )


def test_a_prediction_is_the_largest_limit_and_the_collectives():
    chip = chips.Chip(matrix=100, vector=10, bandwidth=1, host_chips=4, host_cores=8)
    many = Cost(matrix=4000, depthwise=10, other=30, least_bytes=8, most_bytes=80)
    few = many * 0.5
    line = scaling.Line(Work(few, state_bytes=3), 2, Work(many, state_bytes=3), 4, rounds=0)
    found = scaling.predict(line, batch=8, devices=1, chip=chip, shares={1: 0.25})
    assert found.roofline == pytest.approx({"matrix": 80, "vector": 8, "memory": 22})
    assert found.bound == "matrix"
    assert found.seconds() == pytest.approx((200, 800, 320))


def test_shares_come_from_the_cycles_of_equally_sampled_cases():
    name = "max_pool_3x3:native:4x8x16"
    least = max(
        chips.roofline_seconds(operation_cost(Case.parse(name)), 0, chips.CHIPS["v5e"]).values()
    )
    cycles = {
        name: round(least * 5 * chips.V5E_CLOCK),
        # Of another form and another size.
        "max_pool_3x3:shifted:4x8x16": 1,
        "max_pool_3x3:native:4x4x16": 1,
    }
    assert scaling.cycle_shares(cycles, ((8, 16),)) == pytest.approx({4: 0.2}, rel=0.05)


def test_a_search_samples_each_operation_once_a_round():
    # 8 + 7 + ... + 2, in each of three rounds.
    assert scaling.sampled_epochs(3) == 105


def test_cycles_of_depthwise_fusions_are_told_apart():
    text = """HloModule one

%grouped (p: f32[2]) -> f32[2] {
  %c = f32[2] convolution(%p, %p), feature_group_count=2
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %a = f32[2] fusion(%p), calls=%grouped, backend_config={"estimated_cycles":"30"}
  %b = f32[2] fusion(%a), calls=%plain, backend_config={"estimated_cycles":"12"}
}
"""
    assert count_cycles(text) == (42, 30)


def small(name, mode):
    config = full_config(name, mode)
    configs.shrink(config)
    config.network.cells, config.train.batch_size = 2, 16
    return config


@pytest.mark.slow
def test_a_search_and_a_training_are_counted_whole():
    search = search_work(small("cifar10", "search"), 8)
    training = training_work(small("imagenet", "train"), "DDPNAS_XNOR_1", 8)
    for work in (search, training):
        assert work.step.matrix > work.step.depthwise > 0
        # Every parameter's gradient is summed over the devices.
        assert work.state_bytes > work.step.collective_bytes() > 0
    # Of all the images that score, and forward alone.
    assert search.score.flops > search.step.flops


@pytest.mark.slow
def test_twice_the_devices_have_half_the_images_each():
    several, twice = (search_work(small("cifar10", "search"), count) for count in (4, 8))
    assert twice.step.depthwise == pytest.approx(several.step.depthwise / 2, rel=0.1)
    assert twice.step.collectives == several.step.collectives
