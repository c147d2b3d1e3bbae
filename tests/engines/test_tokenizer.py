from pydoc_data.topics import topics

import pytest

from millrace.engines.chat import chat_prompt
from millrace.engines.engine import Message
from millrace.engines.openvino import OpenVinoEngine
from millrace.engines.tokenizer import model_tokenizer

pytestmark = pytest.mark.model


def test_training_sees_the_tokens_that_the_engine_computes(engine: OpenVinoEngine) -> None:
    tokenizer = model_tokenizer(engine.path)
    for text in (*[topics[name][:1500] for name in sorted(topics)], "naïve café 日本語 🙂  x\t\n\n 1234567 don't"):
        messages = [Message("user", text)]
        expected = tokenizer(chat_prompt(messages), add_special_tokens=False)["input_ids"]
        assert engine._encoded(messages).data[0].tolist() == expected
