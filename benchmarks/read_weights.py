"""How far what the engine computes is from the weights that a file holds.

    python benchmarks/read_weights.py [--questions N]

Peer: the same file, read back to 32-bit floats by the gguf package and computed by transformers. It answers N questions
of the documents greedily; then both say what they think of each token of those answers (natural logarithm of its
probability, given what comes before). The table shows the mean distance a token, and how many answers the engine gives
word for word: for the base model's package, whose Q4_1 has zero points that are no whole numbers, and for the same
weights in Q8_0, as the base release and a fine-tune have them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from millrace.applications import load_application
from millrace.engines.base_model import base_model_path
from millrace.engines.chat import chat_prompt
from millrace.engines.converted import exact_file
from millrace.engines.engine import Message
from millrace.settings import Settings
from millrace.sources.questions import derive_questions
from millrace.sources.reading import read_source
from millrace.training.loop import load

ANSWER_TOKENS = 24
CHARACTERS = 800
"""Of a document, at most."""
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""As `engines/openvino.py` asks for."""


def transformers_answers(base: Path, prompts: Sequence[str]) -> list[tuple[Any, int, list[float]]]:
    """Of each prompt: its tokens with the answer's, how many are the prompt's, and what each of the answer's got."""
    import torch

    tokenizer, model = load(base, Settings().cache)
    answers = []
    for prompt in prompts:
        ids = tokenizer(chat_prompt([Message("user", prompt)]), add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            whole = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False
            )
            said = torch.log_softmax(model(whole).logits[0, ids.shape[1] - 1 : -1], -1)
        of_tokens = said.gather(1, whole[0, ids.shape[1] :, None])[:, 0]
        answers.append((whole.numpy(), ids.shape[1], of_tokens.tolist()))
    return answers


def engine_distance(path: Path, answers: Sequence[tuple[Any, int, list[float]]]) -> tuple[float, int]:
    """Mean distance per token, and how many answers are the same."""
    import openvino
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

    scheduler = SchedulerConfig()
    scheduler.cache_size = 1
    pipeline = ContinuousBatchingPipeline(str(path), scheduler, "CPU", OPTIONS)

    def run(number: int, ids: Any, **options: Any) -> Any:
        config = GenerationConfig(**options)
        handle = pipeline.add_request(number, openvino.Tensor(np.ascontiguousarray(ids)), config)
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return next(iter(handle.read_all()))

    distances, same = [], 0
    for number, (whole, prompt, wanted) in enumerate(answers):
        echoed = run(2 * number, whole, max_new_tokens=1, echo=True, logprobs=1)
        distances += list(np.abs(np.array(echoed.generated_log_probs[-len(wanted) - 1 : -1]) - wanted))
        end = int(whole[0, -1])
        given = run(2 * number + 1, whole[:, :prompt], max_new_tokens=len(wanted), eos_token_id=end)
        same += list(given.generated_ids) == whole[0, prompt:].tolist()
    return float(np.mean(distances)), same


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--questions", type=int, default=20)
    given = arguments.parse_args()
    settings = Settings()
    application = load_application(settings, "qa")
    rows = [
        {"document_id": one.document_id, "source": one.source, "section": one.section, "text": one.content.decode()}
        for source in application.sources
        for one in read_source(source)
    ]
    asked = derive_questions(pa.Table.from_pylist(rows), application)
    texts = {row["document_id"]: str(row["text"]) for row in rows}
    step = max(1, len(asked) // given.questions)
    prompts = [f"{texts[one.document_id][:CHARACTERS]}\n{one.question}" for one in asked[::step]][: given.questions]

    base = base_model_path(application.generator)
    answers = transformers_answers(base, prompts)
    print(f"{'file':<44}{'distance a token':>18}{'same answers':>14}")
    for path in (base, exact_file(base, settings.cache)):
        distance, same = engine_distance(path, answers)
        print(f"{path.name:<44}{distance:>18.3f}{f'{same} of {len(answers)}':>14}")


if __name__ == "__main__":
    main()
