import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.training.stopping import Measured, best_of, exhausted

losses = st.lists(st.floats(0, 10), min_size=1, max_size=20)


def measured(values: list[float]) -> list[Measured]:
    return [Measured(step, loss) for step, loss in enumerate(values, 1)]


def test_patience_counts_measurements_since_the_best_one() -> None:
    assert not exhausted(measured([]), 1)
    assert not exhausted(measured([3, 2, 2.5]), 2)
    assert exhausted(measured([3, 2, 2.5, 2.1]), 2)
    assert not exhausted(measured([3, 2, 2.5, 1.9]), 2)
    assert exhausted(measured([3, 3, 3]), 2)  # as good is not better


@pytest.mark.slow
@given(losses, st.integers(1, 5))
def test_a_run_stops_at_the_first_measurement_that_exhausts_it_and_not_before(
    values: list[float], patience: int
) -> None:
    history = measured(values)
    best = best_of(history)
    assert best.loss == min(values)
    assert exhausted(history, patience) == (len(history) - best.step >= patience)
