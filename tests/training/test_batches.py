from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.chat import END_OF_TURN
from millrace.training.batches import encode, schedule, split_held_out

plans = st.fixed_dictionaries(
    {
        "epochs": st.integers(1, 3),
        "processes": st.integers(1, 3),
        "micro_batch": st.integers(1, 3),
        "accumulation": st.integers(1, 3),
        "seed": st.integers(0, 5),
    }
)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=80), plans)
def test_every_epoch_sees_every_example_and_no_process_sits_idle(lengths: list[int], plan: dict) -> None:
    steps = schedule(lengths, **plan)
    assert all(len(step) == plan["accumulation"] for step in steps)
    assert all(len(micro) == plan["processes"] for step in steps for micro in step)
    assert all(len(batch) == plan["micro_batch"] for step in steps for micro in step for batch in micro)
    per_epoch = len(steps) // plan["epochs"]
    for epoch in range(plan["epochs"]):
        seen = Counter(
            i for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for micro in step for b in micro for i in b
        )
        assert set(seen) == set(range(len(lengths)))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=80), plans)
def test_a_plan_is_the_same_in_every_process_and_after_every_restart(lengths: list[int], plan: dict) -> None:
    assert schedule(lengths, **plan) == schedule(lengths, **plan)


@given(st.integers(2, 300), st.floats(0.01, 0.5), st.integers(0, 9))
def test_held_out_examples_are_not_trained_on(count: int, share: float, seed: int) -> None:
    training, held_out = split_held_out(count, share, seed)
    assert sorted(training + held_out) == list(range(count))
    assert 1 <= len(held_out) <= 16


@given(st.text(), st.text())
def test_only_the_end_of_an_example_ends_a_turn(prompt: str, answer: str) -> None:
    encoded = encode(prompt + END_OF_TURN, answer + END_OF_TURN + answer, lambda text: [text])
    (asked,), (answered,) = encoded.prompt, encoded.answer
    assert asked.endswith("<|im_start|>assistant\n")
    assert asked.count(END_OF_TURN) == 2  # system and user
    assert answered.count(END_OF_TURN) == 1
    assert answered.endswith(END_OF_TURN)
