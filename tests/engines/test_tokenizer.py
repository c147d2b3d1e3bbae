from pydoc_data.topics import topics

import pytest

from millrace.engines.chat import chat_prompt
from millrace.engines.converted import hugging_face_folder
from millrace.engines.engine import Message
from millrace.engines.openvino import OpenVinoEngine
from millrace.settings import Settings

pytestmark = pytest.mark.model


def test_training_sees_the_tokens_that_the_engine_computes(engine: OpenVinoEngine) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hugging_face_folder(engine.path, Settings().cache))
    for text in (*[topics[name][:1500] for name in sorted(topics)], "naïve café 日本語 🙂  x\t\n\n 1234567 don't"):
        messages = [Message("user", text)]
        expected = tokenizer(chat_prompt(messages), add_special_tokens=False)["input_ids"]
        assert engine._encoded(messages).data[0].tolist() == expected
