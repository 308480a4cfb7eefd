"""Draws per second against transformers' own ways, side by side in one process: python benchmarks/sampling.py [--quick] [--device cuda --model-config phi-1_5]

Every round runs all ways in random order; ratios are taken within a round, and the median and the quartiles over rounds are printed, worst regime first. On a CPU the time is that of one thread
(process time: other work on the machine doesn't count). The reference loop, one `generate` per draw, is timed on a few draws and scaled.
"""
import argparse, copy, itertools, json, random, resource, statistics, subprocess, sys, time
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from probunlearn import sampling
from probunlearn.batches import pad_batch
from probunlearn.cli import DEMO, demo_models
from probunlearn.data import QA, encode_prompt, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.law import draw_streams
from probunlearn.loop import TrainConfig, finetune
from probunlearn.losses import answer_mean, answer_stats
from probunlearn.models import small_lm
from probunlearn.training import own_answers

SHAPES = {"llama-7m": dict(model_type="llama", vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=1024),
          "phi-1_5": dict(model_type="phi", vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, partial_rotary_factor=0.5, max_position_embeddings=2048),
          "llama-3.2-1b": dict(model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048)}


def random_model(name, device, dtype):
    "A model of real shape with random weights."
    torch.manual_seed(0)
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


class Workload:
    "One prompt, n draws of up to `length` tokens, and the ways to get them."
    def __init__(self, lm, tok, prompt, n, length, top_p, ends, some):
        self.lm, self.tok, self.prompt, self.n, self.some, self.ends = lm, tok, prompt, n, some, ends
        self.decoding = Decoding(top_p=top_p, max_new_tokens=length)

    def generate(self, n):
        ids, how = torch.tensor([self.prompt], device=self.lm.device), self.decoding
        out = self.lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_p=how.top_p, top_k=0, max_new_tokens=how.max_new_tokens, num_return_sequences=n,
                               eos_token_id=self.ends or None, pad_token_id=0)
        return out[:, len(self.prompt):]

    def reference(self):
        for _ in range(self.some): self.generate(1)
        return self.n / self.some

    def many(self):
        for at in range(0, self.n, 256): self.generate(min(256, self.n - at))
        return 1

    def continuous(self):
        how = self.decoding
        config = copy.copy(self.lm.generation_config)
        config.update(do_sample=True, top_p=how.top_p, top_k=0, max_new_tokens=how.max_new_tokens, num_return_sequences=min(256, self.n), eos_token_id=self.ends or -1, pad_token_id=0)
        from transformers import ContinuousBatchingConfig          # newer than the oldest transformers declared
        self.lm.generate_batch([self.prompt], generation_config=config, continuous_batching_config=ContinuousBatchingConfig(page_size=16))
        return self.n / min(256, self.n)

    def tree(self, n=None, memory=512):
        streams = draw_streams(0, "q", 0, n or self.n, self.lm.device)
        question = torch.zeros(len(streams), dtype=torch.long, device=self.lm.device)
        before, sampling.end_ids = sampling.end_ids, lambda *_: self.ends or [-1]
        try: self.out = sampling._grow(self.lm, self.tok, [self.prompt], question, streams, self.decoding, None, memory, 1)
        finally: sampling.end_ids = before
        return 1

    def flat(self):
        before, sampling._alike = sampling._alike, sort_all
        try: return self.tree()
        finally: sampling._alike = before

    def about(self):
        "Distinct answers, and nats per token of the draws just made."
        tokens, logprobs = self.out
        return dict(distinct=len(torch.unique(tokens, dim=0)), nats_per_token=round(abs(float(logprobs.sum() / (tokens >= 0).sum())), 3))


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
    work.tree(min(8, work.n)), work.generate(2)
    ratios, times = {w: [] for w in ways}, []
    for _ in range(rounds):
        took = {}
        for w in random.sample([*ways, "tree"], len(ways) + 1): took[w] = seconds(getattr(work, w), device)
        times.append(took["tree"])
        for w in ways: ratios[w].append(took[w] / took["tree"])
    def spread(x): return [round(q, 2) for q in (statistics.quantiles(x, n=4) if len(x) > 1 else x * 3)]
    words = dict(reference="one generate per draw", many="generate, 256 at a time", flat="ours without sharing", continuous="generate_batch")
    line = dict(regime=name, n=work.n, prompt=len(work.prompt), top_p=work.decoding.top_p, seconds=round(statistics.median(times), 3), **work.about(), ratios={words[w]: spread(r) for w, r in ratios.items()})
    print(json.dumps(line), flush=True)
    return line


def sharpen(lm, tok, qas, updates=100, lr=5e-4):
    "Minimise the entropy of a model's own greedy answers, whatever they are."
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr)
    rows = own_answers(lm, tok, qas)[0]
    batch = {k: v.to(lm.device) for k, v in pad_batch(rows, tok.pad_token_id).items()}
    for _ in range(updates):
        stats = answer_stats(lm, batch)
        answer_mean(stats.entropy, stats.answer).backward()
        optimizer.step(), optimizer.zero_grad()
    return lm.eval()


def wide_model(tok, qas):
    "A 7 M model of the packaged vocabulary that knows a few answers by heart, and the same with sharpened answers."
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=320, intermediate_size=896, num_hidden_layers=5, num_attention_heads=5, max_position_embeddings=512, eos_token_id=tok.eos_token_id,
                         pad_token_id=tok.pad_token_id, bos_token_id=None, tie_word_embeddings=False)
    lm = AutoModelForCausalLM.from_config(config)
    finetune(lm, tok, qas, TrainConfig(steps=60, batch_size=len(qas), lr=1e-3, weight_decay=0))
    return sharpen(lm.eval(), tok, qas)


def trained(rounds, n=1024, length=48):
    "The packaged models, seen and unseen, and models whose answers were sharpened."
    models, tok = demo_models(settings={k: v for k, v in DEMO.items() if "own" in str(v)} or DEMO)
    forget = fictional_authors("forget10")
    sharp = next(lm for name, lm in models.items() if name not in ("full", "retain"))
    wide = wide_model(tok, forget[::4])
    print(f"packaged model: {sum(p.numel() for p in sharp.parameters()):,} parameters, wide one: {sum(p.numel() for p in wide.parameters()):,}")
    regimes = {"seen": models["full"], "unseen": models["retain"], "entropy-minimised": sharp, "entropy-minimised, 7 M": wide}
    for (name, lm), top_p in itertools.product(regimes.items(), (1., .9)):
        for qa in (forget[0], forget[20]):
            yield compare(f"{name}: {qa.id}", Workload(lm, tok, encode_prompt(tok, qa.question), n, length, top_p, [tok.eos_token_id], 3), rounds, "cpu")


class NoPad: pad_token_id = 0


def random_init(rounds, name, device, dtype, n=256):
    "Flat answers, short and long prompts: the hardest case for sharing."
    lm, draw = random_model(name, device, dtype), random.Random(0)
    for size, top_p in ((40, .9), (40, 1.), (512, .9)):
        prompt = [draw.randrange(lm.config.vocab_size) for _ in range(size)]
        yield compare(f"random-init {name}", Workload(lm, NoPad, prompt, n, 48, top_p, [], 3), rounds, device)
    yield compare(f"random-init {name}, continuous batching", Workload(lm, NoPad, prompt[:40], n, 32, .9, [], 3), 1, device, ways=("many", "continuous"))


def memory_of(way):
    "Peak memory above the model (MB) of 1,024 draws of 64 tokens; run in a process of its own."
    lm = random_model("llama-7m", "cpu", torch.float32)
    work = Workload(lm, NoPad, list(range(40)), 1024, 64, .9, [], 1)
    work.tree(4), work.generate(1)
    open("/proc/self/clear_refs", "w").write("5")                                   # reset the high-water mark
    def high(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
    before = high()
    if way == "generate": work.generate(1024)
    else:
        class Tok(NoPad):
            def decode(ids, **_): return str(ids)
        sampling.end_ids, sampling.encode_prompts = lambda *_: [-1], lambda *_: [work.prompt]
        sampling.sample(lm, Tok, [QA("q", "q", "a")], 1024, work.decoding, memory=None if way == "blocks" else float(way), progress=False)
    print(round(high() - before, 1))


def changed(dtype, device="cpu", n=1024):
    "Share of draws that differ between single blocks and four merged ones."
    lm = random_model("llama-7m", device, dtype)
    prompt, streams = list(range(40)), draw_streams(0, "q", 0, n, device)
    before, sampling.end_ids = sampling.end_ids, lambda *_: [-1]
    def grow(part, memory, least): return sampling._grow(lm, NoPad, [prompt], torch.zeros(len(part), dtype=torch.long, device=device), part, Decoding(max_new_tokens=48), None, memory, least)[0]
    merged, single = grow(streams, 512, 1), torch.cat([grow(part, 32, 64) for part in streams.split(sampling.BLOCK)])
    sampling.end_ids = before
    return float((merged != single).any(-1).float().mean())


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
    rounds, dtype = 1 if args.quick else args.rounds, torch.float32 if args.device == "cpu" else torch.bfloat16
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU, 1 thread'}")
    lines = list(random_init(rounds, args.model_config, args.device, dtype, 256 if args.device == "cpu" else 1024))
    if args.device == "cpu" and not args.quick: lines += trained(rounds)
    if args.device == "cpu":
        peaks = {way: float(subprocess.run([sys.executable, __file__, "--memory-of", way], capture_output=True, text=True, check=True).stdout) for way in ("blocks", "512", "generate")}
        print(f"peak memory above the model, 1,024 draws of 64 tokens: {peaks} MB")
    for dtype in (torch.float32, torch.bfloat16, torch.float16): print(f"{dtype}: {changed(dtype, args.device):.2%} of 1,024 draws differ between single and merged blocks")
    print("\nworst first: seconds of ours, and how many times longer the others took (median)")
    for line in sorted(lines, key=lambda l: l["ratios"].get("generate, 256 at a time", [0, 0])[1]):
        print(f"{line['regime']:45} top-p {line['top_p']:<4} prompt {line['prompt']:<4} {line['seconds']:8.2f} s  {line['distinct']:5} distinct  {line['nats_per_token']:6.3f} nat/token  "
              + "  ".join(f"{way} {r[1]:.1f}" for way, r in line["ratios"].items()))


if __name__ == "__main__": main()
