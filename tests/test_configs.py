"""The packaged configs: every one is a run that can start, and those that mirror the reference say what it says."""
import json

import pytest
import yaml

from probunlearn.cli import Finetune, Unlearn
from probunlearn.models import load_lm
from probunlearn.shell import COMMANDS, main, packaged_configs

CONFIGS = packaged_configs()


def read(name): return yaml.safe_load(open(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_a_whole_run(name):
    "Its fields are a command's fields, its values pass the command's checks, and nothing is left to be given."
    command = (Finetune if name.endswith("finetune") else Unlearn)(**read(name))
    assert command.out == f"runs/{name}"
    if "{question}" in command.prompt: assert "{answer}" in command.answer


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


def test_an_unknown_config_is_named():
    assert main(["unlearn", "--config", "phi-npo"]).startswith("probunlearn unlearn: no config file 'phi-npo'; packaged are llama2-GA")
    assert set(COMMANDS) >= {"finetune", "unlearn"}
