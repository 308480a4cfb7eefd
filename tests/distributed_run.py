"""What tests/test_distributed.py starts on two processes: torchrun --nproc_per_node 2 distributed_run.py FOLDER KIND"""
import json
import sys
from pathlib import Path

import torch.distributed as dist

from probunlearn.batches import processes
from probunlearn.data import fictional_authors
from probunlearn.models import save_lm, small_lm
from probunlearn.weights import lm_fingerprint, shard
from probunlearn.training import UnlearnConfig, unlearn

CONFIGS = dict(
    npo=dict(method="npo", beta=1, lambda_f=.5, lambda_r=-.1, entropy_on="own", accumulate=2),
    uneven=dict(method="grad_diff", batch_size=5, lambda_f=.1, entropy_on="answer", pack=True),
    logits=dict(method="undial", retain_loss="kl"),
    hidden=dict(method="rmu"))


def train(kind, sharded=False, **more):
    "(history, lm, tok) of a short run; the same on one process and on two."
    lm, tok = small_lm("full", device="cpu")
    if sharded: shard(lm)
    how = dict(steps=2, batch_size=4, lr=3e-4, schedule="constant", warmup=0) | CONFIGS[kind] | more
    return unlearn(lm, tok, fictional_authors("forget10")[:6], fictional_authors("retain90")[:20], UnlearnConfig(**how)), lm, tok


if __name__ == "__main__":
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    sharded = kind == "sharded"
    found = {k: train(k) for k in CONFIGS} if not sharded else {"npo": train("npo", True, checkpoint=str(folder/"state"))}
    result = {k: dict(rows=history.rows, lm=lm_fingerprint(lm)) for k, (history, lm, tok) in found.items()}
    for history, lm, tok in found.values(): save_lm(lm, tok, folder/"lm")
    if sharded: result["again"] = dict(rows=train("npo", True, checkpoint=str(folder/"state"))[0].rows)
    (folder/f"{processes()[0]}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
