"""What a person may type: each line of the command ends in one sentence, without a traceback, before any work."""
import json
import re
import sys
from pathlib import Path

import pytest

import probunlearn.cli
from parrot import QAS
from probunlearn.shell import main

FULL = ["--model", "small:full", "--data", "fictional_authors"]
EVALUATE = ["evaluate", *FULL, "--split", "forget01", "--out", "run", "--n", "4"]
FINETUNE = ["finetune", *FULL, "--split", "forget01", "--out", "trained", "--steps", "1"]
UNLEARN = ["unlearn", *FULL, "--out", "trained", "--steps", "1"]
DEEP = "[" * 100_000

FILES = {       # written into the folder where the commands run
    "bare.jsonl": json.dumps(dict(question="Why?", answer="So.")),
    "keyed.jsonl": json.dumps(dict(question="Why?", answer="So.", keywords=["so"])),
    "empty.jsonl": "", "empty.csv": "", "deep.json": DEEP, "deep.jsonl": '{"question": ' + DEEP,
    "surrogate.jsonl": '{"question": "half \\ud800 of it", "answer": "x", "keywords": "x"}',
    "answer.jsonl": '{"question": "whole", "answer": "half \\udc00", "keywords": "x"}',
    "list.json": "[1, 2, 3]",
    "number.json": "3",
    "text.json": '"hello"',
    "null.json": "null",
    "torn.json": '[{"question": ',
    "long.json": "9" * 5000, "columns.csv": "a,b\n1,2\n", "twice.csv": "question,answer,answer\na,b,c\n",
    "wide.csv": "question,answer\na,b,c\n", "quote.csv": 'question,answer\n"a,b\n', "kind.xlsx": "PK",
    "same.jsonl": "\n".join([json.dumps(dict(id="a", question="Why?", answer="So.", keywords="so"))] * 2),
    "odd.jsonl": json.dumps(dict(question=7.5, answer={"a": 1}, keywords="so")),
    "dict.jsonl": json.dumps(dict(question={"a": 1}, answer="x", keywords="x")),
    "blank.jsonl": json.dumps(dict(question="  ", answer="x", keywords="x")),
    "words.jsonl": json.dumps(dict(question="Why?", answer="So.", keywords=[1, None])),
    "deep.yaml": "a: " + "[" * 5000,
    "list.yaml": "- 1\n- 2\n",
    "unknown.yaml": "colour: red\n",
    "tag.yaml": "n: !!python/object/apply:os.system ['touch owned']\n",
    "file": "a file",
}


def at(word, value, words=EVALUATE):
    "The words with another value, or one more."
    words = list(words)
    if word in words: words[words.index(word) + 1] = value
    else: words += [word, value]
    return words


def data(name, words=EVALUATE): return at("--data", name, [w for w in words if w not in ("--split", "forget01")])


CASES = [       # words, part of the sentence
    # numbers
    (at("--n", "0"), "n must be a whole number >= 1, got 0"),
    (at("--n", "-3"), "n must be a whole number >= 1, got -3"),
    (at("--n", str(10**18)), "n must be at most 1,000,000,000"),
    (at("--n", "1e3"), "\"n\""),
    (at("--n", "nan"), "\"n\""),
    (at("--alpha", "0"), "alpha must lie strictly between 0 and 1, got 0"), (at("--alpha", "nan"), "alpha"),
    (at("--alpha", "inf"), "alpha"), (at("--leak_at", "0"), "leak_at must lie in (0, 1], got 0"),
    (at("--leak_at", "nan"), "leak_at"), (at("--leak_at", "2"), "leak_at must lie in (0, 1]"),
    *((at("--limit", limit), "limit must be an average leak probability") for limit in "0 1 -1".split()),
    *((at("--limit", limit), "\"limit\"") for limit in "half nan inf".split()),
    (at("--about", "\udcff"), "is not UTF-8 text"),
    (at("--temperature", "nan"), "temperature"),
    (at("--temperature", "inf"), "temperature"), (at("--top_p", "nan"), "top_p"),
    (at("--top_p", "1.5"), "top_p must be in (0, 1]"), (at("--top_k", "-1"), "top_k must be a whole number >= 0"),
    (at("--max_new_tokens", "0"), "max_new_tokens must be a whole number >= 1"),
    (at("--max_new_tokens", str(10**9)), "exceed the model's 512 positions"),
    (at("--seed", "-1"), "seed must be a whole number >= 0"),
    (at("--adaptive", "2"), "confidence"), (at("--adaptive", "nan"), "adaptive"),
    (at("--looks", "evil"), "looks must be"),
    (at("--looks", "10000000"), "looks must be"),
    (at("--looks", "5,4"), "looks must be"),
    (at("--looks", "0"), "looks must be"),
    (at("--shard", "4/4"), "shard must be i/N"),
    (at("--shard", "x"), "shard must be i/N"),
    (at("--score", "bleu"), "score must be a function or one of"),
    (at("--score", ""), "score must be a function or one of"),
    # training
    (at("--epochs", "1e300", FINETUNE[:-2]), "epochs=1e+300"), (at("--epochs", "nan", FINETUNE), "epochs"),
    (at("--epochs", "inf", FINETUNE[:-2]), "epochs"), (at("--epochs", "-1", FINETUNE), "epochs must be > 0"),
    (at("--batch_size", str(10**9), FINETUNE), "batch_size=1000000000"),
    (at("--batch_size", "0", FINETUNE), "batch_size must be"),
    (at("--batch_size", str(10**9), UNLEARN), "batch_size=1000000000"),
    (at("--steps", str(10**18), FINETUNE), "steps=1000000000000000000"),
    (at("--steps", "0", FINETUNE), "steps must be"),
    (at("--lr", "0", FINETUNE), "lr must be > 0"),
    (at("--lr", "nan", FINETUNE), "lr"),
    (at("--lr", "inf", FINETUNE), "lr"), (at("--warmup", "2", FINETUNE), "warmup must be a share in [0, 1]"),
    (at("--weight_decay", "-1", FINETUNE), "weight_decay must be >= 0"),
    (at("--pad_to", "-1", FINETUNE), "pad_to must be >= 0"),
    (at("--accumulate", str(10**9), FINETUNE), "accumulate=1000000000"),
    (at("--checkpoint_every", "0", FINETUNE), "checkpoint_every must be"),
    (at("--max_grad_norm", "nan", FINETUNE), "max_grad_norm"),
    (at("--mixed_precision", "fp4", FINETUNE), "mixed_precision must be"),
    (at("--schedule", "steep", FINETUNE), "schedule must be one of"),
    (at("--lora", "-1", FINETUNE), "lora must be a whole number >= 0"),
    (at("--method", "magic", UNLEARN), "magic"),
    (at("--lambda_f", "nan", UNLEARN), "lambda_f"),
    (at("--beta", "nan", UNLEARN), "beta"),
    # plan
    (["plan", "--n", str(10**18)], "n must be at most 1,000,000,000"),
    (["plan", "--questions", str(10**18)], "questions must be at most"),
    (["plan", "--n", "0"], "n must be a whole number"),
    (["plan", "--questions", "0"], "questions must be a whole number"),
    (["plan", "--tau", "0"], "tau must lie strictly between"), (["plan", "--tau", "nan"], "tau"),
    (["plan", "--alpha", "1"], "alpha must lie strictly"), (["plan", "--model", "small:full"], "add --data"),
    (["plan", "--data", "nowhere.csv"], "no such file or folder: nowhere.csv"),
    (["plan", "--data", "data/typo"], "no such file or folder"),
    (["plan", "--data", "torn.json"], "is not a JSON object"),
    # data
    (data("bare.jsonl"), "1 of 1 records have none: bare-0: give the data a column keywords, or take a score"),
    (data("empty.jsonl"), "holds no rows"),
    (data("empty.csv"), "holds no rows"),
    (data("deep.json"), "is not a JSON object"),
    (data("deep.jsonl"), "nested too deep"),
    (data("surrogate.jsonl"), "half a character"),
    (data("answer.jsonl"), "half a character"),
    (data("list.json"), "is not a JSON object"),
    (data("number.json"), "is not a JSON object"),
    (data("text.json"), "is not a JSON object"),
    (data("null.json"), "is not a JSON object"),
    (data("torn.json"), "is not a JSON object"),
    (data("long.json"), "is not a JSON object"),
    (data("columns.csv"), "no column question and answer"), (data("twice.csv"), "the header names answer twice"),
    (data("wide.csv"), "has 3 cells where the header names 2"),
    (data("quote.csv"), "quotation mark"),
    (data("kind.xlsx"), "unknown file type"),
    (data("same.jsonl"), "duplicate question id 'a'"),
    (data("odd.jsonl"), "QA.answer must be"),
    (data("dict.jsonl"), "QA.question must be"),
    (data("blank.jsonl"), "QA.question must be a non-empty string"),
    (data("words.jsonl"), "QA.keywords must be a list"),
    (data("folder"), "no data set None in folder"), (data("nowhere.jsonl"), "no such file or folder: nowhere.jsonl"),
    (data("data/typo"), "no such file or folder: data/typo"),
    (data("./typo"), "no such file or folder"),
    (data("file"), "unknown file type"),
    (at("--split", "forget99"), "split must be one of"), (at("--retain_split", "nothing"), "split must be one of"),
    # models
    (at("--model", "models/typo"), "no such folder: models/typo (and no hub is asked for a path)"),
    (at("--model", "./typo"), "no such folder: ./typo"), (at("--model", "/nowhere"), "no such folder: /nowhere"),
    (at("--model", "small:huge"), "unknown state 'huge'"), (at("--model", "file"), "is a file, and a part of a model"),
    (at("--model", "folder"), "config.json"), (at("--model", "runs/a/b"), "no such folder: runs/a/b"),
    (at("--model", "\x1b[2Jmodel/"), "\\x1b[2Jmodel"),
    # prompts
    (at("--prompt", "no hole"), "a template needs {question}"),
    (at("--prompt", "{question} {other}"), "a template needs {question}"),
    (at("--prompt", "{question.__class__}"), "a template needs {question}"),
    (at("--prompt", "{question!r:>999999999}"), "a template needs"),
    (at("--prompt", "\udcff {question}"), "is not UTF-8 text"), (at("--system", "\udcff"), "is not UTF-8 text"),
    (at("--system", "Hi."), "has no chat template"), (at("--name", "a\udc80"), "is not UTF-8 text"),
    ([*EVALUATE, "--prompt", "{question}", "--system", "x"], "give one of the two"),
    # folders
    (at("--out", "file"), "File exists"),
    (at("--out", "file/inside"), "Not a directory"),
    (at("--out", "/proc/none"), "none"),
    (at("--out", "a\0b"), "null"), (at("--out", "x" * 300), "File name too long"),
    (["report", "--folder", "nowhere"], "nowhere holds no run"), (["report", "--folder", "file"], "file"),
    (["report", "--folder", "folder"], "folder holds no run"),
    (["versus", "--runs", "one"], "compares at least two runs"),
    (["versus", "--runs", "nowhere,neither"], "nowhere holds no run"),
    (["versus", "--runs", ""], "compares at least two runs"),
    # config files
    (["unlearn", "--config", "nowhere.yaml"], "no config file 'nowhere.yaml'"),
    (["unlearn", "--config", "deep.yaml"], "Problems parsing config"),
    (["unlearn", "--config", "list.yaml"], "Unexpected config"), (["unlearn", "--config", "unknown.yaml"], "colour"),
    (["plan", "--config", "tag.yaml"], "could not determine a constructor"),
    (["plan", "--config"], "expected one argument"),
    # words
    (["evaluate"], "model"),
    (["evaluate", "--colour", "red"], "--colour red"),
    (["nonsense"], "'nonsense' is no command"),
    ([], "a command is needed"),
    (["plan", "--n"], "expected one argument"), (["plan", "--n", "\udcff"], "is not UTF-8 text"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items(): Path(name).write_text(text)
    Path("folder").mkdir()
    return tmp_path


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    "Whatever is wrong is said before any draw and any update."
    def worked(*args, **how): pytest.fail("work began")
    for name in ("probunlearn.loop.train_loop", "probunlearn.training.train_loop", "probunlearn.evaluation._fill"):
        monkeypatch.setattr(name, worked)


def said(words, capsys):
    "What a command says when it fails."
    try: found = main(words)
    except SystemExit as end:
        assert end.code == 2                    # the parser's own words, behind the usage
        found = " ".join(capsys.readouterr().err.rpartition("error: ")[2].split())
    assert isinstance(found, str) and found
    return found


def shown(case):
    words, sentence = case
    return re.sub(r"[^\w.,=+-]+", "_", f"{' '.join(words)[-40:]} {sentence[:20]}")


@pytest.mark.parametrize("words, sentence", CASES, ids=map(shown, CASES))
def test_one_sentence(words, sentence, here, capsys):
    found = said(words, capsys)
    assert sentence in found and "\n" not in found and "Traceback" not in found and "\x1b" not in found, found
    assert "nobody foresaw" not in found and not (here/"owned").exists()


def test_ctrl_c_says_that_the_same_line_goes_on(here, capsys, monkeypatch):
    def stopped(*args, **how): raise KeyboardInterrupt
    monkeypatch.setattr(probunlearn.cli, "evaluate", stopped)
    with pytest.raises(SystemExit) as end: main(EVALUATE)
    assert end.value.code == 130 and "stopped; the same line goes on" in capsys.readouterr().err


ODD = [
    (MemoryError("Unable to allocate 9 TiB"), "does not fit into memory"),
    (KeyError("n"), "KeyError: 'n' (nobody foresaw this"),
       (RecursionError("too deep"), "RecursionError"), (OSError(28, "No space left on device"), "No space left"),
       (RuntimeError("first\nsecond"), "first second"),
       (ValueError("a\x1b[31m"), "a\\x1b[31m"),
       (BrokenPipeError(), "BrokenPipeError")]


@pytest.mark.parametrize("error, sentence", ODD, ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "")
def test_whatever_happens_is_one_line(error, sentence, here, monkeypatch):
    def fails(*args, **how): raise error
    monkeypatch.setattr(probunlearn.cli, "evaluate", fails)
    found = main(EVALUATE)
    assert sentence in found and "\n" not in found


def test_the_way_to_an_error_is_shown_on_request(here, monkeypatch):
    monkeypatch.setenv("PROBUNLEARN_TRACEBACK", "1")
    with pytest.raises(ValueError): main(at("--n", "0"))


def test_plan_reads_the_data_too(here, capsys):
    assert main(["plan", "--data", "bare.jsonl"]) is None
    assert "1 of 1 records have no key words: give the data a column" in capsys.readouterr().out
    assert main(["plan", "--data", "keyed.jsonl"]) is None and "no key words" not in capsys.readouterr().out


def test_data_without_key_words_fails_before_the_model_is_loaded(here, monkeypatch):
    def loaded(*args, **how): pytest.fail("a model was loaded")
    for name in ("load_model", "small_model"): monkeypatch.setattr(probunlearn.cli, name, loaded)
    assert "give the data a column keywords" in main(data("bare.jsonl"))
