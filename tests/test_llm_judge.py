"""The chat model that judges answers: its prompt, its replies and what they are kept under."""

import shutil

import pytest
from transformers import LlamaForCausalLM

from openunirl.evaluation import llm_judge
from openunirl.evaluation.llm_judge import ChatModel, judge_answers, verdict_of
from openunirl.tasks.records import read_jsonl
from photo_checkpoints import save_chat


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return save_chat(tmp_path_factory.mktemp("chat"))


def test_the_chat_model_is_read_once_and_only_for_new_questions(chat, tmp_path, monkeypatch):
    loaded, load = [], llm_judge.pretrained

    def counting(kind, *args, **more):
        loaded.append(kind.__name__)
        return load(kind, *args, **more)

    monkeypatch.setattr(llm_judge, "pretrained", counting)
    monkeypatch.setattr(llm_judge, "MAX_NEW_TOKENS", 4)
    rows = [{"question": "q", "expected": "e", "answer": answer} for answer in "ab"]
    model = ChatModel(str(chat))
    kept = tmp_path / "replies.jsonl"
    first = [*judge_answers(rows[:1], model, tmp_path), *judge_answers(rows[1:], model, tmp_path)]
    assert first == [(row["reply"], verdict_of(row["reply"])) for row in read_jsonl(kept)]
    assert loaded.count("AutoModelForCausalLM") == 1
    assert judge_answers(rows, ChatModel(str(chat)), tmp_path) == first
    assert loaded.count("AutoModelForCausalLM") == 1


def test_a_reply_is_known_by_all_that_it_depends_on(chat, tmp_path):
    row = {"question": "q", "expected": "e", "answer": "a"}
    model, key = ChatModel(str(chat)), ChatModel(str(chat)).key_of(row)
    assert model.key_of(row) == key
    model.tokenizer.chat_template = "{{ messages }}"
    assert model.key_of(row) != key
    model = ChatModel(str(chat))
    model.dtype = "auto"
    assert model.key_of(row) != key and ChatModel(str(chat)).key_of(row | {"answer": "b"}) != key
    other = shutil.copytree(chat, tmp_path / "chat")
    assert ChatModel(str(other)).key_of(row) == key
    net = LlamaForCausalLM.from_pretrained(other)
    net.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
    net.save_pretrained(other)
    assert ChatModel(str(other)).key_of(row) != key


def test_models_that_think_are_told_not_to(chat, monkeypatch):
    asked, model = [], ChatModel(str(chat))
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}{{ 'think' if enable_thinking else 'reply' }}"
    real = model.tokenizer.apply_chat_template
    monkeypatch.setattr(
        model.tokenizer, "apply_chat_template", lambda *args, **more: asked.extend(told := real(*args, **more)) or told
    )
    monkeypatch.setattr(llm_judge, "MAX_NEW_TOKENS", 4)
    model.replies(["a "])
    assert asked == ["a reply"]


def test_verdicts():
    said = {
        "same": True,
        '"Same."': True,
        "Yes, same": True,
        "different": False,
        "Not the same": False,
        "not same": False,
    }
    said |= {"same... no, different": None, "Same or different? different": None, "No difference": None}
    said |= {"<think>Are they different? no</think>\n\nSame": True, "they differ</think> different": False}
    said |= {"<think>same same": None, "Different, not the same": False, "yes, not different": None}
    said |= {"No.": False, "": None, "Well": None, "not sure": None, "The answers are the same": None}
    assert {reply: verdict_of(reply) for reply in said} == said


def test_bad_chat_models_and_caches(chat, tmp_path):
    row = {"question": "q", "expected": "e", "answer": "a"}
    with pytest.raises(ValueError, match="cannot be read as AutoConfig"):
        ChatModel(str(tmp_path / "no"))
    (tmp_path / "replies.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(ValueError, match=r"replies.jsonl:1 is no reply of a judge"):
        judge_answers([row], ChatModel(str(chat)), tmp_path)
    assert "{question}" in llm_judge.PROMPT
