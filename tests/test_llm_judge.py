"""The chat model that judges answers: its prompt, its replies and what they are kept under."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaForCausalLM

from openunirl.evaluation import llm_judge
from openunirl.evaluation.llm_judge import ChatModel, judge_answers, verdict_of
from openunirl.tasks.records import read_jsonl
from photo_checkpoints import save_chat


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return save_chat(tmp_path_factory.mktemp("chat"))


def edit(file, **fields):
    """Other fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_chat_model_is_read_once_and_only_for_new_questions(chat, tmp_path, monkeypatch):
    loaded, load = [], llm_judge.load_whole

    def counting(kind, *args, **more):
        loaded.append(kind.__name__)
        return load(kind, *args, **more)

    monkeypatch.setattr(llm_judge, "load_whole", counting)
    monkeypatch.setattr(llm_judge, "MAX_NEW_TOKENS", 4)
    rows = [{"question": "q", "expected": "e", "answer": answer} for answer in "ab"]
    model = ChatModel(str(chat))
    kept = tmp_path / "replies.jsonl"
    first = [*judge_answers(rows[:1], model, tmp_path), *judge_answers(rows[1:], model, tmp_path)]
    assert first == [(row["reply"], verdict_of(row["reply"])) for row in read_jsonl(kept)]
    assert loaded == ["AutoModelForCausalLM"]
    assert judge_answers(rows, ChatModel(str(chat)), tmp_path) == first
    assert loaded == ["AutoModelForCausalLM"]


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


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("config.json", {"rms_norm_eps": 1.0}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}),
        ("tokenizer_config.json", {"eos_token": "well"}),
        ("generation_config.json", {"eos_token_id": [1, 5]}),
    ],
)
def test_a_reply_is_known_by_the_files_beside_the_weights(chat, tmp_path, name, fields):
    """All of which change what is said, and of which no number lies in the weights."""
    row = {"question": "q", "expected": "e", "answer": "a"}
    other = shutil.copytree(chat, tmp_path / "chat")
    edit(other / name, **fields)
    assert ChatModel(str(other)).key_of(row) != ChatModel(str(chat)).key_of(row)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_decoding_is_greedy_whatever_the_checkpoint_asks_for(chat, tmp_path, monkeypatch, name):
    """The likeliest token at every step, by hand; a repetition penalty of the checkpoint's would choose others."""
    row = {"question": "q", "expected": "e", "answer": "a"}
    monkeypatch.setattr(llm_judge, "MAX_NEW_TOKENS", 6)
    other = shutil.copytree(chat, tmp_path / "chat")
    edit(other / "generation_config.json", eos_token_id=[])
    plain = ChatModel(str(other))
    key = plain.key_of(row)
    ids = plain._tokens(["same well"])["input_ids"]
    for _ in range(6):
        logits = plain.net(ids).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    by_hand = plain.tokenizer.batch_decode(ids[:, -6:], skip_special_tokens=True)
    if name == "config.json":
        (other / "generation_config.json").unlink()
        edit(other / name, eos_token_id=[])
    edit(other / name, repetition_penalty=100.0, no_repeat_ngram_size=1, num_beams=2, max_length=3, suppress_tokens=[5])
    model = ChatModel(str(other))
    assert model.replies(["same well"]) == by_hand == plain.replies(["same well"])
    assert (model.key_of(row) == key) == (name == "generation_config.json")


def test_a_reply_ends_at_each_of_the_checkpoints_end_tokens(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(llm_judge, "MAX_NEW_TOKENS", 6)
    other = shutil.copytree(chat, tmp_path / "chat")
    edit(other / "generation_config.json", eos_token_id=[])
    whole = ChatModel(str(other)).replies(["same well"])[0].split()
    assert len(whole) > 1
    unsaid = next(word for word in ("a", "well", "different") if word not in whole)
    ends = ChatModel(str(other)).tokenizer.convert_tokens_to_ids([unsaid, whole[0]])
    edit(other / "generation_config.json", eos_token_id=ends)
    assert ChatModel(str(other)).replies(["same well"])[0].split() == whole[:1]
    (other / "generation_config.json").unlink()
    assert ChatModel(str(other)).ends == [1]
    edit(other / "config.json", eos_token_id=None)
    assert ChatModel(str(other)).ends == [1]  # the tokenizer's


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


def far_token(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["<unk>"] = 99
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] != "<unk>"]
    file.write_text(json.dumps(content))


DAMAGE = {
    "template cut off": (
        lambda f: (f / "chat_template.jinja").write_text("{% for m in messages %}<user> {{ m['con"),
        "the chat template fails .TemplateSyntaxError: .*; get it again",
    ),
    "template without the question": (
        lambda f: (f / "chat_template.jinja").write_text("<user>"),
        "the chat template leaves out what the user says; get it again",
    ),
    "empty template": (lambda f: (f / "chat_template.jinja").write_text(""), "the chat template leaves out"),
    "token": (
        far_token,
        r"the tokenizer gives token \d+, and the network has 7 tokens; get the tokenizer's files again",
    ),
    "pad token": (
        lambda f: edit(f / "tokenizer_config.json", pad_token="<more>"),
        "the tokenizer gives token 7, and the network has 7 tokens",
    ),
    "end token in words": (
        lambda f: edit(f / "generation_config.json", eos_token_id="<end>"),
        "the end token '<end>' is none of the network's 7 tokens; get generation_config.json again",
    ),
    "end token beyond": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[1, 7]),
        "the end token 7 is none of the network's 7 tokens",
    ),
    "generation cut off": (
        lambda f: (f / "generation_config.json").write_text('{"eos_'),
        "cannot be read as GenerationConfig",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_asked_is_refused_before_anything_is_drawn(chat, tmp_path, damage):
    folder = shutil.copytree(chat, tmp_path / "chat")
    change, words = DAMAGE[damage]
    change(folder)
    with pytest.raises(ValueError, match=words) as refused:
        ChatModel(str(folder))
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_a_network_that_fails_is_told_in_one_sentence(chat, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory\nand more")

    model = ChatModel(str(chat))
    monkeypatch.setattr(model.net, "generate", fail)
    with pytest.raises(ValueError, match=r"cannot answer \(RuntimeError: CUDA out of memory\); get .* where memory"):
        model.replies(["a"])
    model.tokenizer = Mock(chat_template=None, side_effect=fail)
    with pytest.raises(ValueError, match="the tokenizer cannot read a question"):
        model.replies(["a"])


def test_bad_chat_models_and_caches(chat, tmp_path):
    row = {"question": "q", "expected": "e", "answer": "a"}
    with pytest.raises(ValueError, match="cannot be read as AutoConfig"):
        ChatModel(str(tmp_path / "no"))
    (tmp_path / "replies.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(ValueError, match=r"replies.jsonl:1 is no reply of a judge"):
        judge_answers([row], ChatModel(str(chat)), tmp_path)
    assert "{question}" in llm_judge.PROMPT
