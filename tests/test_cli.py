"""The command line: help for every option, errors in one line before any work, and the whole way on four records."""
import importlib
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import probunlearn.cli
from probunlearn.choices import LISTED, as_choices
from probunlearn.data import fictional_authors
from probunlearn.shell import COMMANDS, main


@pytest.fixture
def data(tmp_path):
    "A folder with two data sets of one's own: four records without key words to forget, four to keep."
    for name, qas in (("mine", fictional_authors("forget01")), ("kept", fictional_authors("retain90")[:4])):
        (tmp_path/f"{name}.jsonl").write_text("\n".join(json.dumps(dict(question=qa.question, answer=qa.answer)) for qa in qas))
    return tmp_path


@pytest.fixture
def no_model(monkeypatch):
    for name in ("load_model", "small_model"): monkeypatch.setattr(probunlearn.cli, name, lambda *a, **k: pytest.fail("a model was loaded"))


def command(name):
    "The data class of a command."
    module, kind, *_ = COMMANDS[name]
    return getattr(importlib.import_module(f"probunlearn.{module}"), kind)


def words(**options): return [w for name, value in options.items() for w in (f"--{name}", str(value))]


# --- help -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name, capsys):
    with pytest.raises(SystemExit) as e: main([name, "--help"])
    shown = capsys.readouterr().out
    explained = {name: " ".join(text.split()) for name, text in re.findall(r"^  --(\w+)(.*?)(?=^  --|\Z)", shown, re.M | re.S)}
    assert e.value.code == 0 and set(explained) == {f.name for f in fields(command(name))} | {"config", "print_config"} and "<function" not in shown
    for option in ("config", "print_config"): assert len(explained.pop(option).split()) > 5
    for option, text in explained.items(): assert re.match(r"(?:[A-Z_0-9]+|\{true,false\}) [^(]\S* \S+.*\(", text), f"--{option} has no help: {text!r}"
    assert command(name).__doc__ == COMMANDS[name][2] and COMMANDS[name][2] in " ".join(shown.split()) and f"probunlearn {name}" in shown.split("examples:")[1]


def test_help_for_all_commands_comes_without_torch():
    done = subprocess.run([sys.executable, "-c", "import sys; from probunlearn.shell import main; code = main(['--help']); sys.exit(code or 'torch' in sys.modules)"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)


def test_the_entry_point_is_installed():
    done = subprocess.run([Path(sys.executable).parent/"probunlearn", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS) and not done.stderr


# --- errors ---------------------------------------------------------------------------------------------------------------------------------

def evaluation(**how): return ["evaluate", *words(**dict(model="small:full", data="fictional_authors", split="forget01", out="run", n=4) | how)]
def training(command, **how): return [command, *words(**dict(model="small:full", data="fictional_authors", out="trained", steps=1) | how)]

@pytest.mark.parametrize("args, names", [
    (evaluation(data="nowhere.jsonl"), "nowhere.jsonl"), (evaluation(split="forget99"), "forget99"), (evaluation(retain_split="kept"), "kept"), (evaluation(score="bleu"), "bleu"),
    (evaluation(alpha=1), "alpha"), (evaluation(top_p=0), "top_p"), (evaluation(temperature=-1), "temperature"), (evaluation(max_new_tokens=0), "max_new_tokens"),
    (training("finetune", data="nowhere.csv"), "nowhere.csv"), (training("finetune", lr=-1), "lr"), (training("finetune", schedule="steep"), "steep"),
    (training("unlearn", forget="forget99"), "forget99"), (training("unlearn", retain="nothing"), "nothing"), (training("unlearn", method="magic"), "magic"),
    (training("unlearn", entropy_on="them"), "them")], ids=lambda v: None if isinstance(v, str) else v[0])
def test_what_is_wrong_is_said_in_one_line_before_a_model_is_loaded(args, names, no_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = main(args)
    assert isinstance(said, str) and said.startswith(f"probunlearn {args[0]}: ") and names in said and "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how, names", [(dict(n=0), "n"), (dict(leak_at=0), "leak_at"), (dict(adaptive=2), "confidence")], ids=str)
def test_bad_values_are_refused_before_a_model_is_loaded(how, names, tmp_path, monkeypatch, no_model):
    monkeypatch.chdir(tmp_path)
    said = main(evaluation(**how))
    assert isinstance(said, str) and names in said and "\n" not in said and not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("args", [evaluation(model="./nowhere"), evaluation(model="small:half"), training("finetune", model="./nowhere")], ids=" ".join)
def test_a_model_that_is_not_there(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = main(args)
    assert isinstance(said, str) and re.search("nowhere|half", said) and "\n" not in said


@pytest.mark.parametrize("command", ["finetune", "unlearn", "evaluate"])
def test_a_place_that_cannot_be_written_fails_before_a_model_is_loaded(command, no_model, tmp_path):
    (tmp_path/"taken").write_text("a file, not a folder")
    said = main(evaluation(out=tmp_path/"taken") if command == "evaluate" else training(command, out=tmp_path/"taken"/"deeper"))
    assert isinstance(said, str) and "taken" in said


@pytest.mark.parametrize("args", [["evaluate"], evaluation(n="many"), evaluation(colour="red"), ["forget"], []], ids=" ".join)
def test_words_that_are_no_options(args, no_model, capsys):
    with pytest.raises(SystemExit) as e: main(args)
    said = capsys.readouterr().err
    assert e.value.code == 2 and "error" in said and "Traceback" not in said


# --- the whole way --------------------------------------------------------------------------------------------------------------------------

def test_records_of_ones_own_by_another_score(data, capsys):
    args = ["evaluate", *words(model="small:retain", data=data/"mine.jsonl", out=data/"run", n=8, score="rouge_l_recall", leak_at=.5, max_new_tokens=12)]
    for _ in range(2):                                                          # the second time from the run folder
        assert main(args) is None
        assert {p.suffix for p in (data/"run").glob("report.*")} == {".html", ".json", ".md", ".png"}
        said, d = capsys.readouterr().out, json.loads((data/"run"/"report.json").read_text())
        assert all(claim in said for claim in d["claims"]) and "report.html" in said and d["score"] == "ROUGE-L recall" and len(d["questions"]) == 4
    args[args.index("--n") + 1] = "9"                                           # the run grows, and says so
    assert main(args) is None and "anytime" in capsys.readouterr().out
    args[args.index("--seed") + 1 if "--seed" in args else len(args):] = ["--seed", "1"]
    assert "another seed: 0 there, 1 now" in main(args)


def test_multiple_choice(data, capsys):
    rows = [dict(question=qa.question, choices=qa.choices, answer=qa.choices.index(qa.answer)) for qa in (as_choices(qa, k=4) for qa in fictional_authors("forget01"))]
    (data/"wmdp.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    how = dict(model="small:full", data=data/"wmdp.jsonl", out=data/"letters", n=64, max_new_tokens=4)
    assert "add --score right_letter" in main(["evaluate", *words(**how)])
    capsys.readouterr()
    assert main(["evaluate", *words(**how, score="right_letter")]) is None
    said, report = capsys.readouterr().out, json.loads((data/"letters"/"report.json").read_text())
    assert "4 questions by letter" in said and "4 questions by text: likeliest right 1," in said and report["score"] == "right_letter"
    assert re.search(r"\d+ of 256 draws choose no option", said)
    run = json.loads((data/"letters"/"run.json").read_text())
    assert run["settings"]["template"]["prompt"] == LISTED.prompt and run["questions"]["forget"][0]["question"].endswith(f"\nD. {rows[0]['choices'][3]}")
    assert main(["report", *words(folder=data/"letters", score="right_letter", name="small:full")]) is None and report["claims"][0] in capsys.readouterr().out


def test_finetune_unlearn_evaluate(data):
    taught, unlearned = data/"taught", data/"unlearned"
    small = words(steps=2, batch_size=2)
    assert main(["finetune", *words(model="small:retain", data=data, split="mine", out=taught), *small]) is None
    assert main(["unlearn", *words(model=taught, data=data, forget="mine", retain="kept", out=unlearned, method="grad_diff"), *small]) is None
    assert main(["evaluate", *words(model=unlearned, data=data, split="mine", retain_split="kept", out=data/"run", n=4, score="rouge_l_recall", max_new_tokens=8)]) is None
    settings = json.loads((data/"run"/"run.json").read_text())["settings"]
    assert settings["decoding"]["max_new_tokens"] == 8 and all((d/"model.safetensors").exists() for d in (taught, unlearned))
    assert "retain" in json.loads((data/"run"/"report.json").read_text())["summary"]


def test_what_stands_beside_a_config_wins_wherever_it_stands(tmp_path, monkeypatch):
    file, seen = tmp_path/"c.yaml", []
    file.write_text("n: 32\nquestions: 5\n")
    monkeypatch.setattr(command("plan"), "run", lambda self: seen.append((self.n, self.questions)))
    for line in (["--n", "16", "--config", str(file)], ["--config", str(file), "--n", "16"], ["--n", "16", f"--config={file}"]): main(["plan", *line])
    assert seen == [(16, 5)] * 3


@pytest.mark.parametrize("line, says", [(["plan", "--questions", "0"], "questions must be a whole number >= 1, got 0"), (["demo", "--n", "0"], "n must be a whole number >= 1, got 0")])
def test_counts_of_nothing(line, says, no_model): assert says in main(line)
