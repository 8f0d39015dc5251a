"""Tenants share an engine by their weights, whatever they ask for."""

import random
from collections import Counter

import pytest

import loraplex_engine.scheduling.fairness
from tests.engine.scheduling.test_scheduler import KEY, Bench, execute, isolated

PLACES = 12


class Shop(Bench):
    """An engine that is asked for more than it can do: tenants keep a backlog, and what each one gets is counted."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(num_blocks=4096, max_num_seqs=PLACES, budget=256, prefix_caching=False)
        self.random = random.Random(seed)
        self.owner: dict[int, str] = {}
        self.served: Counter[str] = Counter()  # prompt tokens once, output tokens twice
        self.places: Counter[str] = Counter()  # of the batch, in the last step

    def ask(self, tenant: str, weight: float, prompt: int, output: int, **fields: object) -> None:
        request_id = len(self.owner)
        self.owner[request_id] = tenant
        tokens = [self.random.randrange(1000) for _ in range(prompt)]
        self.add(request_id, tokens, max_tokens=output, tenant=tenant, weight=weight, **fields)

    def serve(self, steps: int) -> None:
        for _ in range(steps):
            plan = self.scheduler.schedule()
            self.places = Counter(item.request.tenant for item in plan.scheduled)
            for item in plan.scheduled:
                prompt_left = max(0, item.request.num_prompt_tokens - item.num_computed_tokens)
                self.served[item.request.tenant] += min(item.num_new_tokens, prompt_left) + 2 * item.samples
            self.scheduler.update(plan, execute(plan))

    def waiting(self, tenant: str) -> int:
        return sum(request.tenant == tenant for request in self.scheduler.requests.values())


def test_tenants_get_tokens_by_their_weights():
    shop = Shop()
    for _ in range(3000):  # three times what 2,000 steps can serve
        shop.ask("one", 1.0, prompt=shop.random.randint(1, 40), output=shop.random.randint(5, 30))
        shop.ask("two", 2.0, prompt=shop.random.randint(1, 80), output=shop.random.randint(1, 20))
    shop.serve(2000)
    assert shop.waiting("one") > 500
    assert shop.waiting("two") > 500
    assert shop.served["two"] / shop.served["one"] == pytest.approx(2.0, rel=0.05)


def test_many_small_requests_get_no_more_than_few_large_ones():
    shop = Shop()
    for _ in range(200):
        shop.ask("large", 1.0, prompt=100, output=100)
    for _ in range(20_000):
        shop.ask("small", 1.0, prompt=1, output=2)
    shop.serve(1000)
    assert shop.served["small"] / shop.served["large"] == pytest.approx(1.0, rel=0.05)


def test_a_tenant_that_comes_gets_every_place_that_becomes_free_until_it_has_its_share():
    shop = Shop()
    for _ in range(1000):
        shop.ask("one", 1.0, prompt=8, output=20)
        shop.ask("two", 1.0, prompt=8, output=20)
    shop.serve(205)
    for _ in range(100):
        shop.ask("new", 1.0, prompt=8, output=20)
    before = Counter(shop.served)
    for _ in range(40):  # two generations: whoever was there when it came has left after one
        shop.serve(1)
        if shop.places["new"] >= PLACES // 3:
            break
        joined = {r.tenant for r in shop.scheduler.running if r.num_output_tokens <= 1 and r.request_id > 2000}
        assert joined <= {"new"}
    assert shop.places["new"] >= PLACES // 3
    shop.served -= before
    shop.served = Counter()
    shop.serve(300)
    assert shop.served["new"] / sum(shop.served.values()) == pytest.approx(1 / 3, rel=0.05)


def test_time_without_requests_is_not_saved_up():
    shop = Shop()
    for _ in range(2000):
        shop.ask("busy", 1.0, prompt=4, output=10)
    shop.serve(500)
    for _ in range(2000):
        shop.ask("idle", 1.0, prompt=4, output=10)
    shop.serve(20)  # until both have places
    shop.served = Counter()
    shop.serve(500)
    assert shop.served["busy"] / shop.served["idle"] == pytest.approx(1.0, rel=0.05)


def test_a_share_that_nobody_asks_for_goes_to_the_others():
    shop = Shop()
    for _ in range(100):
        shop.ask("only", 0.01, prompt=4, output=10)
    shop.serve(5)
    assert shop.places == {"only": PLACES}


def test_priority_comes_before_shares():
    shop = Shop()
    for _ in range(100):
        shop.ask("low", 100.0, prompt=4, output=10)
        shop.ask("high", 1.0, prompt=4, output=10, priority=-1)
    shop.serve(1)
    assert shop.places == {"high": PLACES}


def test_when_blocks_are_short_whoever_had_most_gives_way():
    bench = Bench(num_blocks=7, max_num_seqs=3, budget=64, prefix_caching=False)
    bench.add(1, [1] * 7, max_tokens=12, tenant="much")
    bench.step()
    bench.step()
    bench.add(2, [2] * 7, max_tokens=12, tenant="much")
    bench.add(3, [3] * 7, max_tokens=12, tenant="little")
    while not bench.scheduler.num_preemptions:
        bench.step()
    assert [request.request_id for request in bench.scheduler.running] == [1, 3]
    bench.finish()
    assert bench.tokens(2) == isolated([2] * 7, 12)


def test_a_tenant_whose_adapter_is_missing_holds_up_no_other():
    bench = Bench(max_num_seqs=1)
    bench.add(1, [5], tenant="a", adapter=KEY)
    bench.add(2, [6], tenant="b")
    assert [item.request.tenant for item in bench.step().scheduled] == ["b"]


def test_what_was_aborted_is_never_chosen():
    bench = Bench(max_num_seqs=1)
    for request_id in range(4):
        bench.add(request_id, [5], tenant="ab"[request_id % 2])
    for request_id in (0, 1, 2):
        bench.scheduler.abort(request_id)
    assert [item.request.request_id for item in bench.step().scheduled] == [3]
    bench.finish()
    assert len(bench.scheduler.waiting) == 0


def test_tenants_of_old_are_forgotten(monkeypatch):
    monkeypatch.setattr(loraplex_engine.scheduling.fairness, "REMEMBERED_TENANTS", 3)
    bench = Bench()
    for number in range(20):
        bench.add(number, [5], tenant=f"t{number}")
        bench.finish()
    assert len(bench.scheduler.waiting._counters) == 3
