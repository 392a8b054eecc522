"""What does not fit on a device is refused with sizes and keys."""

import jax
import pytest

from cpnas_jax.runtime import environment
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.memory import check_memory, describe, exhaustion_explained

MIB = 2**20
KNOBS = "config.train.batch_size"


@pytest.fixture
def device(monkeypatch):
    def of(size):
        monkeypatch.setattr(environment, "device_memory", lambda: size)

    return of


def test_the_parts_together_decide(device):
    device(10 * MIB)
    check_memory({"weights": 6 * MIB, "data": 4 * MIB}, KNOBS)
    with pytest.raises(UserError) as caught:
        check_memory({"weights": 6 * MIB, "data": 4 * MIB + 1}, KNOBS)
    assert str(caught.value) == (
        "this run does not fit on a device: it needs about 10 MiB (weights 6, data 4), a device "
        "has 10 MiB; lower config.train.batch_size"
    )


def test_where_the_platform_does_not_tell_nothing_is_refused(device):
    device(None)
    check_memory({"weights": 10**18}, KNOBS)


def test_a_description_adds_up():
    assert describe({"a": 3 * MIB, "b": 5 * MIB}) == "8 MiB (a 3, b 5)"


def test_what_the_compiler_reports_is_one_line():
    report = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nLargest: 3 G"
    words = r"memory space hbm\.; lower config\.train\.batch_size"
    with pytest.raises(UserError, match=words), exhaustion_explained(KNOBS):
        raise jax.errors.JaxRuntimeError(report)
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), exhaustion_explained(KNOBS):
        raise other
