"""Continuous batching: prompts come and go as rows of one batch, each with its own adapter.

Nothing here knows of texts or files: ``serve_many.py`` brings those.
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
    """What is wanted.

    Attributes:
        prompt: its tokens.
        adapter: the name of an adapter of the bank; None for the base alone.
        max_new: how many tokens to add at most.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    max_new: int = 16


class Completion(NamedTuple):
    """What came of a request.

    Attributes:
        number: that :meth:`Server.submit` gave.
        request: as it was.
        tokens: the new ones, without the one that stops.
        logprobs: of each of them, the logarithm of its probability.
        started: the step that took it from the queue.
        ended: the step that it ended with.
        error: why there are no more tokens, where it failed.
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
    """A request in the queue, and how many behind it went before it."""

    number: int
    request: Request
    passed: int = 0


@dataclasses.dataclass
class _Row:
    """A request at work: of its tokens, the cache has all but the last."""

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
    """Decodes a queue of prompts greedily, as many at a time as there are rows.

    A step gives free rows to waiting requests, whose prompts are read one by one, and then adds a
    token to every row. There is one program for each of ``lengths`` and one for the token: after
    :meth:`warm_up` nothing compiles, whatever the mix of adapters, and whichever come and go in
    the bank meanwhile. Rows without a request compute something that nobody looks at.

    First come, first served, but for one thing: a request for whose adapter there is no slot
    waits, and those behind it for the base, or for adapters in use, pass; up to ``patience`` of
    them. Then nobody passes, the rows at work end, and a slot is free. So every request has its
    turn, however busy some adapters are.

    Args:
        model: the Llama of the bank's base.
        bank: has the adapters. It may be changed by any thread meanwhile; a request gets the
            adapter that has its name when its turn comes.
        rows: how many requests are at work at once.
        size: tokens of a row, prompt and continuation together.
        lengths: of prompts: each is padded to the next of them.
        stop: tokens that end a text.
        patience: how often a waiting request is passed.

    Attributes:
        steps: how many there were.
        tokens: how many the steps and prompts have added.
        peak: the most rows at work in a step.

    Raises:
        ValueError: a number is too small, or a length larger than ``size``.
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
                f"Server: rows={rows}, patience={patience}: expected 1 and 0 at the least"
            )
        if not lengths or min(lengths) < 1 or max(lengths) > size:
            raise ValueError(
                f"Server: lengths={lengths!r}: expected some, from 1 to size={size}: pass a "
                "larger size, or other lengths"
            )
        self.steps = self.tokens = self.peak = 0
        self._model, self._bank, self._size, self._stop = model, bank, size, frozenset(stop)
        self._lengths, self._patience = sorted(lengths), patience
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._rows: list[_Row | None] = [None] * rows
        self._cache, self._submitted = model.empty(rows, size), 0

    def submit(self, request: Request) -> int:
        """Put a request into the queue.

        Returns:
            Its number: 0, 1, ...

        Raises:
            TypeError: the adapter is no name.
            ValueError: it does not fit into a row, or has tokens that the model does not know.
        """
        request = request._replace(prompt=tuple(request.prompt))  # whatever becomes of the list
        prompt, adapter, max_new = request
        if not isinstance(adapter, str | None):
            raise TypeError(f"adapter={adapter!r}: expected a name, or None for the base alone")
        if not 0 < len(prompt) <= self._lengths[-1]:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, expected 1 to {self._lengths[-1]}: shorten "
                "it, or serve larger lengths"
            )
        if not 0 < max_new <= self._size - len(prompt):
            raise ValueError(
                f"max_new={max_new}, expected 1 to {self._size - len(prompt)}: a row has room for "
                f"{self._size} tokens, and the prompt has {len(prompt)}"
            )
        if wrong := [token for token in prompt if not 0 <= token < self._model.vocab_size]:
            raise ValueError(
                f"the prompt has the token {wrong[0]}, expected 0 to {self._model.vocab_size - 1}: "
                "it is of another tokenizer than the model"
            )
        self._queue.append(_Waiting(self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def warm_up(self) -> None:
        """Compile all there is to compile, before the first request; its time is not theirs."""
        for _ in range(2):  # the second time on what came out of the first
            for length in self._lengths:
                self._run_prompt([0] * length, slot=-1, row=0)
            self._run_token()

    def run(self) -> Iterator[Completion]:
        """Steps until nothing waits or is at work; what ended, as it ends."""
        while self._queue or any(self._rows):
            yield from self.step()

    def step(self) -> list[Completion]:
        """Let requests in, and add a token to each row at work.

        Returns:
            What ended.

        Raises:
            RuntimeError: others than this server hold all slots, so that waiting is of no use.
        """
        ended = self._admit()
        if self._queue and not ended and not any(self._rows):
            raise RuntimeError(
                f"Server: {self._queue[0].request.adapter!r} waits for a slot, and no row is at "
                f"work: all are held by others. {self._bank!r}: release some"
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
        """Rows for those whose turn it is; what of them ended at once."""
        ended = []
        while None in self._rows and (turn := self._turn()) is not None:
            waiting, slot = turn
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

    def _turn(self) -> tuple[_Waiting, int | str] | None:
        """The next request, and the slot that is now held for it, or why it fails."""
        present = None  # what has a slot, once all are known to be in use
        for waiting in self._queue:
            name = waiting.request.adapter
            if name is None:
                return waiting, -1
            if present is None or name in present:
                try:
                    return waiting, self._bank.acquire(name)
                except KeyError as error:
                    return waiting, error.args[0]
                except jax.errors.JaxRuntimeError:  # out of memory, say: not for want of a slot
                    raise
                except RuntimeError:
                    present = self._bank.slots
            if waiting.passed >= self._patience:
                break
        return None

    def _add(self, n: int, row: _Row, token: int, logprob: float) -> list[Completion]:
        """A token more in a row; what ended by it."""
        error = None
        if not np.isfinite(logprob):
            error = (
                f"after {row.length + 1} tokens the logits of adapter {row.request.adapter!r} are "
                "not finite: its update is too large for the dtype"
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
        """Read a prompt into a row of the cache: the first token after it."""
        length = next(length for length in self._lengths if length >= len(prompt))
        ids = np.zeros((1, length), np.int32)
        ids[0, : len(prompt)] = prompt
        slots, end, at = np.array([slot], np.int32), np.int32(len(prompt)), np.int32(row)
        # While a block of using is open, who loads an adapter copies the stack, and leaves ours.
        with self._bank.using([]) as (lora_params, _):
            token, logprob, self._cache = read_prompt(
                lora_params, slots, ids, end, at, self._cache, model=self._model
            )
        return int(token), float(logprob)

    def _run_token(self) -> tuple[np.ndarray, np.ndarray]:
        """The token after each row's last; of rows without a request, anything."""
        rows = [(r.slot, r.tokens[-1], r.length) if r else (-1, 0, 0) for r in self._rows]
        slots, tokens, lengths = (np.array(x, np.int32) for x in zip(*rows, strict=True))
        cache = self._cache._replace(lengths=lengths)
        with self._bank.using([]) as (lora_params, _):
            found, logprobs, self._cache = next_tokens(
                lora_params, slots, tokens, cache, model=self._model
            )
        return np.asarray(found), np.asarray(logprobs)
