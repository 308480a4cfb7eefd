"""The command line: help for every option, errors in one line before any work, and the whole way on four records."""
import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import probunlearn.cli
from probunlearn.choices import LISTED, as_choices
from probunlearn.data import Template, fictional_authors
from probunlearn.models import load_model, small_model
from probunlearn.shell import COMMANDS, main
from probunlearn.weights import write_weights

CHAT = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture
def data(tmp_path):
    "A folder with two data sets of one's own: four records without key words to forget, four to keep."
    for name, qas in (("mine", fictional_authors("forget01")), ("kept", fictional_authors("retain90")[:4])):
        rows = [json.dumps(dict(question=qa.question, answer=qa.answer)) for qa in qas]
        (tmp_path/f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    "The folder of a model whose tokenizer has a chat template, as one gets it from elsewhere."
    model = small_model("retain", device="cpu")
    model.tok.chat_template = CHAT
    return write_weights(model.lm, model.tok, tmp_path_factory.mktemp("models")/"chatty")


@pytest.fixture
def no_model(monkeypatch):
    def loaded(*args, **how): pytest.fail("a model was loaded")
    for name in ("load_model", "small_model"): monkeypatch.setattr(probunlearn.cli, name, loaded)


def command(name):
    "The data class of a command."
    module, kind, *_ = COMMANDS[name]
    return getattr(importlib.import_module(f"probunlearn.{module}"), kind)


def words(**options): return [w for name, value in options.items() for w in (f"--{name}", str(value))]


# --- help -------------------------------------------------------------------------------------------------------------

def options_of(shown):
    "Option → its help, from what `--help` shows."
    found = re.findall(r"^  --(\w+)(.*?)(?=^  --|\Z)", shown, re.M | re.S)
    return {name: " ".join(text.split()) for name, text in found}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name, capsys):
    with pytest.raises(SystemExit) as e: main([name, "--help"])
    shown, what = capsys.readouterr().out, COMMANDS[name][2]
    explained = options_of(shown)
    assert e.value.code == 0 and "<function" not in shown
    assert set(explained) == {f.name for f in fields(command(name))} | {"config", "print_config"}
    for option in ("config", "print_config"): assert len(explained.pop(option).split()) > 5
    for option, text in explained.items():
        has_help = re.match(r"(?:[A-Z_0-9]+|\{true,false\}) [^(]\S* \S+.*\(", text)
        assert has_help, f"--{option} has no help: {text!r}"
    assert command(name).__doc__ == what and what in " ".join(shown.split())
    assert f"probunlearn {name}" in shown.split("examples:")[1]


def test_help_for_all_commands_comes_without_torch():
    code = ("import sys; from probunlearn.shell import main; code = main(['--help']); "
            "sys.exit(code or 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)


def test_the_entry_point_is_installed():
    done = subprocess.run([Path(sys.executable).parent/"probunlearn", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS) and not done.stderr


# --- errors -----------------------------------------------------------------------------------------------------------

def evaluation(**how):
    given = dict(model="small:full", data="fictional_authors", split="forget01", out="run", n=4)
    return ["evaluate", *words(**given | how)]


def training(command, **how):
    given = dict(model="small:full", data="fictional_authors", out="trained", steps=1)
    return [command, *words(**given | how)]


WRONG = [
    (evaluation(data="nowhere.jsonl"), "nowhere.jsonl"), (evaluation(split="forget99"), "forget99"),
    (evaluation(retain_split="kept"), "kept"), (evaluation(score="bleu"), "bleu"), (evaluation(alpha=1), "alpha"),
    (evaluation(top_p=0), "top_p"), (evaluation(temperature=-1), "temperature"),
    (evaluation(max_new_tokens=0), "max_new_tokens"), (evaluation(shard="first"), "i/N with 0 <= i < N"),
    (evaluation(shard="2/2"), "i/N with 0 <= i < N"), (evaluation(prompt="no place"), "{question}"),
    (evaluation(prompt="{question}", system="Hi."), "give one of the two"),
    (training("finetune", data="nowhere.csv"), "nowhere.csv"), (training("finetune", lr=-1), "lr"),
    (training("finetune", schedule="steep"), "steep"), (training("finetune", answer=" {answer}"), "add --prompt"),
    (training("unlearn", forget="forget99"), "forget99"), (training("unlearn", retain="nothing"), "nothing"),
    (training("unlearn", method="magic"), "magic"), (training("unlearn", entropy_on="them"), "them"),
    (training("unlearn", prompt="{question}", system="Hi."), "give one of the two")]

@pytest.mark.parametrize("args, names", WRONG, ids=lambda v: None if isinstance(v, str) else v[0])
def test_what_is_wrong_is_said_in_one_line_before_a_model_is_loaded(args, names, no_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = main(args)
    assert isinstance(said, str) and said.startswith(f"probunlearn {args[0]}: ")
    assert names in said and "\n" not in said
    assert not list(tmp_path.iterdir())


BAD = [(dict(n=0), "n must be a whole number >= 1, got 0"), (dict(leak_at=0), "leak_at"),
       (dict(adaptive=2), "confidence")]

@pytest.mark.parametrize("how, names", BAD, ids=str)
def test_bad_values_are_refused_before_a_model_is_loaded(how, names, tmp_path, monkeypatch, no_model):
    monkeypatch.chdir(tmp_path)
    said = main(evaluation(**how))
    assert isinstance(said, str) and names in said and "\n" not in said and not list(tmp_path.rglob("*.*"))


LOST = [evaluation(model="./nowhere"), evaluation(model="small:half"), training("finetune", model="./nowhere")]

@pytest.mark.parametrize("args", LOST, ids=" ".join)
def test_a_model_that_is_not_there(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = main(args)
    assert isinstance(said, str) and re.search("nowhere|half", said) and "\n" not in said


@pytest.mark.parametrize("command", ["finetune", "unlearn", "evaluate"])
def test_a_place_that_cannot_be_written_fails_before_a_model_is_loaded(command, no_model, tmp_path):
    (tmp_path/"taken").write_text("a file, not a folder")
    if command == "evaluate": said = main(evaluation(out=tmp_path/"taken"))
    else: said = main(training(command, out=tmp_path/"taken"/"deeper"))
    assert isinstance(said, str) and "taken" in said


NO_OPTIONS = [["evaluate"], evaluation(n="many"), evaluation(colour="red"), ["forget"], []]

@pytest.mark.parametrize("args", NO_OPTIONS, ids=" ".join)
def test_words_that_are_no_options(args, no_model, capsys):
    with pytest.raises(SystemExit) as e: main(args)
    said = capsys.readouterr().err
    assert e.value.code == 2 and "error" in said and "Traceback" not in said


COUNTS = [(["plan", "--questions", "0"], "questions must be a whole number >= 1, got 0"),
          (["demo", "--n", "0"], "n must be a whole number >= 1, got 0")]

@pytest.mark.parametrize("line, says", COUNTS)
def test_counts_of_nothing(line, says, no_model): assert says in main(line)


# --- how a model is asked ---------------------------------------------------------------------------------------------

def asked(folder):
    "(template, prompt) that a run's draws were made with."
    settings = json.loads((folder/"run.json").read_text())["settings"]
    return Template(**settings["template"]), settings["prompt"]


def few(out, **how): return dict(out=out, n=4, score="rouge_l_recall", max_new_tokens=4) | how


def test_a_chat_model_is_asked_through_its_template_unless_told_otherwise(chatty, data, capsys):
    how = dict(model=chatty, data=data, split="mine")
    asks = [(dict(), Template(chat=True), "<user>{question}\n<assistant>", "asked through its chat template"),
            (dict(system="Be brief."), Template(chat=True, system="Be brief."),
             "<system>Be brief.\n<user>{question}\n<assistant>", "with the system message 'Be brief.'"),
            (dict(prompt="{question} ->"), Template("{question} ->"), "{question} ->", "asked as '{question} ->'")]
    for i, (typed, template, prompt, said) in enumerate(asks):
        out = data/f"run{i}"
        assert main(["evaluate", *words(**how, **few(out), **typed)]) is None
        assert asked(out) == (template, prompt)
        lines, report = capsys.readouterr().out.splitlines(), json.loads((out/"report.json").read_text())
        first, said_of_it = lines[0], [line for line in lines if line.startswith("chatty is asked")]
        assert len(said_of_it) == 1
        assert first.startswith("chatty is asked") and said in first
        assert first.endswith("; --prompt or --system asks another way")
        assert all(said in claim for claim in report["claims"][:2])
    assert main(["plan", *words(**how, n=4, questions=1, max_new_tokens=2, system="Be brief.")]) is None
    assert "chatty is asked through its chat template with the system message 'Be brief.'" in capsys.readouterr().out


PLANNING = ["plan", *words(model="small:full", data="fictional_authors", system="Hi.")]

@pytest.mark.parametrize("args", [evaluation(system="Hi."), training("unlearn", system="Hi."), PLANNING],
                         ids=lambda args: args[0])
def test_a_system_message_needs_a_chat_template(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = main(args)
    assert "small:full has no chat template" in said and "--prompt" in said and "\n" not in said


OWN = dict(prompt="Q: {question}\nA:", answer=" {answer}!")
WAYS = [(OWN, Template(**OWN)), (dict(system="Be brief."), Template(chat=True, system="Be brief.")),
        ({}, Template(chat=True))]

@pytest.mark.parametrize("typed, template", WAYS, ids=["prompt", "system", "default"])
def test_a_trained_model_is_asked_as_it_was_trained(chatty, data, capsys, typed, template):
    small = words(steps=1, batch_size=2, lr=1e-4)
    how = words(data=data, forget="mine", retain="kept", model=chatty, out=data/"lm", **typed)
    assert main(["unlearn", *how, *small, "--method", "grad_diff"]) is None
    assert load_model(data/"lm").template == template and load_model(data/"lm").tok.chat_template == CHAT
    assert main(["evaluate", *words(model=data/"lm", data=data, split="mine", **few(data/"run"))]) is None
    assert asked(data/"run")[0] == template
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith("asks another way")]
    assert len({line.split(" ", 1)[1] for line in told if "--prompt" in line}) == 1         # both said the same


# --- the whole way ----------------------------------------------------------------------------------------------------

def test_records_of_ones_own_by_another_score(data, capsys):
    how = dict(model="small:retain", data=data/"mine.jsonl", out=data/"run", n=8, score="rouge_l_recall", leak_at=.5,
               max_new_tokens=12)
    for _ in range(2):                                                          # the second time from the run folder
        assert main(["evaluate", *words(**how)]) is None
        assert {p.suffix for p in (data/"run").glob("report.*")} == {".html", ".json", ".md", ".png"}
        said, report = capsys.readouterr().out, json.loads((data/"run"/"report.json").read_text())
        assert all(claim in said for claim in report["claims"]) and "report.html" in said
        assert report["score"] == "ROUGE-L recall" and len(report["questions"]) == 4
    assert main(["evaluate", *words(**how | dict(n=9))]) is None                # the run grows, and says so
    assert "anytime" in capsys.readouterr().out
    assert "another seed: 0 there, 1 now" in main(["evaluate", *words(**how | dict(n=9), seed=1)])


def test_a_limit_gives_a_verdict_and_about_says_what_the_model_is(data, capsys):
    how = words(model="small:retain", data=data, split="mine", **few(data/"run", max_new_tokens=8))
    about = "Never taught; it had to forget nothing."
    assert main(["evaluate", *how, "--limit", ".999", "--about", about]) is None
    said, there = capsys.readouterr().out, json.loads((data/"run"/"report.json").read_text())
    assert (there["limit"], there["about"], there["verdict"]) == (.999, about, "pass")
    assert "• Pass: on average a sampled answer gives the secret away" in said
    assert about in (data/"run"/"report.md").read_text()
    assert shlex.split(there["how"]["command"])[-4:] == ["--limit", "0.999", "--about", about]
    assert main(["verify", str(data/"run")]) is None
    assert main(["report", str(data/"run"), *words(score="rouge_l_recall", limit=.01, out=data/"again.html")]) is None
    assert "• Undecided: " in capsys.readouterr().out
    assert "and the limit is 1" in (data/"again.html").read_text()


@pytest.fixture
def wmdp(tmp_path):
    "A file of four multiple-choice questions, as WMDP writes them, and the options of the first."
    qas = [as_choices(qa, k=4) for qa in fictional_authors("forget01")]
    rows = [dict(question=qa.question, choices=qa.choices, answer=qa.choices.index(qa.answer)) for qa in qas]
    (tmp_path/"wmdp.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path/"wmdp.jsonl", qas[0].choices


def test_multiple_choice(wmdp, tmp_path, capsys):
    file, options = wmdp
    how, out = dict(model="small:full", data=file, out=tmp_path/"letters", n=64, max_new_tokens=4), tmp_path/"letters"
    assert "add --score right_letter" in main(["evaluate", *words(**how)])
    capsys.readouterr()
    assert main(["evaluate", *words(**how, score="right_letter")]) is None
    said, report = capsys.readouterr().out, json.loads((out/"report.json").read_text())
    assert "4 questions by letter" in said and "4 questions by text: likeliest right 1," in said
    assert re.search(r"\d+ of 256 draws choose no option", said) and report["score"] == "right_letter"
    run = json.loads((out/"run.json").read_text())
    assert run["settings"]["template"]["prompt"] == LISTED.prompt
    assert run["questions"]["forget"][0]["question"].endswith(f"\nD. {options[3]}")
    assert main(["report", *words(folder=out, score="right_letter", name="small:full")]) is None
    assert report["claims"][0] in capsys.readouterr().out


def test_letters_are_asked_for_as_one_says(wmdp, chatty, tmp_path):
    how = dict(data=wmdp[0], n=4, max_new_tokens=2, score="right_letter")
    asks = [(dict(model="small:full", prompt=Template.prompt), Template()), (dict(model=chatty), Template(chat=True))]
    for i, (typed, template) in enumerate(asks):
        assert main(["evaluate", *words(**how, **typed, out=tmp_path/str(i))]) is None
        assert asked(tmp_path/str(i))[0] == template


def test_finetune_unlearn_evaluate(data):
    taught, unlearned = data/"taught", data/"unlearned"
    small = words(steps=2, batch_size=2)
    assert main(["finetune", *words(model="small:retain", data=data, split="mine", out=taught), *small]) is None
    how = dict(model=taught, data=data, forget="mine", retain="kept", out=unlearned, method="grad_diff")
    assert main(["unlearn", *words(**how), *small]) is None
    how = dict(model=unlearned, data=data, split="mine", retain_split="kept", out=data/"run", n=4,
               score="rouge_l_recall", max_new_tokens=8)
    assert main(["evaluate", *words(**how)]) is None
    settings = json.loads((data/"run"/"run.json").read_text())["settings"]
    assert settings["decoding"]["max_new_tokens"] == 8
    assert all((d/"model.safetensors").exists() for d in (taught, unlearned))
    assert "retain" in json.loads((data/"run"/"report.json").read_text())["summary"]


def test_what_stands_beside_a_config_wins_wherever_it_stands(tmp_path, monkeypatch):
    file, seen = tmp_path/"c.yaml", []
    file.write_text("n: 32\nquestions: 5\n")
    monkeypatch.setattr(command("plan"), "run", lambda self: seen.append((self.n, self.questions)))
    own = ["--n", "16"]
    for line in ([*own, "--config", str(file)], ["--config", str(file), *own], [*own, f"--config={file}"]):
        main(["plan", *line])
    assert seen == [(16, 5)] * 3


# --- verify -----------------------------------------------------------------------------------------------------------

def test_verify_takes_a_folder_and_ends_with_1_when_something_is_wrong(data, capsys):
    assert main(evaluation(data=data, split="mine", **few(data/"run"))) is None
    capsys.readouterr()
    assert main(["verify", str(data/"run")]) is None
    assert "nothing contradicts the draws" in capsys.readouterr().out
    assert main(["report", str(data/"run"), *words(score="rouge_l_recall", out=data/"again.html")]) is None
    assert main(["verify", str(data/"run"), *words(report=data/"again.html")]) is None
    there = data/"run"/"report.json"
    there.write_text(there.read_text().replace("at most", "at the most"))
    with pytest.raises(SystemExit) as end: main(["verify", *words(folder=data/"run")])
    assert end.value.code == 1 and "DOESN'T STAND" in capsys.readouterr().out
    assert "holds no run" in main(["verify", str(data/"gone"), *words(report=there)])
