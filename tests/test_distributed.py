"""Two processes compute what one does; a killed run ends as an uninterrupted one."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distributed_run import CONFIGS, train
from probunlearn.checkpoints import load_checkpoint, read_notes, save_checkpoint
from probunlearn.data import fictional_authors
from probunlearn.files import DISK
from probunlearn.loop import TrainConfig, finetune
from probunlearn.models import add_lora, load_model, small_model
from probunlearn.training import UnlearnConfig, unlearn
from probunlearn.weights import lm_fingerprint

FEW, FEW_KEPT = fictional_authors("forget01"), fictional_authors("retain90")[:4]
HERE = Path(__file__).parent
ENV = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(HERE.parent))


def two_processes(folder, kind):
    "What both processes of a torchrun found."
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(HERE/"distributed_run.py"), str(folder), kind]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder/f"{i}.json").read_text()) for i in (0, 1)]


def test_two_processes_give_the_losses_of_one(tmp_path):
    """Every kind of loss: per token, per record, from all logits, from hidden states; with batches that don't divide,
    packing, accumulation and own answers."""
    first, second = two_processes(tmp_path, "plain")
    assert first == second                              # both know the whole batch's loss and have the same weights
    for kind in CONFIGS:
        for row, other in zip(train(kind)[0].rows, first[kind]["rows"], strict=True):
            assert other == pytest.approx(row, abs=1e-4, rel=1e-4), kind        # grad_norm is among them


@pytest.mark.slow
def test_a_sharded_model_trains_saves_and_goes_on(tmp_path):
    "fully_shard on two CPU processes: the losses of one, a folder that loads, a checkpoint that is taken up."
    first, second = two_processes(tmp_path, "sharded")
    assert first == second
    history, model = train("npo")
    for row, other, again in zip(history.rows, first["npo"]["rows"], first["again"]["rows"], strict=True):
        assert other == pytest.approx(row, abs=1e-4, rel=1e-4) and again == other
    saved = load_model(tmp_path/"lm", device="cpu").lm
    assert lm_fingerprint(saved) == first["npo"]["lm"]
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(saved.parameters(), model.lm.parameters(), strict=True))


def killable_run(folder):
    "(fingerprint of the weights, updates): adapters, cosine schedule, entropy on answers drawn anew at each update."
    model = add_lora(small_model("full", device="cpu"), rank=4)
    config = UnlearnConfig(steps=12, batch_size=2, lr=1e-3, schedule="cosine", lambda_f=.1, entropy_on="draws",
                           checkpoint=str(folder), checkpoint_every=3)
    history = unlearn(model, fictional_authors("forget01"), fictional_authors("retain90")[:20], config)
    return lm_fingerprint(model.lm), len(history.rows)


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    "SIGKILL in the middle, then the same call again."
    child, file = os.fork(), tmp_path/"cut"/"run.safetensors"
    if not child:
        try: killable_run(tmp_path/"cut")
        finally: os._exit(0)
    while not file.exists() and os.waitpid(child, os.WNOHANG) == (0, 0): time.sleep(.01)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert 0 < len(read_notes(file)["rows"]) < 12
    assert killable_run(tmp_path/"cut") == killable_run(tmp_path/"whole")


ANOTHER = [(dict(lr=1e-3), "another lr: 1e-05 there, 0.001 now"), (dict(method="grad_diff"), "another method"),
           (dict(lambda_f=1.), "another lambda_f")]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    def run(**how):
        config = UnlearnConfig(**dict(steps=1, batch_size=2, checkpoint=str(tmp_path)) | how)
        return unlearn(small_model("full", device="cpu"), FEW, FEW_KEPT, config)
    run()
    for how, match in ANOTHER:
        with pytest.raises(ValueError, match=match): run(**how)
    run(tracker=None, checkpoint_every=7)               # shapes no result


def test_writers_at_once_do_not_meet_and_leave_nothing_behind(tmp_path):
    "Two processes write the same checkpoint again and again: it is whole at all times."
    lm, file = small_model("full", device="cpu").lm, tmp_path/"run.safetensors"
    optimizer = torch.optim.AdamW(lm.parameters())
    def write(writer):
        for step in range(8): save_checkpoint(file, lm, optimizer, notes=dict(writer=writer, step=step))
    child = os.fork()
    if not child:
        try: write("child")
        except BaseException: os._exit(1)
        os._exit(0)
    write("parent")
    assert os.waitpid(child, 0)[1] == 0
    assert read_notes(file)["step"] == 7 and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    lm, file = small_model("full", device="cpu").lm, tmp_path/"run.safetensors"
    optimizer = torch.optim.AdamW(lm.parameters())
    save_checkpoint(file, lm, optimizer, notes=dict(step=1))
    def full(file): raise OSError(28, "No space left on device")
    monkeypatch.setattr(DISK, "sync", full)
    with pytest.raises(OSError, match="could not be written .*No space left.*; what was there is whole"):
        save_checkpoint(file, lm, optimizer, notes=dict(step=2))
    assert read_notes(file) == dict(step=1) and [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_breaks_leaves_the_last_good_checkpoint(tmp_path, broken):
    "A NaN after update 3: the file is that of update 2, and its weights are finite."
    file, model = tmp_path/"run.safetensors", small_model("retain", device="cpu")
    config = TrainConfig(steps=8, batch_size=2, lr=1e-4, checkpoint=str(tmp_path), checkpoint_every=2, probe_every=3)
    def poison(model):
        weight = model.lm.lm_head.weight
        if broken == "loss": weight.data[0, 0] = torch.nan
        else: weight.register_hook(lambda g: g * torch.inf)
        return {}
    match = rf"the {broken} is .* at update 4.*the last good checkpoint is .*run.safetensors"
    with pytest.raises(FloatingPointError, match=match): finetune(model, FEW, config, probe=poison)
    fresh = small_model("retain", device="cpu").lm
    load_checkpoint(file, fresh, torch.optim.AdamW(fresh.parameters()))
    assert len(read_notes(file)["rows"]) == 2 and all(p.isfinite().all() for p in fresh.parameters())
