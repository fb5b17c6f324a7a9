"""SlotRows: what is known of each running request besides its cache, as plain arrays with one row per slot.

A decode step therefore costs the same few array operations for one request and for a hundred.
"""

from __future__ import annotations

import numpy as np

from rl_lightning.engines.sampling import SamplingRows, uniforms
from rl_lightning.types import GenerationRequest

FIRST_WIDTH = 64
"""Answer tokens that there is room for at first; grows by doubling."""


class SlotRows:
    """Sampling parameters and answers of up to `n` running requests.

    Attributes:
        length: (n,) int64, tokens in the cache.
        count: (n,) int64, answer tokens so far.
        limit: (n,) int64, most answer tokens.
        minimum: (n,) int64, fewest answer tokens.
        has_text: (n,) bool, the request has `stop` texts.
        tokens: (n, w) int32, the answers.
    """

    def __init__(self, n: int) -> None:
        self.length, self.count, self.limit, self.minimum = (np.zeros(n, np.int64) for _ in range(4))
        self.has_text = np.zeros(n, bool)
        self._seed = np.zeros(n, np.uint64)
        self._temperature, self._top_p = np.ones(n, np.float32), np.ones(n, np.float32)
        self._top_k, self._greedy = np.full(n, -1, np.int64), np.zeros(n, bool)
        self._stops = np.full((n, 1), -1, np.int64)
        self.tokens = np.zeros((n, FIRST_WIDTH), np.int32)
        self._logprobs = np.zeros((n, FIRST_WIDTH), np.float32)
        self._versions = np.zeros((n, FIRST_WIDTH), np.int32)

    def seat(self, row: int, request: GenerationRequest, limit: int, stops: tuple[int, ...]) -> None:
        """Puts a request with an empty answer into `row`; `stops` are the tokens that end it."""
        params = request.params
        self.length[row], self.count[row] = len(request.prompt_ids), 0
        self.limit[row], self.minimum[row], self.has_text[row] = limit, params.min_new_tokens, bool(params.stop)
        self._seed[row] = request.seed & (2**64 - 1)
        self._temperature[row] = 1.0 if params.greedy else params.temperature
        self._top_p[row], self._top_k[row], self._greedy[row] = params.top_p, params.top_k, params.greedy
        self._stops = _wide(self._stops, len(stops))
        self._stops[row] = -1
        self._stops[row, : len(stops)] = stops

    def resume(self, row: int, tokens: np.ndarray, logprobs: np.ndarray, versions: np.ndarray) -> None:
        """Gives the request in `row` the answer that it had before."""
        n = len(tokens)
        self._widen(n)
        self.tokens[row, :n], self._logprobs[row, :n], self._versions[row, :n] = tokens, logprobs, versions
        self.count[row] = n
        self.length[row] += n

    def answer(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies of tokens, log-probabilities and versions of the answer in `row`, each (count,)."""
        n = self.count[row]
        return self.tokens[row, :n].copy(), self._logprobs[row, :n].copy(), self._versions[row, :n].copy()

    def last_tokens(self, n: int) -> np.ndarray:
        """(n,) int64 newest token of each of the first n rows."""
        return self.tokens[np.arange(n), self.count[:n] - 1].astype(np.int64)

    def sampling(self, span: slice) -> SamplingRows:
        """How the next token of the rows in `span` is drawn."""
        short = self.count[span] < self.minimum[span]
        banned = np.where(short[:, None], self._stops[span], -1) if short.any() else None
        uniform = uniforms(self._seed[span], self.count[span])
        return SamplingRows(self._temperature[span], self._top_p[span], self._top_k[span], self._greedy[span], uniform, banned)

    def append(self, span: slice, tokens: np.ndarray, logprobs: np.ndarray, version: int) -> np.ndarray:
        """Records one token for each row in `span`; returns (m,) bool, true where it is a stop token."""
        self._widen(int(self.count[span].max()) + 1)
        at = np.arange(span.start, span.stop), self.count[span]
        self.tokens[at], self._logprobs[at], self._versions[at] = tokens, logprobs, version
        self.count[span] += 1
        return (self._stops[span] == tokens[:, None]).any(1)

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copies rows `sources` to rows `targets`."""
        for values in vars(self).values():
            values[targets] = values[sources]

    def _widen(self, width: int) -> None:
        if width > self.tokens.shape[1]:
            self.tokens, self._logprobs, self._versions = (
                _wide(values, max(width, 2 * values.shape[1])) for values in (self.tokens, self._logprobs, self._versions)
            )


def _wide(values: np.ndarray, width: int) -> np.ndarray:
    """(n, max(w, width)): `values` with further columns of -1."""
    missing = max(0, width - values.shape[1])
    return np.pad(values, ((0, 0), (0, missing)), constant_values=-1) if missing else values
