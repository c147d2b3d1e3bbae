"""The generator inside this process: `transformers` on a Hugging Face directory, on the GPU where there is one.

For whatever model has no faster engine here. One thread owns the model and answers one request after the other, in the
order of their arrival: padded batches round differently, so answers of a batch would not repeat. On a CPU everything is
computed in float32; on a GPU in the weights' own precision. It does not know what a release is.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from millrace.applications import Generation
from millrace.engines.engine import FinishReason, Generated, Message
from millrace.engines.huggingface import model_files
from millrace.engines.token_stream import Job, TokenStream, require_room
from millrace.errors import EngineError

_NO_CLOCK = "{%- macro strftime_now(format) -%}1 January 2025{%- endmacro -%}"
"""Before a chat template that tells the model today's date: the same question would get another prompt tomorrow."""


class TransformersEngine:
    """A loaded model.

    Args:
        folder: as `save_pretrained` writes it; nothing but files of the model in it (`model_files`).
        threads: to compute with, on a CPU.

    Raises:
        EngineError: it can't be loaded, or not as it is: weights are missing or would be ignored, the tokenizer is of
            another model, or there is no chat template.
    """

    def __init__(self, folder: Path, *, threads: int) -> None:
        model_files(folder)
        self.folder = folder
        self._model, self._tokenizer, self._ends = _load(folder)
        self._template = _repeatable(folder, self._tokenizer)
        self._context_tokens = _context(folder, self._model, self._tokenizer)
        self._threads = threads
        self._tokenizing = threading.Lock()
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._compute, name=f"engine {folder.name}", daemon=True)
        self._thread.start()

    @property
    def context_tokens(self) -> int:
        return self._context_tokens

    @property
    def broken(self) -> str | None:
        """A request that fails leaves the next one alone."""
        return None

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return int(self._encoded(messages)["input_ids"].shape[1])

    def generate(self, messages: Sequence[Message], config: Generation) -> Generated:
        return self.stream(messages, config).drain()

    def stream(self, messages: Sequence[Message], config: Generation) -> TokenStream:
        prompt = self._encoded(messages)
        length = int(prompt["input_ids"].shape[1])
        require_room(length, config, self._context_tokens)
        job = Job(prompt, self._generation_config(config))
        with self._lock:
            if self._closed.is_set():
                raise self._gone()
            self._inbox.put(job)
        return TokenStream(job, self._decoded, length)

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._model = None

    def _encoded(self, messages: Sequence[Message]) -> Any:
        """What a document or a question says can't end its turn: control tokens in it are ordinary text."""
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            with self._tokenizing:  # the tokenizer must not be used by two threads at once
                return self._tokenizer.apply_chat_template(
                    turns,
                    chat_template=self._template,
                    add_generation_prompt=True,
                    sanitize_control_tokens=True,
                    return_tensors="pt",
                    return_dict=True,
                )
        except (TemplateError, ValueError, TypeError) as error:
            raise EngineError(f"the chat template of {self.folder.name} refuses the messages: {error}") from None

    def _decoded(self, ids: Sequence[int]) -> str:
        with self._tokenizing:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _generation_config(self, config: Generation) -> Any:
        from transformers import GenerationConfig

        # From all tokens, as the other engines do it; transformers' own default is the 50 most likely ones.
        sampled = {"temperature": config.temperature, "top_k": 0, "top_p": 1.0} if config.temperature > 0 else {}
        return GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            do_sample=config.temperature > 0,
            eos_token_id=self._ends,
            pad_token_id=self._ends[0],
            **sampled,
        )

    def _compute(self) -> None:
        """The engine's thread: one request after the other, until closed."""
        import torch

        torch.set_num_threads(self._threads)
        while (job := self._inbox.get()) is not None:
            if not job.cancelled.is_set():
                self._answer(job)
        while True:
            try:
                waiting = self._inbox.get_nowait()
            except queue.Empty:
                return
            if waiting is not None:
                waiting.tokens.put(self._gone())

    def _answer(self, job: Job) -> None:
        tokens = _Tokens(job)
        try:
            self._model.generate(
                **job.prompt.to(self._model.device),
                generation_config=job.config,
                streamer=tokens,
                stopping_criteria=_stops(lambda: job.cancelled.is_set() or self._closed.is_set()),
            )
        except Exception as error:  # Whatever it was: nobody may wait for ever on an answer that doesn't come.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            job.tokens.put(EngineError(f"{self.folder.name} can't answer: {reason}"))
            return
        ended: FinishReason = "stop" if tokens.last in self._ends else "length"
        cut = self._closed.is_set() and ended != "stop" and tokens.count < job.config.max_new_tokens
        job.tokens.put(self._gone() if cut else ended)

    def _gone(self) -> EngineError:
        return EngineError(f"the engine of {self.folder.name} is closed; load the release again")


class _Tokens:
    """Hands each token to the caller; a streamer as `generate` calls it, which gives the prompt first."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._prompt = True
        self.last = -1
        self.count = 0

    def put(self, ids: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.last = int(ids.reshape(-1)[-1])
        self.count += 1
        self._job.tokens.put([self.last])

    def end(self) -> None:
        """`generate` calls it; how it ended is said by who called `generate`."""


def _stops(asked: Callable[[], bool]) -> Any:
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Asked(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((input_ids.shape[0],), asked(), dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([Asked()])


def _load(folder: Path) -> tuple[Any, Any, list[int]]:
    """Model, tokenizer, and the tokens that end a turn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **own)
        model, told = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if device == "cpu" else "auto",
            use_safetensors=True,
            output_loading_info=True,
            **own,
        )
    except Exception as error:  # transformers raises whatever its parts raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EngineError(f"transformers can't load {folder}: {reason}") from None
    for kind, wrong in (("missing", "missing_keys"), ("of another shape", "mismatched_keys"),
                        ("not used", "unexpected_keys")):  # fmt: skip
        if told[wrong]:
            first = sorted(str(one) for one in told[wrong])
            raise EngineError(
                f"{folder}: {len(first)} weights are {kind} (the first: {first[0]}), so this would be another model; "
                "save it again with the configuration that it was trained with"
            )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise EngineError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model {rows}; they don't belong together"
        )
    said = model.generation_config.eos_token_id
    ends = {*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id} - {None}
    if not ends:
        raise EngineError(f"{folder} names no token that ends an answer (eos_token_id); correct its configuration")
    # What a release generates with is in its manifest, all of it: `generate` would fill in what the model's file says.
    model.generation_config = GenerationConfig()
    return model.to(device).eval(), tokenizer, sorted(ends)


def _repeatable(folder: Path, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise EngineError(
            f"{folder} has no chat template, so nobody knows how to ask it; choose a model that was tuned for chat"
        )
    template = str(tokenizer.get_chat_template())
    return _NO_CLOCK + template if "strftime_now" in template else template


def _context(folder: Path, model: Any, tokenizer: Any) -> int:
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    known = [size for size in (said, tokenizer.model_max_length) if isinstance(size, int) and 0 < size < 10**9]
    if not known:
        raise EngineError(f"{folder} does not say how many tokens it reads (max_position_embeddings)")
    return min(known)
