"""Stands in for the package vllm: hears the same words, and draws from a folder's weights by plain forward passes."""
import sys
import time
from types import ModuleType, SimpleNamespace

import torch

from probunlearn.models import load_model

ALLOWED = {"n", "seed", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
           "repetition_penalty", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs", "detokenize"}


class SamplingParams(SimpleNamespace):
    def __init__(self, **how):
        assert set(how) == ALLOWED
        super().__init__(**how)


class LLM:
    "As `vllm.LLM`, for one prompt after another."
    pause = 0.              # seconds before each batch is answered
    logprobs = True
    started = []            # every engine that was started

    def __init__(self, model, **options):
        assert options["generation_config"] == "vllm" and options["logprobs_mode"] == "processed_logprobs"
        self.options = options
        self.local = load_model(model, device="cpu")
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=options.get("max_model_len", 512)))
        self.batches = []   # what was asked, batch by batch: (prompt, params)
        LLM.started.append(self)

    def generate(self, prompts, params, use_tqdm):
        assert not use_tqdm and len(prompts) == len(params)
        time.sleep(self.pause)
        self.batches.append([(tuple(p["prompt_token_ids"]), how) for p, how in zip(prompts, params)])
        return [SimpleNamespace(outputs=[self.answer(list(prompt), how)]) for prompt, how in self.batches[-1]]

    @torch.no_grad()
    def answer(self, prompt, how):
        ids, total, rng = list(prompt), 0., torch.Generator().manual_seed(how.seed)
        for _ in range(how.max_tokens):
            z = self.local.lm(torch.tensor([ids])).logits[0, -1].float()
            law = torch.zeros_like(z).index_fill_(0, z.argmax(), 1.) if how.temperature == 0 else (
                z / how.temperature).softmax(-1)
            token = int(law.multinomial(1, generator=rng))
            total += float(law[token].log())
            ids.append(token)
            if token in how.stop_token_ids: break
        return SimpleNamespace(token_ids=ids[len(prompt):], cumulative_logprob=total if self.logprobs else None)


def install():
    "Let `import vllm` find the stand-in."
    module = ModuleType("vllm")
    module.__version__, module.LLM, module.SamplingParams = "0.0", LLM, SamplingParams
    sys.modules["vllm"] = module
    return module
