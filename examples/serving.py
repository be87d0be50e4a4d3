"""Decode with continuous batching: requests come and go as rows of a batch, each with its adapter.

This module handles tokens only; ``serve_many.py`` handles text and files.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from serve_programs import next_tokens, read_prompt

import lora_jax
from lora_jax.recipes.models import llama


class Request(NamedTuple):
    """A prompt to continue.

    Attributes:
        prompt: the tokens of the prompt.
        adapter: the name of an adapter in the bank; None for the base alone.
        max_new: the largest number of tokens to add.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    max_new: int = 16


class Completion(NamedTuple):
    """The result of a request.

    Attributes:
        number: the number that :meth:`Server.submit` returned.
        request: the request.
        tokens: the new tokens, without the stop token.
        logprobs: the logarithm of each token's probability.
        started: the step that took the request from the queue.
        ended: the step that ended it.
        error: the reason, if the request failed.
    """

    number: int
    request: Request
    tokens: list[int]
    logprobs: list[float]
    started: int
    ended: int
    error: str | None = None


@dataclasses.dataclass
class _Waiting:
    """A request in the queue, and the number of later requests that were admitted before it."""

    number: int
    request: Request
    passed: int = 0


@dataclasses.dataclass
class _Row:
    """A request in a row of the batch; the cache holds all its tokens but the last."""

    number: int
    request: Request
    slot: int
    started: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens) - 1


class Server:
    """Decode a queue of prompts greedily in a batch of ``rows`` rows.

    A step assigns free rows to waiting requests, reads their prompts one by one, and then adds one
    token to every row. There is one program per length in ``lengths``, and one that adds tokens:
    nothing compiles after :meth:`warm_up`, whichever adapters the requests use or the bank gains
    and loses. Rows without a request compute results that are ignored.

    Requests are served in order, with one exception. A request waits while its adapter has no
    slot, and up to ``patience`` later requests for the base, or for adapters in slots, are
    admitted before it. After that no request is admitted until running requests end and a slot is
    free. So every request is served, however busy some adapters are.

    Args:
        model: the Llama of the bank's base.
        bank: holds the adapters. Any thread may change it; a request uses the adapter that has its
            name when the request is admitted.
        rows: the number of requests decoded at once.
        size: the number of tokens in a row, prompt and continuation together.
        lengths: a prompt is padded to the next of these lengths.
        stop: tokens that end a text.
        patience: the number of later requests that may be admitted before a waiting one.

    Attributes:
        steps: the number of steps so far.
        tokens: the number of tokens added so far.
        peak: the largest number of rows in use at once.

    Raises:
        ValueError: a number is too small, or a length is larger than ``size``.
    """

    def __init__(
        self,
        model: llama.Llama,
        bank: lora_jax.many.AdapterBank,
        *,
        rows: int,
        size: int,
        lengths: Collection[int],
        stop: Collection[int] = (),
        patience: int = 32,
    ):
        if rows < 1 or patience < 0:
            raise ValueError(
                f"Server: rows={rows}, patience={patience}: expected rows >= 1 and patience >= 0"
            )
        if not lengths or min(lengths) < 1 or max(lengths) > size:
            raise ValueError(
                f"Server: lengths={lengths!r}: expected one or more, from 1 to size={size}: pass "
                "a larger size, or other lengths"
            )
        self.steps = self.tokens = self.peak = 0
        self._model, self._bank, self._size, self._stop = model, bank, size, frozenset(stop)
        self._lengths, self._patience = sorted(lengths), patience
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._rows: list[_Row | None] = [None] * rows
        self._cache, self._submitted = model.empty(rows, size), 0

    def submit(self, request: Request) -> int:
        """Add a request to the queue.

        Returns:
            Its number: 0, 1, ...

        Raises:
            TypeError: the adapter is not a name.
            ValueError: the request does not fit in a row, or has tokens that the model lacks.
        """
        request = request._replace(prompt=tuple(request.prompt))  # the caller may change the list
        prompt, adapter, max_new = request
        if not isinstance(adapter, str | None):
            raise TypeError(f"adapter={adapter!r}: expected a name, or None for the base alone")
        if not 0 < len(prompt) <= self._lengths[-1]:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, expected 1 to {self._lengths[-1]}: shorten "
                "it, or pass larger lengths"
            )
        if not 0 < max_new <= self._size - len(prompt):
            raise ValueError(
                f"max_new={max_new}, expected 1 to {self._size - len(prompt)}: a row has room for "
                f"{self._size} tokens, and the prompt has {len(prompt)}"
            )
        if wrong := [token for token in prompt if not 0 <= token < self._model.vocab_size]:
            raise ValueError(
                f"the prompt has the token {wrong[0]}, expected 0 to {self._model.vocab_size - 1}: "
                "use the tokenizer of the model"
            )
        self._queue.append(_Waiting(self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def warm_up(self) -> None:
        """Compile all programs before the first request."""
        for _ in range(2):  # the second time with arrays that the programs returned
            for length in self._lengths:
                self._run_prompt([0] * length, slot=-1, row=0)
            self._run_token()

    def run(self) -> Iterator[Completion]:
        """Step until every request has ended; yield completions as they end."""
        while self._queue or any(self._rows):
            yield from self.step()

    def step(self) -> list[Completion]:
        """Admit requests, and add a token to each row in use.

        Returns:
            The requests that ended.

        Raises:
            RuntimeError: callers other than this server hold all slots, so waiting is no use.
        """
        ended = self._admit()
        if self._queue and not ended and not any(self._rows):
            raise RuntimeError(
                f"Server: {self._queue[0].request.adapter!r} waits for a slot, but other callers "
                f"hold all slots, and no row is in use. {self._bank!r}: release some"
            )
        if any(self._rows):
            tokens, logprobs = self._run_token()
            for n, row in enumerate(self._rows):
                if row is not None:
                    ended += self._add(n, row, tokens[n], logprobs[n])
        self.steps += 1
        return ended

    # The queue

    def _admit(self) -> list[Completion]:
        """Admit requests into free rows; return those that ended at once."""
        ended = []
        while None in self._rows and (found := self._next_request()) is not None:
            waiting, slot = found
            for other in self._queue:
                if other is waiting:
                    break
                other.passed += 1
            self._queue.remove(waiting)
            number, request = waiting.number, waiting.request
            if isinstance(slot, str):
                ended.append(Completion(number, request, [], [], self.steps, self.steps, slot))
                continue
            n = self._rows.index(None)
            row = self._rows[n] = _Row(number, request, slot, self.steps)
            self.peak = max(self.peak, sum(map(bool, self._rows)))
            ended += self._add(n, row, *self._run_prompt(request.prompt, slot, n))
        return ended

    def _next_request(self) -> tuple[_Waiting, int | str] | None:
        """Return the next request, and the slot acquired for it or the error it fails with."""
        present = None  # the adapters in slots, once no slot is free
        for waiting in self._queue:
            name = waiting.request.adapter
            if name is None:
                return waiting, -1
            if present is None or name in present:
                try:
                    return waiting, self._bank.acquire(name)
                except KeyError as error:
                    return waiting, error.args[0]
                except jax.errors.JaxRuntimeError:  # a device error, not a missing slot
                    raise
                except RuntimeError:
                    present = self._bank.slots
            if waiting.passed >= self._patience:
                break
        return None

    def _add(self, n: int, row: _Row, token: int, logprob: float) -> list[Completion]:
        """Add a token to a row; return the request if that ends it."""
        error = None
        if not np.isfinite(logprob):
            error = (
                f"after {row.length + 1} tokens the logits of adapter {row.request.adapter!r} are "
                "not finite: its update overflows the dtype"
            )
        elif token not in self._stop:
            row.tokens.append(int(token))
            row.logprobs.append(float(logprob))
            self.tokens += 1
            if len(row.tokens) < row.request.max_new:
                return []
        self._rows[n] = None
        if row.request.adapter is not None:
            self._bank.release(row.request.adapter)
        done = row.number, row.request, row.tokens, row.logprobs, row.started, self.steps, error
        return [Completion(*done)]

    # The device

    def _run_prompt(self, prompt: Sequence[int], slot: int, row: int) -> tuple[int, float]:
        """Read a prompt into a row of the cache; return the token after it and its logprob."""
        length = next(length for length in self._lengths if length >= len(prompt))
        ids = np.zeros((1, length), np.int32)
        ids[0, : len(prompt)] = prompt
        slots, end, at = np.array([slot], np.int32), np.int32(len(prompt)), np.int32(row)
        # Inside ``using``, loading an adapter copies the stack and does not overwrite this one.
        with self._bank.using([]) as (lora_params, _):
            token, logprob, self._cache = read_prompt(
                lora_params, slots, ids, end, at, self._cache, model=self._model
            )
        return int(token), float(logprob)

    def _run_token(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the token after each row's last, and its logprob; free rows give any token."""
        rows = [(r.slot, r.tokens[-1], r.length) if r else (-1, 0, 0) for r in self._rows]
        slots, tokens, lengths = (np.array(x, np.int32) for x in zip(*rows, strict=True))
        cache = self._cache._replace(lengths=lengths)
        with self._bank.using([]) as (lora_params, _):
            found, logprobs, self._cache = next_tokens(
                lora_params, slots, tokens, cache, model=self._model
            )
        return np.asarray(found), np.asarray(logprobs)
