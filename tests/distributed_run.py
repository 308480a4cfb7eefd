"""What tests/test_distributed.py starts on two processes: torchrun --nproc_per_node 2 distributed_run.py FOLDER KIND"""
import json
import sys
from pathlib import Path

import torch.distributed as dist

from probunlearn.batches import processes
from probunlearn.data import fictional_authors
from probunlearn.models import shard, small_model
from probunlearn.training import UnlearnConfig, unlearn
from probunlearn.weights import lm_fingerprint

CONFIGS = dict(
    npo=dict(method="npo", beta=1, lambda_f=.5, lambda_r=-.1, entropy_on="own", accumulate=2),
    uneven=dict(method="grad_diff", batch_size=5, lambda_f=.1, entropy_on="answer", pack=True),
    logits=dict(method="undial", retain_loss="kl"),
    hidden=dict(method="rmu"))


def train(kind, sharded=False, **more):
    "(history, model) of a short run; the same on one process and on two."
    model = small_model("full", device="cpu")
    if sharded: model = shard(model)
    how = dict(steps=2, batch_size=4, lr=3e-4, schedule="constant", warmup=0) | CONFIGS[kind] | more
    forget, retain = fictional_authors("forget10")[:6], fictional_authors("retain90")[:20]
    return unlearn(model, forget, retain, UnlearnConfig(**how)), model


def found(folder, sharded):
    "What each run measured, and the fingerprint of its weights; models are saved as they come."
    result = {}
    for kind in ("npo",) if sharded else CONFIGS:
        history, model = train(kind, sharded, **dict(checkpoint=str(folder/"state")) if sharded else {})
        result[kind] = dict(rows=history.rows, lm=lm_fingerprint(model.lm))
        model.save(folder/"lm")
    if sharded: result["again"] = dict(rows=train("npo", True, checkpoint=str(folder/"state"))[0].rows)
    return result


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result = found(folder, sys.argv[2] == "sharded")
    (folder/f"{processes()[0]}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
