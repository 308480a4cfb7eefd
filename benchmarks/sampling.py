"""Draws per second against transformers' own ways, side by side in one process.

python benchmarks/sampling.py [--quick] [--device cuda --model-config phi-1_5]

Every round runs all ways in random order; ratios are taken within a round, and the median and the quartiles over rounds
are printed, worst regime first. On a CPU the time is that of one thread (process time: other work on the machine
doesn't count). The reference loop, one `generate` per draw, is timed on a few draws and scaled.
"""
import argparse
import copy
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from probunlearn import sampling
from probunlearn.batches import pad_batch
from probunlearn.cli import DEMO, demo_models
from probunlearn.data import QA, Template, encode_prompt, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.law import draw_streams
from probunlearn.loop import TrainConfig, finetune
from probunlearn.losses import answer_mean, answer_stats
from probunlearn.models import LocalModel
from probunlearn.training import own_answers

SHAPES = {
    "llama-7m": dict(model_type="llama", vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
                     num_attention_heads=4, max_position_embeddings=1024),
    "phi-1_5": dict(model_type="phi", vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
                    num_attention_heads=32, partial_rotary_factor=0.5, max_position_embeddings=2048),
    "llama-3.2-1b": dict(model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                         num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                         max_position_embeddings=2048),
}
WAYS = dict(reference="one generate per draw", many="generate, 256 at a time", flat="ours without sharing",
            continuous="generate_batch")


class NoWords:
    "A tokenizer for prompts that are token ids already."
    pad_token_id, chat_template = 0, None
    def decode(self, ids, **_): return str(ids)


def random_model(name, device, dtype):
    "A model of real shape with random weights."
    torch.manual_seed(0)
    shape = dict(SHAPES[name])
    tokens = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, tie_word_embeddings=False, **tokens)
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    return LocalModel(lm, NoWords(), template=Template(), name=name)


class Workload:
    "One prompt, n draws of up to `length` tokens, and the ways to get them."
    def __init__(self, model, prompt, n, length, *, top_p, ends=(), some=3):
        self.model = model
        self.lm = model.lm
        self.prompt = prompt
        self.n = n
        self.some = some                # draws that the reference loop is timed on
        self.ends = list(ends)
        self.decoding = Decoding(top_p=top_p, max_new_tokens=length)

    def how(self, n):
        "The decoding in transformers' words."
        return dict(do_sample=True, top_p=self.decoding.top_p, top_k=0, max_new_tokens=self.decoding.max_new_tokens,
                    num_return_sequences=n, pad_token_id=0)

    def generate(self, n):
        ids = torch.tensor([self.prompt], device=self.lm.device)
        out = self.lm.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=self.ends or None, **self.how(n))
        return out[:, len(self.prompt):]

    def reference(self):
        for _ in range(self.some): self.generate(1)
        return self.n / self.some

    def many(self):
        for at in range(0, self.n, 256): self.generate(min(256, self.n - at))
        return 1

    def continuous(self):
        from transformers import ContinuousBatchingConfig          # newer than the oldest transformers declared
        some = min(256, self.n)
        config = copy.copy(self.lm.generation_config)
        config.update(eos_token_id=self.ends or -1, **self.how(some))
        paged = ContinuousBatchingConfig(page_size=16)
        self.lm.generate_batch([self.prompt], generation_config=config, continuous_batching_config=paged)
        return self.n / some

    def tree(self, n=None, memory=512):
        streams = draw_streams(0, "q", 0, n or self.n, self.lm.device)
        question = torch.zeros(len(streams), dtype=torch.long, device=self.lm.device)
        with instead(end_ids=lambda *_: self.ends or [-1]):
            self.out = sampling._grow(self.model, [self.prompt], question, streams, self.decoding, memory, 1)
        return 1

    def flat(self):
        with instead(_alike=sort_all): return self.tree()

    def about(self):
        "Distinct answers, and nats per token of the draws just made."
        tokens, logprobs = self.out
        nats = abs(float(logprobs.sum() / (tokens >= 0).sum()))
        return dict(distinct=len(torch.unique(tokens, dim=0)), nats_per_token=round(nats, 3))


@contextmanager
def instead(**functions):
    "Other functions in the module `sampling` for a while."
    before = {name: getattr(sampling, name) for name in functions}
    for name, function in functions.items(): setattr(sampling, name, function)
    try: yield
    finally:
        for name, function in before.items(): setattr(sampling, name, function)


def sort_all(key):
    "No two draws share a row."
    order = key.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(key), device=key.device)
    return key[order], place


def seconds(way, device):
    if device == "cuda": torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    scale = way()
    if device == "cuda": torch.cuda.synchronize()
    return (clock() - start) * scale


def compare(name, work, rounds, device, ways=("reference", "many", "flat")):
    "One line of results: how many times longer each way takes than ours."
    torch.manual_seed(0)
    work.tree(min(8, work.n))
    work.generate(2)
    took = [one_round(work, ways, device) for _ in range(rounds)]
    def spread(x): return [round(q, 2) for q in (statistics.quantiles(x, n=4) if len(x) > 1 else x * 3)]
    ratios = {WAYS[way]: spread([times[way] / times["tree"] for times in took]) for way in ways}
    ours = round(statistics.median(times["tree"] for times in took), 3)
    line = dict(regime=name, n=work.n, prompt=len(work.prompt), top_p=work.decoding.top_p, seconds=ours, **work.about(),
                ratios=ratios)
    print(json.dumps(line), flush=True)
    return line


def one_round(work, ways, device):
    "Seconds of each way, run in random order."
    order = random.sample([*ways, "tree"], len(ways) + 1)
    return {way: seconds(getattr(work, way), device) for way in order}


def sharpen(model, qas, updates=100, lr=5e-4):
    "Minimise the entropy of a model's own greedy answers, whatever they are."
    optimizer = torch.optim.AdamW(model.lm.parameters(), lr=lr)
    rows, _ = own_answers(model, qas)
    batch = {k: v.to(model.lm.device) for k, v in pad_batch(rows, model.tok.pad_token_id).items()}
    for _ in range(updates):
        stats = answer_stats(model.lm, batch)
        answer_mean(stats.entropy, stats.answer).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.lm.eval()
    return model


def wide_model(tok, qas):
    "A 7 M model of the packaged vocabulary that knows a few answers by heart, with sharpened answers."
    torch.manual_seed(0)
    tokens = dict(vocab_size=len(tok), eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, bos_token_id=None)
    config = LlamaConfig(hidden_size=320, intermediate_size=896, num_hidden_layers=5, num_attention_heads=5,
                         max_position_embeddings=512, tie_word_embeddings=False, **tokens)
    model = LocalModel(AutoModelForCausalLM.from_config(config), tok)
    finetune(model, qas, TrainConfig(steps=60, batch_size=len(qas), lr=1e-3, weight_decay=0))
    return sharpen(model, qas)


def trained(rounds, n=1024, length=48):
    "The packaged models, seen and unseen, and models whose answers were sharpened."
    models = demo_models(settings={k: v for k, v in DEMO.items() if "own" in str(v)} or DEMO)
    forget = fictional_authors("forget10")
    sharp = next(model for name, model in models.items() if name not in ("full", "retain"))
    wide = wide_model(sharp.tok, forget[::4])
    print(f"packaged model: {size(sharp):,} parameters, wide one: {size(wide):,}")
    regimes = {
        "seen": models["full"],
        "unseen": models["retain"],
        "entropy-minimised": sharp,
        "entropy-minimised, 7 M": wide,
    }
    for (name, model), top_p in itertools.product(regimes.items(), (1., .9)):
        for qa in (forget[0], forget[20]):
            prompt = encode_prompt(model.tok, qa.question, model.template)
            work = Workload(model, prompt, n, length, top_p=top_p, ends=[model.tok.eos_token_id])
            yield compare(f"{name}: {qa.id}", work, rounds, "cpu")


def size(model): return sum(p.numel() for p in model.lm.parameters())


def random_init(rounds, name, device, dtype, n=256):
    "Flat answers, short and long prompts: the hardest case for sharing."
    model, rng = random_model(name, device, dtype), random.Random(0)
    for long, top_p in ((40, .9), (40, 1.), (512, .9)):
        prompt = [rng.randrange(model.lm.config.vocab_size) for _ in range(long)]
        yield compare(f"random-init {name}", Workload(model, prompt, n, 48, top_p=top_p), rounds, device)
    short = Workload(model, prompt[:40], n, 32, top_p=.9)
    yield compare(f"random-init {name}, continuous batching", short, 1, device, ways=("many", "continuous"))


def memory_of(way):
    "Peak memory above the model (MB) of 1,024 draws of 64 tokens; run in a process of its own."
    model = random_model("llama-7m", "cpu", torch.float32)
    work = Workload(model, list(range(40)), 1024, 64, top_p=.9, some=1)
    work.tree(4)
    work.generate(1)
    Path("/proc/self/clear_refs").write_text("5")           # reset the high-water mark
    before = high_water()
    if way == "generate": work.generate(1024)
    else:
        memory = None if way == "blocks" else float(way)
        with instead(end_ids=lambda *_: [-1], encode_prompts=lambda *_: [work.prompt]):
            model.draw([QA("q", "q", "a")], 1024, work.decoding, memory=memory, progress=False)
    print(round(high_water() - before, 1))


def high_water(): # MB, the most this process has held
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def changed(dtype, device="cpu", n=1024):
    "Share of draws that differ between single blocks and four merged ones."
    model = random_model("llama-7m", device, dtype)
    prompt, streams = list(range(40)), draw_streams(0, "q", 0, n, device)
    def grow(part, memory, least):
        question = torch.zeros(len(part), dtype=torch.long, device=device)
        return sampling._grow(model, [prompt], question, part, Decoding(max_new_tokens=48), memory, least)[0]
    with instead(end_ids=lambda *_: [-1]):
        merged = grow(streams, 512, 1)
        single = torch.cat([grow(part, 32, 64) for part in streams.split(sampling.BLOCK)])
    return float((merged != single).any(-1).float().mean())


def peak_memory(way): # MB, in a process of its own
    done = subprocess.run([sys.executable, __file__, "--memory-of", way], capture_output=True, text=True, check=True)
    return float(done.stdout)


def summary(lines):
    "All regimes, worst first."
    print("\nworst first: seconds of ours, and how many times longer the others took (median)")
    for line in sorted(lines, key=lambda line: line["ratios"].get(WAYS["many"], [0, 0])[1]):
        others = "  ".join(f"{way} {ratio[1]:.1f}" for way, ratio in line["ratios"].items())
        print(f"{line['regime']:45} top-p {line['top_p']:<4} prompt {line['prompt']:<4} {line['seconds']:8.2f} s  "
              f"{line['distinct']:5} distinct  {line['nats_per_token']:6.3f} nat/token  {others}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of the random models only")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model-config", default="llama-7m", choices=list(SHAPES))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of: return memory_of(args.memory_of)
    if args.device == "cpu": torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    on_cpu = args.device == "cpu"
    rounds = 1 if args.quick else args.rounds
    dtype = torch.float32 if on_cpu else torch.bfloat16
    print(f"torch {torch.__version__}, {'CPU, 1 thread' if on_cpu else torch.cuda.get_device_name()}")
    lines = list(random_init(rounds, args.model_config, args.device, dtype, n=256 if on_cpu else 1024))
    if on_cpu and not args.quick: lines += trained(rounds)
    if on_cpu:
        peaks = {way: peak_memory(way) for way in ("blocks", "512", "generate")}
        print(f"peak memory above the model, 1,024 draws of 64 tokens: {peaks} MB")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        print(f"{dtype}: {changed(dtype, args.device):.2%} of 1,024 draws differ between single and merged blocks")
    summary(lines)


if __name__ == "__main__": main()
