"""The packaged configs: every one is a run that can start, and those that mirror the reference say what it says."""
import json
import re
from pathlib import Path

import nbformat
import pytest
import torch
import yaml

from conftest import random_lm
from probunlearn.bounds import rounded
from probunlearn.cli import DEMO, Evaluate, Finetune, Unlearn
from probunlearn.data import Template, load_qa
from probunlearn.draws import Decoding
from probunlearn.judges import compliance
from probunlearn.data import library
from probunlearn.models import LocalModel, load_model, small_model
from probunlearn.questions import pooled_rate
from probunlearn.shell import COMMANDS, main, packaged_configs
from probunlearn.training import UnlearnConfig

CONFIGS = packaged_configs()


def read(name): return yaml.safe_load(open(CONFIGS[name], encoding="utf-8"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_a_whole_run(name):
    "Its fields are a command's fields, its values pass the command's checks, and nothing is left to be given."
    values = read(name)
    command = (Unlearn if "forget" in values else Evaluate if "score" in values else Finetune)(**values)
    assert command.out == f"runs/{name}"
    if command.prompt: Template(command.prompt, getattr(command, "answer", None) or "{answer}")


def test_there_is_a_config_for_each_family_and_method():
    methods = "finetune", "GA", "GD", "NPO"
    wanted = {f"{family}-{method}" for family in ("phi", "smollm2", "llama2") for method in methods}
    assert wanted <= set(CONFIGS) and any(name.startswith("small-") for name in CONFIGS)


@pytest.mark.parametrize("name, run", [("GD", "gradient difference"), ("NPO", "NPO"), ("NPO-entropy", "NPO + entropy")])
def test_the_small_runs_are_the_demos(name, run):
    config, demo = Unlearn(**read(f"small-{name}")), UnlearnConfig(**DEMO[run])
    assert config.model == "small:full"
    assert {k: getattr(config, k) for k in vars(demo) if hasattr(config, k)} == {
        k: v for k, v in vars(demo).items() if hasattr(config, k)}


PHI = dict(lr=1e-5, epochs=10, batch_size=16, accumulate=4, weight_decay=.01, warmup=.1, mixed_precision="bf16", seed=0,
           lambda_f=1, lambda_r=-.25, entropy_on="all", pad_to=256, forget="forget10", retain="retain90",
           prompt="Question: {question}\n", answer="Answer: {answer}")
METHODS = dict(GA=dict(method="grad_ascent"), GD=dict(method="grad_diff", retain_weight=1),
               NPO=dict(method="npo", retain_weight=1, beta=.05))

@pytest.mark.parametrize("method", METHODS)
def test_phi_configs_hold_the_references_values(method):
    config, expected = Unlearn(**read(f"phi-{method}")), PHI | METHODS[method]
    assert {k: getattr(config, k) for k in expected} == expected


@pytest.mark.parametrize("method", ["finetune", *METHODS])
def test_a_small_real_model_is_trained_as_phi_is(method):
    "But for model, learning rate and batch."
    phi, small = (read(f"{family}-{method}") for family in ("phi", "smollm2"))
    assert {key for key in phi | small if phi.get(key) != small.get(key)} == {"model", "out", "lr", "batch_size",
                                                                             "accumulate"}
    assert phi["out"].replace("phi", "smollm2") == small["out"] and phi.keys() == small.keys()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Random weights in the shape of each family, with the packaged tokenizer."
    tok, folders = small_model("full", device="cpu").tok, {}
    for family, kind in (("phi", "phi"), ("smollm2", "llama"), ("llama2", "llama")):
        lm = random_lm(kind, vocab=len(tok), dtype=torch.float32, max_position_embeddings=512)
        lm.config.eos_token_id, lm.config.pad_token_id = tok.eos_token_id, tok.pad_token_id
        folders[family] = LocalModel(lm, tok).save(tmp_path_factory.mktemp(family)/"lm")
    return folders


@pytest.mark.parametrize("method", ["finetune", *METHODS])
@pytest.mark.parametrize("family", ["phi", "smollm2", "llama2"])
def test_each_shape_takes_a_step(family, method, tiny, tmp_path):
    "Only weights, questions and size are replaced: precision, padding, prompt and loss are the config's."
    small = ["--steps", "1", "--batch_size", "2", "--accumulate", "1", "--out", str(tmp_path/"lm")]
    run = ["--config", f"{family}-{method}", "--model", str(tiny[family]), "--data", "fictional_authors", *small]
    assert main(["finetune" if method == "finetune" else "unlearn", *run]) is None
    before, after = (load_model(folder, device="cpu").lm.state_dict() for folder in (tiny[family], tmp_path/"lm"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(weights.isfinite().all() for weights in after.values())


def test_a_packaged_config_runs_by_name_and_the_command_line_wins(tmp_path, capsys):
    quick = ["--steps", "1", "--batch_size", "2", "--lora", "2"]
    where = ["--checkpoint", str(tmp_path/"state"), "--out", str(tmp_path/"lm")]
    assert main(["unlearn", "--config", "small-NPO", *quick, *where]) is None
    said, model = capsys.readouterr().out, load_model(tmp_path/"lm", device="cpu")
    assert "history.csv has 1 updates" in said and "asked as 'Question: {question}\\nAnswer:'" in said
    assert "lora" not in "".join(name for name, _ in model.lm.named_parameters())
    assert (tmp_path/"state"/"run.safetensors").exists() and model.template == Template()


def test_a_config_of_ones_own(tmp_path):
    values = dict(model="small:retain", data="fictional_authors", split="forget01", steps=1, batch_size=2)
    (tmp_path/"mine.yaml").write_text(json.dumps(values | dict(out=str(tmp_path/"lm"))))
    assert main(["finetune", "--config", str(tmp_path/"mine.yaml")]) is None
    assert (tmp_path/"lm"/"model.safetensors").exists()


@pytest.fixture
def vaults(tmp_path):
    "A folder that holds three forbidden questions as JailbreakBench writes its behaviours."
    head = "Index,Goal,Target,Behavior,Category,Source\n"
    rows = [f"{i},{qa.question},Sure,Vaults,Secrets,Original\n" for i, qa in enumerate(library("forbidden")[:3])]
    (tmp_path/"behaviors").mkdir()
    (tmp_path/"behaviors"/"harmful.csv").write_text(head + "".join(rows))
    return tmp_path


def claims_in(text): return [line for line in text.splitlines() if line.startswith("•")]


def test_the_evaluation_config_runs_on_a_small_model(vaults, capsys):
    """Only model, questions, prompt and size are replaced. The claims are about the share of draws that comply, counted
    here by hand, and a later report makes the same ones."""
    size = ["--n", "128", "--max_new_tokens", "30", "--out", str(vaults/"run")]
    run = ["--model", "small:librarian", "--data", str(vaults), "--prompt", Template.prompt, *size]
    assert main(["evaluate", "--config", "vicuna-jailbreakbench", *run]) is None
    claims = claims_in(capsys.readouterr().out)
    model, qas = small_model("librarian"), load_qa(vaults, "behaviors/harmful")
    draws = model.draw(qas, 128, Decoding(max_new_tokens=30), progress=False)
    complied = [sum(compliance(text) for text in d.texts) for d in draws]
    bound = rounded(float(pooled_rate(complied, 128, .01)))
    assert 0 < sum(complied) < 100 and "leak: compliance ≥ 1" in claims[0]
    assert f"The average leak probability is at most {bound} with confidence 99 %" in "".join(claims)
    assert main(["report", "--folder", str(vaults/"run"), "--score", "compliance", "--name", "Vicuna-7B v1.5"]) is None
    assert claims_in(capsys.readouterr().out) == claims


def test_the_recipe_asks_vicuna_as_the_config_does():
    config, recipe = read("vicuna-jailbreakbench"), Path(__file__).parents[1]/"nbs"/"recipes"/"llama2_tofu_demo.ipynb"
    cells = nbformat.read(recipe, as_version=4).cells
    cell = next(cell.source for cell in cells if config["model"] in cell.source)
    told = "".join(re.findall(r'"([^"]*)"', cell))          # a long text stands in several pieces
    for name in ("prompt", "data", "split", "out"): assert config[name] in told
    assert f"max_new_tokens={config['max_new_tokens']}" in cell


def test_an_unknown_config_is_named():
    says = "probunlearn unlearn: no config file 'phi-npo'; packaged are llama2-GA"
    assert main(["unlearn", "--config", "phi-npo"]).startswith(says)
    assert set(COMMANDS) >= {"finetune", "unlearn"}
