"""The fused head and the unlearning step against the reference trainer's formulas and Liger's fallback.

python benchmarks/training.py [--bf16] [--only head|step]

Each way runs in a process of its own: CPU seconds of one thread, and peak memory above what the process held before.
The step needs TOFU's files in the folder that PROBUNLEARN_TEST_DATA names.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from probunlearn.batches import pad_batch
from probunlearn.head import answer_stats, linear_stats
from probunlearn.losses import answer_mean, answer_sum, entropy, mean_entropy, npo

BATCH = 16          # sequences
LENGTH = 256        # tokens of each
ANSWER = 38         # of them, those of the answer
VOCAB = 51_200      # words
SIZE = 256          # width of the hidden states
LAMBDA_F, LAMBDA_R, BETA = 1., -.25, .05


def peak(): # bytes, the most this process has held since the last reset
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(call, repeats): # seconds of the fastest call, peak bytes above what was held before, value
    seconds, memory = [], []
    for _ in range(repeats):
        Path("/proc/self/clear_refs").write_text("5")
        before, start = peak(), time.process_time()
        value = call()
        seconds.append(time.process_time() - start)
        memory.append(peak() - before)
    return dict(seconds=min(seconds), memory=min(memory), value=float(value))


# the head alone: mean NLL of the answers and mean entropy of a forget and a retain batch, in one loss

def liger(): # Liger's function, read from its own file: the package wants triton, the fallback for CPUs doesn't
    found = importlib.util.find_spec("liger_kernel")
    if found is None: sys.exit("liger-kernel is not installed: pip install --no-deps liger-kernel")
    path = Path(found.origin).parent/"ops"/"fused_linear_scaled_cross_entropy.py"
    spec = importlib.util.spec_from_file_location("liger_head", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply
    return lambda hidden, weight, target: apply(hidden, weight, target, 1.0, -100, 1, True)


def table(hidden, weight, target): # all logits at once
    logits = F.linear(hidden, weight).float()
    logp = logits.log_softmax(-1)
    return F.cross_entropy(logits, target, reduction="none", ignore_index=-100), -(logp.exp() * logp).sum(-1)


def everywhere(stats): # NLL over the answers, entropy over all positions
    def loss(hidden, weight, target):
        nll, h = stats(hidden, weight, target)
        return nll.sum() / (target >= 0).sum() + h.mean()
    return loss


def on_answers(stats): # both over the answers, whose rows are picked first
    def loss(hidden, weight, target):
        rows = target >= 0
        nll, h = stats(hidden[rows], weight, target[rows])
        return nll.mean() + h.mean()
    return loss


def masked(stats): # both over the answers, but every row is computed
    def loss(hidden, weight, target):
        nll, h = stats(hidden, weight, target)
        rows = target >= 0
        return (nll.sum() + h[rows].sum()) / rows.sum()
    return loss


HEADS = {
    "reference formulas, all positions": lambda: everywhere(table),
    "reference formulas, answer rows": lambda: on_answers(table),
    "Liger's fallback, all rows": lambda: masked(liger()),
    "Liger's fallback, answer rows": lambda: on_answers(liger()),
    "ours, all positions": lambda: everywhere(linear_stats),
    "ours, answer rows": lambda: on_answers(linear_stats),
}


def head_inputs(dtype): # hidden states (2, BATCH * LENGTH, SIZE), weights (VOCAB, SIZE), targets (2, BATCH * LENGTH)
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, BATCH * LENGTH, SIZE, generator=rng).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, SIZE, generator=rng) / SIZE**.5).to(dtype).requires_grad_()
    target = torch.randint(VOCAB, (2, BATCH, LENGTH), generator=rng)
    target[:, :, :20] = target[:, :, 20 + ANSWER:] = -100
    return hidden, weight, target.flatten(1)


def run_head(name, dtype):
    loss = HEADS[name]()
    hidden, weight, target = head_inputs(dtype)
    def step():
        value = loss(hidden[0], weight, target[0]) + loss(hidden[1], weight, target[1])
        value.backward()
        hidden.grad = weight.grad = None
        return value.detach()
    return measure(step, 2)


# one step of NPO with entropy: forward passes, backward, AdamW

def tofu(): # a forget and a retain batch of encoded TOFU records
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast
    from probunlearn.data import encode, load_qa
    if "PROBUNLEARN_TEST_DATA" not in os.environ:
        sys.exit("PROBUNLEARN_TEST_DATA is not set: no TOFU text at hand")
    folder = Path(os.environ["PROBUNLEARN_TEST_DATA"])/"tofu"
    forget, retain = load_qa(folder/"forget01.json")[:BATCH], load_qa(folder/"retain99.json")[:BATCH]
    texts = [f"{qa.question} {qa.answer}" for qa in load_qa(folder/"full.json")]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4096, special_tokens=["<end>"], show_progress=False)
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>")
    return [[encode(tok, qa) for qa in qas] for qas in (forget, retain)]


def phi(seed): # Phi's shape, small: the head holds a tenth of the weights, as in Phi-1.5
    from transformers import PhiConfig, PhiForCausalLM
    torch.manual_seed(seed)
    config = PhiConfig(vocab_size=4096, hidden_size=384, intermediate_size=1536, num_hidden_layers=8,
                       num_attention_heads=6, max_position_embeddings=256)
    return PhiForCausalLM(config)


def widen(batch): # pad to 256 tokens
    fill = dict(input_ids=0, attention_mask=0, labels=-100)
    return {key: F.pad(value, (0, LENGTH - value.shape[1]), value=fill[key]) for key, value in batch.items()}


def logits(lm, batch): return lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def nll(z, batch):
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(z[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")


def reference_step(lm, reference, forget, retain):
    "Every example padded to 256, all logits, the forget batch twice, the reference model in each step."
    with torch.no_grad(): before = nll(logits(reference, forget), forget).sum(-1)
    loss = -2 / BETA * F.logsigmoid(BETA * (nll(logits(lm, forget), forget).sum(-1) - before)).mean()
    kept = logits(lm, retain)
    loss = loss + nll(kept, retain).sum() / (retain["labels"][:, 1:] >= 0).sum()
    return loss + LAMBDA_F * entropy(logits(lm, forget)).mean() + LAMBDA_R * entropy(kept).mean()


def our_step(lm, before, forget, retain, positions):
    "As long as the longest record, answer rows in chunks, each batch once, the reference's NLL known."
    f = answer_stats(lm, forget, positions=positions)
    r = answer_stats(lm, retain, positions=positions)
    entropies = LAMBDA_F * mean_entropy(f, positions=positions) + LAMBDA_R * mean_entropy(r, positions=positions)
    return npo(f, before, BETA) + answer_mean(r.nll, r.answer) + entropies


REFERENCE = "reference trainer's step"
WIDE = "ours, padded to 256, entropy at all positions"
ONCE = "ours: the reference's NLL of a batch, once per run"
STEPS = [REFERENCE, WIDE, "ours", ONCE]


def run_step(name, dtype):
    forget, retain = (pad_batch(rows, 0) for rows in tofu())
    if name in (REFERENCE, WIDE): forget, retain = widen(forget), widen(retain)
    lm, reference = phi(0).to(dtype), phi(1).to(dtype)
    def before():
        with torch.no_grad(): stats = answer_stats(reference, forget)
        return answer_sum(stats.nll, stats.answer)
    if name == ONCE: return measure(lambda: before().mean(), 2)
    known = before()
    def loss():
        if name == REFERENCE: return reference_step(lm, reference, forget, retain)
        return our_step(lm, known, forget, retain, "all" if name == WIDE else "answer")
    step = update(lm, loss)
    step()                              # makes AdamW's state
    lengths = forget["attention_mask"].sum(-1)
    return measure(step, 2) | dict(mean_length=float(lengths.float().mean()), width=forget["input_ids"].shape[1])


def update(lm, loss): # a function that takes one step
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-5)
    def step():
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()
    return step


def measured(name, kind, bf16): # what a subprocess measures; None where it can't
    command = [sys.executable, __file__, "--run", f"{kind}:{name}"] + ["--bf16"] * bf16
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    if not done.returncode: return json.loads(done.stdout.splitlines()[-1])
    print(f"  {name}: skipped, {done.stderr.strip().splitlines()[-1]}")


def compare(names, kind, bf16): # ratios to the first
    first = None
    for name in names:
        row = measured(name, kind, bf16)
        if row is None: continue
        if name == names[0]: first = row
        base = first or row
        extra = f", {row['mean_length']:.0f} tokens on average in {row['width']}" if "width" in row else ""
        print(f"  {name}: {row['seconds']:.2f} s ({base['seconds'] / row['seconds']:.1f} x faster), "
              f"peak {row['memory'] / 1e9:.2f} GB ({base['memory'] / row['memory']:.1f} x less), "
              f"loss {row['value']:.4f}{extra}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead of float32")
    parser.add_argument("--only", choices=("head", "step"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        torch.set_num_threads(1)
        kind, name = args.run.split(":", 1)
        run = run_head if kind == "head" else run_step
        print(json.dumps(run(name, torch.bfloat16 if args.bf16 else torch.float32)))
        return
    dtype = "bfloat16" if args.bf16 else "float32"
    if args.only != "step":
        print(f"head, forget + retain of {BATCH} x {LENGTH} positions, {ANSWER} of an answer in each, "
              f"{VOCAB:,} words, width {SIZE}, {dtype}")
        compare(list(HEADS), "head", args.bf16)
    if args.only != "head":
        weights = sum(p.numel() for p in phi(0).parameters()) / 1e6
        print(f"one step of NPO with entropy on {BATCH} forget and {BATCH} retain records of TOFU, "
              f"Phi's shape with {weights:.0f} M weights, {dtype}")
        compare(STEPS, "step", args.bf16)


if __name__ == "__main__": main()
