"""Rows that share their question against transformers' own cache, on every family that is treated so."""
import pytest
import torch

from conftest import LetterTok, random_lm
from probunlearn import prefix
from probunlearn.prefix import SHARING, CopiedRows, SharedRows, grow_rows, read_prompts, read_texts, shares_prefix

PROMPTS = [[3, 5, 7, 2], [1, 2], [6, 6, 1, 3, 9, 4, 2]]


def grown(rows, steps):
    "Logits after each step of a fixed history: rows split, end, move."
    out = []
    with rows.at_work():
        for origin, token in steps:
            rows.arrange(torch.tensor(origin))
            out.append(rows.step(torch.tensor(token)))
    return torch.cat(out)


@pytest.mark.parametrize("kind", SHARING)
@torch.no_grad()
def test_shared_rows_equal_copied_rows(kind):
    "Three prompts of different lengths in float64; the reference is transformers' DynamicCache with its own attention."
    wide = dict(sliding_window=40) if kind == "mistral" else {}
    lm, tok = random_lm(kind, 12, seed=2, **wide), LetterTok(12)
    question = torch.tensor([0, 1, 1, 2, 2])
    steps = [(range(5), range(5)), ((0, 1, 2, 3, 4, 4, 1), range(7)), ((6, 1, 5), (9, 8, 7)),
             ((2, 0, 1, 1), (1, 2, 3, 4))]
    assert shares_prefix(lm, 20)
    shared = SharedRows(lm, read_prompts(lm, tok, PROMPTS), question, length=4, slots=7)
    copied = CopiedRows(lm, read_prompts(lm, tok, PROMPTS), question)
    before = lm.config._attn_implementation
    torch.testing.assert_close(grown(shared, steps), grown(copied, steps), rtol=1e-9, atol=1e-9)
    assert lm.config._attn_implementation == before
    alone = torch.zeros(3, dtype=torch.long)                    # a single question takes a shorter way
    one = SharedRows(lm, read_prompts(lm, tok, PROMPTS[:1]), alone, length=4, slots=7)
    same = CopiedRows(lm, read_prompts(lm, tok, PROMPTS[:1]), alone)
    steps = [(range(3), (1, 2, 3)), ((0, 0, 2, 1), (4, 5, 6, 7)), ((3, 1), (8, 9))]
    torch.testing.assert_close(grown(one, steps), grown(same, steps), rtol=1e-9, atol=1e-9)


def test_models_that_need_more_than_a_softmax_keep_copies():
    assert not shares_prefix(random_lm("gemma2"), 10)                               # soft-capped scores
    windowed = random_lm("mistral", sliding_window=12)
    assert shares_prefix(windowed, 12) and not shares_prefix(windowed, 13)  # the longest answer would leave it
    read = read_prompts(windowed, LetterTok(16), PROMPTS)
    for length, kind in ((5, SharedRows), (6, CopiedRows)):
        assert isinstance(grow_rows(windowed, read, torch.arange(3), length=length, slots=4), kind)


@torch.no_grad()
def test_no_mask_is_built_for_shared_rows(monkeypatch):
    "transformers builds no mask for an attention it has no mask function for: only a comment in its source says so."
    lm, seen = random_lm("llama", 12), []
    from transformers import AttentionInterface
    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return prefix._shared_attention(module, query, key, value, attention_mask, **kwargs)
    AttentionInterface.register("probunlearn_shared", spy)
    rows = SharedRows(lm, read_prompts(lm, LetterTok(12), PROMPTS), torch.tensor([0, 1]), length=2, slots=2)
    try:
        with rows.at_work(): rows.step(torch.tensor([1, 2]))
    finally: AttentionInterface.register("probunlearn_shared", prefix._shared_attention)
    assert seen == [None, None]


@torch.no_grad()
def test_a_failing_step_leaves_the_models_attention_as_it_was():
    lm = random_lm("llama", 12)
    rows = SharedRows(lm, read_prompts(lm, LetterTok(12), PROMPTS), torch.tensor([0, 1]), length=2, slots=2)
    with pytest.raises(IndexError), rows.at_work(): rows.step(torch.tensor([1, 99]))
    assert lm.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_texts_read_together_are_as_texts_read_alone():
    "Left padding changes nothing; the logits are those behind each text's last tokens."
    lm, tok = random_lm("llama", 12, seed=2), LetterTok(12)
    logits, mask = read_texts(lm, tok, PROMPTS, last=2)
    assert mask.sum(-1).tolist() == [4, 2, 7] and logits.shape == (3, 2, 12)
    for text, row in zip(PROMPTS, logits):
        torch.testing.assert_close(row, lm(input_ids=torch.tensor([text])).logits[0, -2:], rtol=1e-9, atol=1e-9)
