"""What one request won and spent by drafts, in tokens of plain decoding: how many it may have next follows from it."""

from __future__ import annotations

from collections.abc import Sequence

GRANT = 0.5  # tokens that a request may lose before any draft was right,
SHARE = 0.005  # and for each token that it draws: so that drafts that stopped paying are tried again, rarely
MOST = 4.0  # tokens that are kept of what was won
MEMORY = 6.0  # drafts that count in the estimate of how many are right
LEAST_GAIN = 1.02
TRUST = 0.25  # tokens that may be lost beyond the balance, for each of the latest guesses that was right,
MOST_TRUST = 1.0  # and in all
MOST_STEPS_BETWEEN = 8  # that are watched, while guesses are wrong


class Account:
    """A request's drafts so far."""

    def __init__(self) -> None:
        self.balance = GRANT
        self._trust = 0.0
        self._between = 1  # steps from one that is watched to the next
        self._until = 1  # the next one
        self._right, self._tried = 1.0, 2.0  # of the latest drafts; as if one of two had been right

    def affordable(self, prices: Sequence[float]) -> int:
        """How many drafts give the most tokens for their price, among those that cannot lose too much.

        prices: of 1, 2, … drafts. Where none pays, one is tried as soon as it can be afforded.
        """
        chance = self._right / self._tried
        best, best_gain, expected, reached = 0, LEAST_GAIN, 1.0, 1.0
        for count, price in enumerate(prices, 1):
            if price > self.balance + self._trust:
                break
            reached *= chance
            expected += reached
            gain = expected / (1.0 + price)
            if gain > best_gain:
                best, best_gain = count, gain
        if not best and prices and prices[0] < min(self.balance, 1.0):
            return 1
        return best

    def draw(self) -> None:
        """Note a step that draws from the request."""
        self.balance = min(self.balance + SHARE, MOST)

    def settle(self, price: float, tried: int, right: int) -> None:
        """Note what drafts came to: the first that was wrong, if any, is the last that was tried."""
        self.balance = min(self.balance + right - price, MOST)
        self._note(right, min(right + 1, tried))

    def may_watch(self) -> bool:
        """Whether to look, in a step without drafts, if a guess would have been right: more rarely while it is not."""
        self._until -= 1
        return self._until <= 0

    def watch(self, right: bool | None) -> None:
        """Note whether a guess that was not computed would have been right. None: there was none."""
        self._between = 1 if right else min(2 * self._between, MOST_STEPS_BETWEEN)
        self._until = self._between
        if right is not None:
            self._note(int(right), 1)

    def _note(self, right: int, tested: int) -> None:
        self._trust = min(max(self._trust + TRUST * (2 * right - tested), 0.0), MOST_TRUST)
        fade = (1.0 - 1.0 / MEMORY) ** tested
        self._right = self._right * fade + right
        self._tried = self._tried * fade + tested
