"""What can a language model still leak when people sample from it? An answer with a guarantee."""

__version__ = "0.1.0"

# What you type, part by part: module → names. Each is loaded on first use: importing the package loads nothing.
_PARTS = {
    "records": {
        "data": "QA Template load_qa fictional_authors",
        "prompts": "listed_phrasings sampled_phrasings",
        "draws": "Decoding",
        "runs": "read_run",
        "scores": "score_draws rouge_l",
    },
    "bounds": {
        "bounds": "Bound binary_bound mean_bound survival_bound std_bound ed_bound draws_needed",
        "sequential": "RateSequence MeanSequence certify",
        "questions": "worst_question pooled_rate difference_bound",
        "planning": "RunPlan",
        "metrics": "leak_at_k leak_at_k_bound",
        "judged": "calibrate judged_bound",
    },
    "benchmarks": {
        "tables": "draws_from_table",
        "peers": "read_open_unlearning read_leak_k read_lm_eval read_inspect tofu_summary",
        "formats": "read_answers",
    },
    "reports": {
        "plots": "style",
        "report": "Report Board",
        "reading": "report_run versus",
        "widgets": "bound_explorer leak_explorer temperature_explorer",
    },
    "models": {
        "temperature": "AdaptiveTemperature sweep",
        "models": "LocalModel load_model small_model add_lora",
        "endpoint": "Endpoint",
    },
    "exact": {
        "exact": "answer_logprob enumerate_answers",
        "rare": "rare_leak",
        "choices": "by_letter by_text",
    },
    "judges": {
        "judges": "FunctionJudge judge_answers judge_draws",
    },
    "unlearning": {
        "loop": "TrainConfig finetune",
        "training": "UnlearnConfig unlearn leak_probe",
    },
    "together": {
        "evaluation": "evaluate",
        "stress": "relearn quantise",
        "grid": "run_grid read_grid",
        "live": "watch",
    },
}

# names and modules of versions before: what to type instead
_NOW = {
    "small_lm": 'small_model("full")',
    "load_lm": "load_model(folder)",
    "save_lm": "model.save(folder)",
    "sample": "model.draw(qas, n)",
    "greedy": "model.greedy(qas)",
    "sample_endpoint": "Endpoint(url, model).draw(qas, n)",
    "lm_fingerprint": "model.identity",
    "known": "the module recall",
    "librarian": "the module world",
    "looks": "anytime=True in the modules questions and metrics",
    "similarity": "the module metrics",
}


def _homes():
    "Name → module, of what you type."
    return {name: module for modules in _PARTS.values() for module, names in modules.items() for name in names.split()}


def _elsewhere(name):
    "Where a name is that isn't typed often, as words; empty when there is no such name."
    from ._modidx import d
    homes = [module for module, symbols in d["syms"].items() if f"{module}.{name}" in symbols]
    return f": from {homes[0]} import {name}" if homes else ""


def __getattr__(name):
    "A name or module, loaded on first use: `probunlearn.evaluate`, `probunlearn.bounds`."
    from importlib import import_module
    from importlib.util import find_spec
    if name in _NOW: raise ImportError(f"{__name__} has no {name!r} any more: use {_NOW[name]}")     # said by `from` too
    if name in (homes := _homes()): return getattr(import_module(f"{__name__}.{homes[name]}"), name)
    if name.isidentifier() and find_spec(f"{__name__}.{name}"): return import_module(f"{__name__}.{name}")
    raise AttributeError(f"{__name__} itself offers no public name {name!r}{_elsewhere(name)}")


def __dir__(): return sorted({*globals(), *_homes(), *(module for modules in _PARTS.values() for module in modules)})
