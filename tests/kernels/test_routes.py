"""The choice of experts, and the rows that follow from it, by each backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loraplex_kernels.cpu import library
from loraplex_kernels.ops import LoraSegments, Ops, Routing
from loraplex_kernels.reference import ReferenceOps
from loraplex_kernels.selection import select_ops

CPU = torch.device("cpu")
REFERENCE = ReferenceOps(CPU)
ROUTINGS = {
    "one": Routing(1),
    "usual": Routing(3),
    "all": Routing(12, normalised=False),
    "sigmoid": Routing(4, "sigmoid", scale=2.5),
    "groups": Routing(4, "sigmoid", groups=4, groups_kept=2, least_sum=1e-20),
    "least sum": Routing(2, least_sum=0.9),
    "groups by their best": Routing(4, groups=4, groups_kept=2, group_best=1),
    "late sigmoid": Routing(3, "late_sigmoid", normalised=False),
    "near": Routing(2, "softmax_of_near", near=0.5),
}


@pytest.fixture(params=["reference", *library.usable_instruction_sets()])
def ops(request: pytest.FixtureRequest) -> Ops:
    return REFERENCE if request.param == "reference" else select_ops(CPU, "cpu", threads=2, isa=request.param)


def router_logits(num_tokens: int = 70, num_experts: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))


def segments(*ranges: tuple[int, int, int]) -> LoraSegments:
    columns = torch.tensor(ranges, dtype=torch.int32).T.contiguous()
    return LoraSegments(ranges, columns[0], columns[1], columns[2])


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("corrected", [False, True])
def test_each_backend_routes_as_the_reference(ops: Ops, name: str, corrected: bool) -> None:
    correction = router_logits(1, seed=1)[0] if corrected else None
    lora = segments((2, 5, 20), (0, 20, 21), (2, 30, 70))
    found = ops.route(router_logits(), ROUTINGS[name], correction, lora)
    wanted = REFERENCE.route(router_logits(), ROUTINGS[name], correction, lora)
    torch.testing.assert_close(found.weights.sort(dim=1).values, wanted.weights.sort(dim=1).values)
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.starts, wanted.starts)
    assert torch.equal(found.rows.sort(dim=1).values, wanted.rows.sort(dim=1).values)
    assert found.lora is not None
    assert wanted.lora is not None
    assert found.lora.ranges == wanted.lora.ranges


def test_rows_of_an_expert_lie_together_and_lead_back_to_their_tokens(ops: Ops) -> None:
    routes = ops.route(router_logits(), Routing(3), None, None)
    chosen = router_logits().topk(3).indices
    for token, rows in enumerate(routes.rows.tolist()):
        experts = [int((routes.starts <= row).sum()) - 1 for row in rows]
        assert sorted(experts) == sorted(chosen[token].tolist())
        assert routes.tokens[rows].tolist() == [token] * 3
    assert routes.lora is None


def test_segments_name_the_adapter_and_the_expert_of_each_row(ops: Ops) -> None:
    lora = segments((3, 1, 4), (1, 4, 9))
    routes = ops.route(router_logits(10), Routing(2), None, lora)
    assert routes.lora is not None
    adapters = {row: slot for slot, first, end in routes.lora.ranges for row in range(first, end)}
    for expert in range(12):
        for row in range(int(routes.starts[expert]), int(routes.starts[expert + 1])):
            token = int(routes.tokens[row])
            slot = 3 if 1 <= token < 4 else 1 if 4 <= token < 9 else None
            assert adapters.get(row) == (None if slot is None else slot * 12 + expert)
    assert routes.lora.slots.tolist() == [slot for slot, _, _ in routes.lora.ranges]


def test_a_correction_changes_who_is_chosen_and_no_weight(ops: Ops) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    routing = Routing(1, "sigmoid", normalised=False)
    routes = ops.route(logits, routing, torch.tensor([0.0, 0.0, 0.0, 5.0]), None)
    assert routes.starts.tolist() == [0, 0, 0, 0, 1]
    torch.testing.assert_close(routes.weights, torch.tensor([[-1.0]]).sigmoid())


def test_experts_of_groups_that_are_not_kept_are_not_chosen(ops: Ops) -> None:
    logits = torch.tensor([[9.0, -9.0, 2.0, 3.0, 1.0, 1.0]])
    routing = Routing(2, "sigmoid", groups=3, groups_kept=1)
    assert ops.route(logits, routing, None, None).starts.tolist() == [0, 0, 0, 1, 2, 2, 2]
    both = replace(routing, groups_kept=3)
    assert ops.route(logits, both, None, None).starts.tolist() == [0, 1, 1, 1, 2, 2, 2]


def test_logits_that_are_not_numbers_choose_some_experts(ops: Ops) -> None:
    logits = router_logits(3)
    logits[1] = torch.nan
    logits[2, 4] = torch.inf
    routes = ops.route(logits, Routing(2), None, None)
    assert routes.starts[-1] == 6
    assert torch.isfinite(routes.weights[0]).all()


def test_no_tokens_have_no_rows(ops: Ops) -> None:
    routes = ops.route(router_logits(0), Routing(2), None, None)
    assert routes.starts.tolist() == [0] * 13
    assert routes.rows.shape == (0, 2)


def test_sigmoids_that_are_all_one_are_told_apart_by_their_logits(ops: Ops) -> None:
    logits = torch.tensor([[40.0, 50.0, 30.0]])
    routes = ops.route(logits, Routing(1, "late_sigmoid", normalised=False), None, None)
    assert routes.starts.tolist() == [0, 0, 1, 1]
    assert routes.weights.tolist() == [[1.0]]


def test_each_expert_is_weighed_against_those_near_it_that_are_left(ops: Ops) -> None:
    logits = torch.tensor([[4.0, 3.8, 1.0]])
    routes = ops.route(logits, Routing(2, "softmax_of_near", near=0.1), None, None)
    first = torch.tensor([4.0, 3.8]).softmax(dim=0)[0]
    torch.testing.assert_close(routes.weights, torch.stack((first, torch.tensor(1.0)))[None])


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_tokens_experts_do_not_depend_on_the_other_tokens(ops: Ops, name: str) -> None:
    routing = ROUTINGS[name]
    together = ops.route(router_logits(), routing, None, None)
    alone = [ops.route(row, routing, None, None).weights for row in router_logits().split(1)]
    torch.testing.assert_close(together.weights, torch.cat(alone), rtol=0, atol=0 if ops.batch_invariant else 1e-6)
