import pytest

from megacocomix.config.rules import bubble_fraction
from megacocomix.parallel.pipeline import Pass, plan_rounds, rank_order

SHAPES = [(1, 1, 3), (2, 1, 1), (2, 1, 4), (3, 1, 2), (4, 1, 8), (4, 1, 2), (2, 2, 4), (4, 2, 8), (2, 3, 2), (4, 3, 12)]


def plan(pipeline, per_rank, num_micro):
    orders = [rank_order(rank, pipeline, per_rank, num_micro) for rank in range(pipeline)]
    return plan_rounds(orders, pipeline * per_rank)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_pass_runs_once_on_its_rank_and_after_what_it_needs(shape):
    pipeline, per_rank, num_micro = shape
    num_stages, when = pipeline * per_rank, {}
    for number, steps in enumerate(plan(*shape)):
        for rank, step in enumerate(steps):
            if step:
                assert step.stage % pipeline == rank
                assert when.setdefault(step, number) == number
    assert len(when) == 2 * num_stages * num_micro
    for step, number in when.items():
        if step.is_forward and step.stage:
            assert when[step._replace(stage=step.stage - 1)] < number
        if not step.is_forward:
            assert when[step._replace(is_forward=True)] < number
            if step.stage < num_stages - 1:
                assert when[step._replace(stage=step.stage + 1)] < number


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_has_no_more_rounds_than_its_bubble(shape):
    pipeline, per_rank, num_micro = shape
    rounds = plan(*shape)
    assert len(rounds) == 2 * (num_micro * per_rank + pipeline - 1)
    idle = sum(step is None for steps in rounds for step in steps) / (len(rounds) * pipeline)
    assert idle == pytest.approx(bubble_fraction(*shape))


@pytest.mark.parametrize("pipeline", [2, 4])
def test_a_rank_holds_no_more_micro_batches_than_there_are_stages_behind_it(pipeline):
    for rank in range(pipeline):
        held = most = 0
        for step in rank_order(rank, pipeline, 1, 16):
            held += 1 if step.is_forward else -1
            most = max(most, held)
        assert most == pipeline - rank


def test_one_forward_one_backward_on_two_ranks():
    first = [(step.is_forward, step.micro) for step in rank_order(0, 2, 1, 3)]
    assert first == [(True, 0), (True, 1), (False, 0), (True, 2), (False, 1), (False, 2)]


def test_interleaving_sends_groups_of_micro_batches_through_one_stage_after_the_other():
    forward = [step for step in rank_order(1, 2, 2, 4) if step.is_forward]
    assert forward[:4] == [Pass(True, 1, 0), Pass(True, 1, 1), Pass(True, 3, 0), Pass(True, 3, 1)]
