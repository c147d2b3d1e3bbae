from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.chat import END_OF_TURN
from millrace.training.batches import encode, schedule, split_development, split_held_out

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


@given(st.lists(st.integers(0, 99), min_size=2).filter(lambda one: len(set(one)) > 2), st.floats(0.01, 0.99))
def test_no_prompt_is_both_trained_on_and_measured_on(prompts: list[int], share: float) -> None:
    asked = [str(prompt) for prompt in prompts]
    rest, held_out = split_held_out(asked, share / 2, seed=0)
    training, development = split_development(rest, asked, share / 2, seed=0)
    assert sorted(training + development + held_out) == list(range(len(asked)))
    sides = [{asked[i] for i in side} for side in (training, development, held_out)]
    assert len(set.union(*sides)) == sum(map(len, sides)), "some prompt is on two sides"
    assert all(sides)
    assert (len(sides[1]) <= 32, len(sides[2]) <= 16) == (True, True)


@given(st.text(), st.text())
def test_only_the_end_of_an_example_ends_a_turn(prompt: str, answer: str) -> None:
    encoded = encode(prompt + END_OF_TURN, answer + END_OF_TURN + answer, lambda text: [text])
    (asked,), (answered,) = encoded.prompt, encoded.answer
    assert asked.endswith("<|im_start|>assistant\n")
    assert asked.count(END_OF_TURN) == 2  # system and user
    assert answered.count(END_OF_TURN) == 1
    assert answered.endswith(END_OF_TURN)
