"""A study on an engine that is exact: what is tried, when a trial ends, what it may cost, what counts as better."""

from dataclasses import replace
from functools import cache

import pytest

from millrace.applications import Gate, Optimize
from millrace.errors import EngineError, PromptError
from millrace.prompts.study import AT_ONCE, Outcome, Trial, best_of, compare, search
from tests.prompts.engine import (
    BROKEN,
    COPY,
    HELD_OUT,
    LOST,
    PLAIN,
    SEARCH,
    Kept,
    Reader,
    a_champion,
    a_space,
    answering,
)

pytestmark = pytest.mark.slow

OPTIMIZE = Optimize(trials=12, token_budget=100_000, chunks=(1, 2), few_shot=(0, 1))
GATE = Gate(resamples=1000)


def untimed(trials: list[Trial]) -> list[Trial]:
    return [replace(trial, seconds=0) for trial in trials]


@cache
def held(optimize: Optimize = OPTIMIZE, **variants: str) -> tuple[list[Trial], Outcome]:
    """A whole study; without a token or a second between two with the same arguments."""
    space = a_space(optimize, **variants)
    prepare = answering(space, Reader())
    trials = search(space, SEARCH, optimize, prepare, [], lambda _: None)
    return trials, compare(trials, HELD_OUT, prepare, GATE, {}, lambda _: None, seed=1)


def test_the_best_prompt_is_found_and_is_better_on_questions_that_did_not_choose_it() -> None:
    trials, outcome = held(copy=COPY)
    assert trials[0].point == a_space(OPTIMIZE).start
    assert trials[0].mean == 0.25
    assert (outcome.best.point.template, outcome.best.point.chunks, outcome.best.mean) == ("copy", 2, 1.0)
    assert outcome.better
    assert outcome.difference.estimate == 0.75
    assert outcome.difference.low > 0
    assert f"trial {outcome.best.number} (copy, 2 chunks" in outcome.why
    assert "scored 1.000 on 24 held-out questions, the champion's own prompt 0.250: +0.750, 95% interval" in outcome.why


def test_no_point_is_tried_twice() -> None:
    trials, _ = held(copy=COPY)
    assert len({trial.point for trial in trials}) == len(trials)


def test_a_study_that_has_tried_everything_ends() -> None:
    optimize = OPTIMIZE.model_copy(update={"chunks": (1,), "few_shot": (0,)})
    trials, _ = held(optimize)
    assert len(trials) == 5 < OPTIMIZE.trials  # the champion's template and four built-in ones


def test_a_trial_that_is_losing_is_ended_between_waves() -> None:
    trials, _ = held(copy=COPY, lost=LOST)
    pruned = [trial for trial in trials if trial.state == "pruned"]
    assert pruned
    for trial in pruned:
        assert len(trial.scores) % AT_ONCE == 0
        assert len(trial.scores) < len(SEARCH)
        assert trial.why == f"losing to the best trial after {len(trial.scores)} of 16 questions"
    assert best_of(trials).state == "complete"


def test_tokens_are_counted_as_the_engine_counts_them_and_the_budget_holds() -> None:
    reader = Reader()
    optimize = OPTIMIZE.model_copy(update={"token_budget": 2000, "held_out": len(HELD_OUT)})
    space = a_space(optimize, copy=COPY)
    spent = 0

    def counting(point):
        ask = answering(space, reader)(point)

        def count(question: str):
            nonlocal spent
            answer = ask(question)
            spent += answer.usage.prompt_tokens + answer.usage.completion_tokens
            return answer

        return count

    kept, sheets = Kept(), Kept()
    trials = search(space, SEARCH, optimize, counting, [], kept)
    assert 1 < len(trials) < OPTIMIZE.trials
    assert sum(trial.tokens for trial in trials) == spent
    compare(trials, HELD_OUT, counting, GATE, {}, sheets, seed=1)
    total = sum(trial.tokens for trial in (*kept.trials, *sheets.trials))
    assert total == spent
    # One wave may be under way when it runs out.
    dearest = max(trial.tokens / len(trial.scores) for trial in trials if trial.scores)
    assert total <= 2000 + AT_ONCE * dearest


def test_a_budget_that_does_not_cover_the_start_is_refused() -> None:
    optimize = OPTIMIZE.model_copy(update={"token_budget": 300, "held_out": 24})
    with pytest.raises(PromptError, match=r"a budget of 300 tokens is too small: the champion's own prompt took \d+"):
        held(optimize)


@pytest.mark.parametrize("after", ["nothing", "some trials", "half of the held-out answers"])
def test_a_study_that_was_killed_goes_on_as_if_it_had_not_been(after: str) -> None:
    whole, outcome = held(copy=COPY, lost=LOST)
    searched = sum(len(trial.scores) for trial in whole)
    answers = {"nothing": 0, "some trials": searched // 2}.get(after, searched + len(HELD_OUT) + 3)
    space = a_space(OPTIMIZE, copy=COPY, lost=LOST)
    kept, sheets = Kept(), Kept()
    killed = answering(space, Reader(breaks_after=answers))

    def until_killed() -> None:
        trials = search(space, SEARCH, OPTIMIZE, killed, [], kept)
        compare(trials, HELD_OUT, killed, GATE, {}, sheets, seed=1)

    with pytest.raises(EngineError, match="the reader is gone"):
        until_killed()
    again = answering(space, Reader())
    trials = search(space, SEARCH, OPTIMIZE, again, list(kept.trials), kept)
    assert untimed(trials) == untimed(whole)
    assert untimed(kept.trials) == untimed(whole)
    known = {sheet.number: sheet for sheet in sheets.trials}
    repeated = compare(trials, HELD_OUT, again, GATE, known, sheets, seed=1)
    assert (repeated.difference, repeated.why) == (outcome.difference, outcome.why)


def test_a_finished_study_asks_nothing_again() -> None:
    trials, outcome = held(copy=COPY)
    assert outcome.start_held_out is not None
    assert outcome.best_held_out is not None
    sheets = {sheet.number: sheet for sheet in (outcome.start_held_out, outcome.best_held_out)}

    def refuse(_):
        raise AssertionError("asked again")

    space = a_space(OPTIMIZE, copy=COPY)
    assert search(space, SEARCH, OPTIMIZE, refuse, trials, refuse) == trials
    assert compare(trials, HELD_OUT, refuse, GATE, sheets, refuse, seed=1) == outcome


def test_each_template_is_tried_once_before_the_seed_decides() -> None:
    first, second = ([t.point for t in held(OPTIMIZE.model_copy(update={"seed": seed}))[0]] for seed in (1, 2))
    start = a_space(OPTIMIZE).start
    assert first[:5] == second[:5] == [replace(start, template=name) for name in a_space(OPTIMIZE).templates]
    assert first[5:] != second[5:]


def test_a_prompt_that_fails_costs_only_its_own_trial() -> None:
    trials, outcome = held(copy=COPY, broken=BROKEN)
    failed = [trial for trial in trials if trial.state == "failed"]
    assert {trial.point.template for trial in failed} == {"broken"}
    assert all("can't be rendered" in trial.why for trial in failed)
    assert outcome.better


def test_a_study_whose_every_trial_fails_says_the_first_reason() -> None:
    space = a_space(OPTIMIZE, champion=a_champion("{{ chunks[9].text }}{{ question }}"))
    templates = {name: f"{{{{ chunks[9].{name[-1]} }}}}{{{{ question }}}}" for name in space.templates}
    broken = replace(space, templates=templates)
    with pytest.raises(PromptError, match=r"all 12 trials failed, so no prompt is registered; the first: 'What is num"):
        search(broken, SEARCH, OPTIMIZE, answering(broken, Reader()), [], lambda _: None)


def test_a_champion_whose_own_prompt_fails_ends_the_study_early() -> None:
    space = a_space(OPTIMIZE, champion=a_champion(BROKEN))
    kept = Kept()
    with pytest.raises(PromptError, match="the champion's own prompt fails, so nothing can be compared with it"):
        search(space, SEARCH, OPTIMIZE, answering(space, Reader()), [], kept)
    assert [trial.state for trial in kept.trials].count("complete") + [t.state for t in kept.trials].count(
        "pruned"
    ) <= 1


def test_without_a_trial_that_scores_more_nothing_is_compared() -> None:
    space = a_space(OPTIMIZE, champion=a_champion(COPY, chunks=2))
    prepare = answering(space, Reader())
    trials = search(space, SEARCH, OPTIMIZE, prepare, [], lambda _: None)
    outcome = compare(trials, HELD_OUT, prepare, GATE, {}, lambda _: None, seed=1)
    assert not outcome.better
    assert outcome.best_held_out is None
    assert "scored more than the champion's own prompt (1.000 on 16 questions)" in outcome.why


def test_a_prompt_that_was_lucky_is_not_better() -> None:
    lucky = [question for question in SEARCH if int(question.answer) % 2]  # only odd ones: two chunks look better
    space = a_space(OPTIMIZE.model_copy(update={"few_shot": (0,)}), copy=COPY)
    prepare = answering(space, Reader())
    trials = search(space, lucky, OPTIMIZE, prepare, [], lambda _: None)
    easy = [question for question in HELD_OUT if int(question.answer) % 16 == 0]  # multiples of 4: the start knows them
    outcome = compare(trials, easy, prepare, GATE, {}, lambda _: None, seed=1)
    assert outcome.best.mean > trials[0].mean
    assert not outcome.better
    assert outcome.difference.estimate == 0
    assert "does not exclude that it is no better; the champion's prompt stays" in outcome.why


def test_questions_on_one_document_are_drawn_together() -> None:
    """Three to a document, answered alike: the interval is that of a third as many questions."""
    trials, _ = held(copy=COPY)
    start, best = trials[0], best_of(trials)
    asked = [replace(question, document_id=f"d{n // 3}") for n, question in enumerate(HELD_OUT)]
    gained = {question.question_id: float(n // 3 % 4 == 0) for n, question in enumerate(asked)}
    sheets = {
        start.number: replace(start, scores=dict.fromkeys(gained, 0.0)),
        best.number: replace(best, scores=gained),
    }
    spread = {}
    for name, questions in (("apart", HELD_OUT), ("together", asked)):
        prepare = answering(a_space(OPTIMIZE, copy=COPY), Reader())
        found = compare(trials, questions, prepare, GATE, sheets, lambda _: None, seed=1).difference
        assert found is not None
        spread[name] = found.high - found.low
    assert spread["together"] > 1.4 * spread["apart"]


def test_the_plain_reader_is_what_the_tests_above_say() -> None:
    space = a_space(OPTIMIZE)
    ask = answering(space, Reader())(space.start)
    assert [ask(question.question).text == question.answer for question in SEARCH[:2]] == [True, False]
    assert PLAIN in space.templates.values()
