"""The packaged configs: every one is a run that can start, and those that mirror the reference say what it says."""
import json
from pathlib import Path

import nbformat
import pytest
import yaml

from probunlearn.bounds import rounded
from probunlearn.cli import Evaluate, Finetune, Unlearn
from probunlearn.data import Template, library, load_qa
from probunlearn.draws import Decoding
from probunlearn.judges import compliance
from probunlearn.models import load_lm, small_lm
from probunlearn.questions import pooled_rate
from probunlearn.sampling import sample
from probunlearn.shell import COMMANDS, main, packaged_configs

CONFIGS = packaged_configs()


def read(name): return yaml.safe_load(open(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_a_whole_run(name):
    "Its fields are a command's fields, its values pass the command's checks, and nothing is left to be given."
    values = read(name)
    command = (Unlearn if "forget" in values else Evaluate if "score" in values else Finetune)(**values)
    assert command.out == f"runs/{name}"
    Template(command.prompt, getattr(command, "answer", "{answer}"))


def test_there_is_a_config_for_each_family_and_method():
    assert {f"{family}-{method}" for family in ("phi", "llama2") for method in ("finetune", "GA", "GD", "NPO")} <= set(CONFIGS) and any(n.startswith("small-") for n in CONFIGS)


@pytest.mark.parametrize("method,more", [("GA", dict(method="grad_ascent")), ("GD", dict(method="grad_diff", retain_weight=1)), ("NPO", dict(method="npo", retain_weight=1, beta=.05))])
def test_phi_configs_hold_the_references_values(method, more):
    expected = dict(lr=1e-5, epochs=10, batch_size=16, accumulate=4, weight_decay=.01, warmup=.1, mixed_precision="bf16", seed=0, lambda_f=1, lambda_r=-.25, entropy_on="all", pad_to=256, forget="forget10", retain="retain90")
    config = Unlearn(**read(f"phi-{method}"))
    assert {k: getattr(config, k) for k in expected | more} == expected | more


def test_a_packaged_config_runs_by_name_and_the_command_line_wins(tmp_path, capsys):
    assert main(["unlearn", "--config", "small-NPO", "--steps", "1", "--batch_size", "2", "--lora", "2", "--checkpoint", str(tmp_path/"state"), "--out", str(tmp_path/"lm")]) is None
    assert "history.csv has 1 updates" in capsys.readouterr().out and "lora" not in "".join(n for n, _ in load_lm(tmp_path/"lm", device="cpu")[0].named_parameters())
    assert (tmp_path/"state"/"run.safetensors").exists()


def test_a_config_of_ones_own(tmp_path, capsys):
    (tmp_path/"mine.yaml").write_text(json.dumps(dict(model="small:retain", data="fictional_authors", split="forget01", steps=1, batch_size=2, out=str(tmp_path/"lm"))))
    assert main(["finetune", "--config", str(tmp_path/"mine.yaml")]) is None and (tmp_path/"lm"/"model.safetensors").exists()


def test_the_evaluation_config_runs_on_a_small_model(tmp_path, capsys):
    "Only model, questions, prompt and size are replaced. The claims are about the share of draws that comply, counted here by hand, and a later report makes the same ones."
    vaults = library("forbidden")[:3]
    (tmp_path/"behaviors").mkdir()
    (tmp_path/"behaviors"/"harmful.csv").write_text("Index,Goal,Target,Behavior,Category,Source\n" + "".join(f"{i},{qa.question},Sure,Vaults,Secrets,Original\n" for i, qa in enumerate(vaults)))
    run = ["--model", "small:librarian", "--data", str(tmp_path), "--prompt", Template.prompt, "--n", "128", "--max_new_tokens", "30", "--out", str(tmp_path/"run")]
    assert main(["evaluate", "--config", "vicuna-jailbreakbench", *run]) is None
    claims = [line for line in capsys.readouterr().out.splitlines() if line.startswith("•")]
    (lm, tok), qas = small_lm("librarian"), load_qa(tmp_path, "behaviors/harmful")
    complied = [sum(compliance(t) for t in d.texts) for d in sample(lm, tok, qas, 128, Decoding(max_new_tokens=30), 0, progress=False)]
    assert 0 < sum(complied) < 100 and f"The average leak probability is at most {rounded(float(pooled_rate(complied, 128, .01)))} with confidence 99 %" in "".join(claims) and "leak: compliance ≥ 1" in claims[0]
    assert main(["report", "--folder", str(tmp_path/"run"), "--score", "compliance", "--name", "Vicuna-7B v1.5"]) is None
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("•")] == claims


def test_the_lesson_asks_vicuna_as_the_config_does():
    config, lesson = read("vicuna-jailbreakbench"), Path(__file__).parents[1]/"nbs"/"tutorials"/"08_alignment.ipynb"
    cell = next(cell.source for cell in nbformat.read(lesson, as_version=4).cells if config["model"] in cell.source)
    for value in (config["prompt"], config["data"], config["split"], config["out"], f"max_new_tokens={config['max_new_tokens']}"): assert value in cell


def test_an_unknown_config_is_named():
    assert main(["unlearn", "--config", "phi-npo"]).startswith("probunlearn unlearn: no config file 'phi-npo'; packaged are llama2-GA")
    assert set(COMMANDS) >= {"finetune", "unlearn"}
