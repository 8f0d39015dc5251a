"""Forms as something that requests need before they can run, made for the model's vocabulary."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from itertools import chain, repeat
from threading import Lock
from typing import cast

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from loraplex_engine.link.grammar import GRAMMAR_LIMITS, UNUSABLE_FORM
from loraplex_engine.scheduling.compiling import TurnQueue
from loraplex_engine.scheduling.form import Form, FormKey, Stops, Texts
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.resources import NeverReadyError, Preparer

MAX_COMPILED = 128  # grammars that are kept: of some 100 kB, at most some MB
NUM_THREADS = 2  # so that a large grammar does not keep small ones waiting


Wanted = tuple[str, FormKey]  # by a tenant


class FormPreparer(Preparer):
    """Gives requests their forms. Grammars are compiled in threads, by turns of the tenants, and kept for requests to
    come.
    """

    def __init__(self, vocab_size: int, read_texts: Callable[[Sequence[bytes]], Texts]) -> None:
        """`vocab_size`: of the model; ids beyond it are of no use. `read_texts`: reads the bytes of all tokens."""
        self._vocab_size = vocab_size
        self._read_texts = read_texts
        self._compiled: OrderedDict[FormKey, Future[Form]] = OrderedDict()  # the least recently used first
        self._queue = TurnQueue(self._compile, NUM_THREADS, "grammar")
        self._vocabulary: Vocabulary | None = None
        self._num_done = 0
        self._counting = Lock()
        self.num_given = 0
        self.num_compiled = 0
        self.compile_seconds = 0.0

    def set_vocabulary(self, token_bytes: Sequence[bytes]) -> None:
        """Take the vocabulary, of which forms are made from now on. Takes up to half a second, and lets no other thread
        go on meanwhile.
        """
        tokens = [token for token, _ in zip(chain(token_bytes, repeat(b"")), range(self._vocab_size), strict=False)]
        self._vocabulary = Vocabulary(tokens, self._read_texts(tokens))
        self._compiled.clear()

    def close(self) -> None:
        """Stop the threads."""
        self._queue.close()

    @property
    def changes(self) -> int:
        return self._num_done

    def key(self, request: Request) -> Hashable | None:
        return None if request.form_key is None else (request.tenant, request.form_key)

    def give(self, request: Request) -> bool:
        key = request.form_key
        assert key is not None
        compiled = self._compiled.get(key) or self._begin(key)
        if not compiled.done():
            self._queue.add(request.tenant, key, compiled)
            return False
        self._compiled.move_to_end(key)
        error = compiled.exception()
        if error is not None:
            raise NeverReadyError(f"its form cannot be prepared: {error}", UNUSABLE_FORM)
        request.form = compiled.result().copy()
        self.num_given += 1
        return True

    def take_back(self, request: Request) -> None:
        request.form = None

    def forget(self, key: Hashable) -> None:
        tenant, form_key = cast(Wanted, key)
        if self._queue.remove(tenant, form_key):
            self._compiled.pop(form_key, None)  # gone already, if another vocabulary came meanwhile

    def _begin(self, key: FormKey) -> Future[Form]:
        if self._vocabulary is None:
            raise NeverReadyError("its form cannot be prepared: the engine was given no vocabulary")
        self._make_room()
        compiled = self._compiled[key] = Future[Form]()
        compiled.add_done_callback(self._note_done)
        return compiled

    def _compile(self, key: FormKey) -> Form:
        assert self._vocabulary is not None
        began = time.monotonic()
        form = self._vocabulary.form(key)
        with self._counting:
            self.num_compiled += 1
            self.compile_seconds += time.monotonic() - began
        return form

    def _make_room(self) -> None:
        """Forget the least recently used grammars. What is being compiled stays: a request waits for it."""
        done = (key for key, compiled in self._compiled.items() if compiled.done())
        while len(self._compiled) >= MAX_COMPILED and (oldest := next(done, None)) is not None:
            del self._compiled[oldest]
            done = (key for key, compiled in self._compiled.items() if compiled.done())

    def _note_done(self, compiled: Future[Form]) -> None:
        with self._counting:
            self._num_done += 1


class Vocabulary:
    """What forms are made of: a model's tokens, as the grammars' library takes them, and by their texts."""

    def __init__(self, tokens: list[bytes], texts: Texts) -> None:
        """With one more token, "the end may follow": which tokens end an output, each request says for itself."""
        self._texts = texts
        self._tokens = tokens
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Tokens([*tokens, b""])))

    def form(self, key: FormKey) -> Form:
        """The form after the key's tokens. Raises ValueError."""
        words, stop = ([text.encode() for text in texts] for texts in (key.bad_words, key.stop))
        form = Form(
            self._matcher(key.grammar) if key.grammar else None,
            self._texts.without(words) if words else None,
            Stops(stop, self._tokens) if stop else None,
        )
        for token_id in key.token_ids:  # one by one: the library keeps the interpreter lock until all are taken
            form.take(token_id)
            if form.problem:
                break
        if form.problem:
            raise ValueError(form.problem)
        return form

    def _matcher(self, grammar: str) -> LLMatcher:
        source = LLMatcher.grammar_from_lark(grammar)
        return LLMatcher(self._tokenizer, source, log_level=0, limits=GRAMMAR_LIMITS)


class _Tokens:
    """A vocabulary as the library takes it. It turns no text into tokens."""

    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError
