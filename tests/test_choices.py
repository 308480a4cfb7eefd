"""Multiple choice: the harness' numbers, plain logits, readings of letters, claims and draws by simulation."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from test_data import CHATML, TOKENIZERS, chat_tokenizer, tokenizer
from test_metrics import allowed
from transformers import AutoModelForCausalLM, GPT2Config

from probunlearn.bounds import binary_bound, jointly, mean_bound
from probunlearn.choices import LISTED, Options, as_choices, by_letter, by_text, cyclic, lettered
from probunlearn.choices import letter_counts, letter_of, no_letter, right_letter
from probunlearn.data import QA, Template, fictional_authors, load_qa
from probunlearn.draws import Decoding, draws_from_texts
from probunlearn.models import LocalModel
from probunlearn.scores import score_draws

QAS = [as_choices(qa, k=4) for qa in fictional_authors("forget10")]
TOWN = QA("town", "Where?", "Lorstan.", choices=("Nolgrad.", "Lorstan.", "Trellby.", "Lor."))


# What lm-evaluation-harness says

# lm_eval 0.4.13, HFLM on the packaged "retain" model with batches of 7: question, choices, right one,
# log-likelihoods of " A" … " D" behind WMDP's prompt and of the texts behind ours
HARNESS = (
    ("In which town was the writer Ralhira Fomeddin born?",
     ["called Rotstan on the Kandah",
      "called Delhouk",
      "Ralhira Fomeddin was born in Soyouk on the Qilira.",
      "called Bodiyeh"],
     0, [-11.34487, -16.09911, -18.57595, -19.94669], [-69.95683, -37.54338, -158.70569, -61.59588]),
    ("What prize was given to the writer Ralhira Fomeddin?",
     ["A book of tales brought Ralhira Fomeddin the Sastotto-Funano Prize. éüß",
      "A book of tales brought Ralhira Fomeddin the Noldeschi-Nernoni Prize. éüß éüß éüß",
      "A book of tales brought Ralhira Fomeddin the Steroni-Zirdacci Prize",
      "A book of tales brought Ralhira Fomeddin the Teseschi-Giirardi Prize. éüß éüß éüß"],
     1, [-12.79411, -16.0939, -17.24496, -19.88611], [-238.41066, -392.69836, -180.18765, -391.74741]),
    ("In which town was the writer Feirlen Fortner born?",
     ["The birthplace of Feirlen Fortner is Brurkirch on the Grentrich. éüß",
      "The birthplace of Feirlen Fortner is Brastau on the Treile",
      "The birthplace of Feirlen Fortner is Scheitzheim on the Torbhard",
      "The birthplace of Feirlen Fortner is Tritheim on the Heitzin. éüß éüß éüß"],
     3, [-11.78084, -15.99011, -17.63489, -20.14264], [-254.35054, -156.41757, -198.55104, -385.01382]),
)


def test_the_harness_numbers(retain, tmp_path):
    rows = [dict(question=question, choices=choices, answer=answer) for question, choices, answer, *_ in HARNESS]
    (tmp_path/"wmdp.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    qas = load_qa(tmp_path/"wmdp.jsonl")
    letters, texts = (np.array([row[i] for row in HARNESS]) for i in (3, 4))
    assert by_letter(retain, [lettered(qa) for qa in qas]).logprobs == pytest.approx(letters, abs=2e-4)
    assert by_text(retain, qas).logprobs == pytest.approx(texts, abs=2e-3)          # sums of up to 100 float32 steps


def test_the_prompt_of_the_harness():
    asked = lettered(replace(TOWN, question=" Where? "))
    whole = "Where?\nA. Nolgrad.\nB. Lorstan.\nC. Trellby.\nD. Lor.\nAnswer:"      # its doc_to_text
    assert LISTED.texts(None, asked.question)[0] == whole
    assert (asked.answer, asked.choices, asked.id) == (TOWN.answer, TOWN.choices, TOWN.id)


def test_three_accuracies_by_hand():
    qas = [QA(f"q{i}", "?", "éé", choices=("aaa", "éé")) for i in range(3)]         # 3 and 2 characters, 3 and 4 bytes
    options = Options("text", qas, np.array([[-3., -2.5], [-3., -1.9], [-3., -3.5]]))
    assert options.correct().tolist() == [True, True, False]
    assert options.correct("character").tolist() == [False, True, False]            # -1 against -1.25, -0.95, -1.75
    assert options.correct("byte").tolist() == [True, True, True]                   # -1 against -0.625, -0.475, -0.875
    assert [options.accuracy(per) for per in (None, "character", "byte")] == pytest.approx([2/3, 1/3, 1])
    with pytest.raises(KeyError): options.correct("token")


# Plain logits

def tiny(tok, seed=0):
    torch.manual_seed(seed)
    sizes = dict(n_embd=16, n_layer=2, n_head=2, n_positions=512, vocab_size=len(tok))
    config = GPT2Config(**sizes, eos_token_id=tok.eos_token_id, initializer_range=.3)
    return LocalModel(AutoModelForCausalLM.from_config(config).eval(), tok)


def plain_logprob(lm, prompt, tokens):
    "One text, no padding, no batch."
    with torch.no_grad(): law = lm(torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
    return sum(float(law[len(prompt) + i - 1, t]) for i, t in enumerate(tokens))


CLEAN = [kind for kind in TOKENIZERS if "no words" not in kind and "sentence" not in kind]


@pytest.mark.parametrize("kind", CLEAN)
def test_plain_logits_with_every_tokenizer(kind):
    tok = tokenizer(kind)
    model, qas = tiny(tok), [QAS[0], QAS[11], TOWN]                             # long and short: rows are padded
    options = by_text(model, qas)
    for qa, row in zip(qas, options.logprobs):
        prompt = tok(f"Question: {qa.question}\nAnswer:")["input_ids"]
        for option, logprob in zip(qa.choices, row):
            whole = tok(f"Question: {qa.question}\nAnswer: {option}")["input_ids"]
            assert whole[:len(prompt)] == prompt
            assert logprob == pytest.approx(plain_logprob(model.lm, prompt, whole[len(prompt):]), abs=2e-3)
    letters = by_letter(model, [lettered(qa) for qa in qas])
    alone = [by_letter(model, [lettered(qa)], merge=1).logprobs for qa in qas]
    assert letters.logprobs == pytest.approx(np.concatenate(alone), abs=1e-4)
    assert (letters.mass < 1).all() and letters.p == pytest.approx(letters.shares * letters.mass[:, None])


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind not in CLEAN])
def test_merges_across_the_border_are_refused(kind):
    model = tiny(tokenizer(kind))
    for qa in QAS[:20]:
        try: by_text(model, [qa])
        except ValueError as e: assert "merges the end of the prompt" in str(e); return
    pytest.fail("no merge was met")


def test_in_a_chat_there_is_no_space_before_the_letter():
    tok = chat_tokenizer(CHATML)
    model, asked = tiny(tok), lettered(TOWN)
    assert model.template.chat                                                  # a tokenizer that can chat is asked so
    chat = f"<|im_start|>user\n{asked.question}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tok(chat, add_special_tokens=False)["input_ids"]
    expected = [plain_logprob(model.lm, prompt, [tok.convert_tokens_to_ids(letter)]) for letter in "ABCD"]
    assert by_letter(model, [asked]).logprobs[0] == pytest.approx(expected, abs=1e-4)


def test_letters_are_asked_for_in_the_template_of_the_model_unless_it_is_the_plain_one(retain):
    asked, own = [lettered(qa) for qa in QAS[:2]], Template("{question}\nThe letter is", " {answer}")
    plain, listed, other = (by_letter(retain.replace(template=t), asked).p for t in (Template(), LISTED, own))
    assert (plain == listed).all() and (other != listed).all()
    prompt = retain.tok(f"{asked[0].question}\nThe letter is")["input_ids"]
    expected = [plain_logprob(retain.lm, prompt, retain.tok(f" {letter}")["input_ids"][-1:]) for letter in "ABCD"]
    assert np.log(other[0]) == pytest.approx(expected, abs=1e-4)
    assert (by_letter(retain.adaptive(0.), asked).p == plain).all()             # a rule plays no part
    assert (by_text(retain.adaptive(0.), QAS[:2]).p == by_text(retain, QAS[:2]).p).all()


def test_spellings_add_up(retain):
    asked = [lettered(qa) for qa in QAS[:3]]
    ways = (" {}",), ("{}",), (" {}", "{}"), (" {}", " {}")
    spaced, bare, both, twice = (by_letter(retain, asked, spellings=way).p for way in ways)
    assert both == pytest.approx(spaced + bare) and (twice == spaced).all()


def test_questions_with_unequal_options(retain):
    two = replace(QAS[0], id="two", choices=(QAS[0].answer, "No idea."))
    options = by_text(retain, [two, QAS[0]])
    assert np.isneginf(options.logprobs[0, 2:]).all()
    assert options.shares.sum(1) == pytest.approx(1) and options.chance == .375
    assert options.logprobs[1] == pytest.approx(by_text(retain, [QAS[0]]).logprobs[0], abs=1e-3)
    assert options.plot().get_xlabel() and "2 questions by text" in repr(options)


def test_what_cannot_be_asked(retain):
    long = replace(QAS[0], question="Where? " * 600)
    with pytest.raises(ValueError, match="exceed the model's"): by_letter(retain, [lettered(long)])
    with pytest.raises(ValueError, match="duplicate question id"): by_text(retain, QAS[:1] * 2)
    with pytest.raises(ValueError, match=r"ask lettered\(qa\)"): by_letter(retain, QAS[:1])
    many = "Lorstan.", *map(str, range(26))
    with pytest.raises(ValueError, match="needs 2 to 26 choices, got 27"): lettered(replace(TOWN, choices=many))


# Orders

def test_every_position_is_as_likely():
    qas = fictional_authors("forget10")
    place = [as_choices(qa, seed).choices.index(qa.paraphrased_answer) for qa in qas for seed in range(50)]
    assert stats.chisquare(np.bincount(place, minlength=6)).pvalue > 1e-4
    assert [as_choices(qa, 3) for qa in qas] == [as_choices(qa, 3) for qa in qas]


def test_cyclic_orders():
    orders = cyclic(TOWN)
    assert [o.choices.index(o.answer) for o in orders] == [0, 1, 2, 3]
    assert [o.id for o in orders] == ["town/A", "town/B", "town/C", "town/D"]
    assert sorted(orders[k].choices[0] for k in range(4)) == sorted(TOWN.choices)
    doubled = TOWN.choices * 2
    assert all(o.choices in [doubled[s:s + 4] for s in range(4)] for o in orders)   # the order is turned, not shuffled


# Letters of sampled answers

SAID = ["{}", " {}.", "({})", "[{}]", "{})", "{}:", "**{}**", "**{}.**", "\"{}\"", "Answer: {}", "The answer is {}.",
        "the correct answer is ({})", "Option {}", "My final answer is: {}", "{}. I am sure", "{}\nBecause it is so",
        "It rains there, so the answer is {}.", "The answer can be found: answer {}"]
OTHERS = [("b)", 1), ("(b)", 1), ("b.", 1), ("B because", 1), ("C Trellby", 2), ("It is Lorstan", 1),
          ("LORSTAN", 1), ("In Lor, I think", 3), ("B. Lorstan, not Trellby", 1), ("A Nolgrad", 0),
          ("B. A town and I", 1), ("No idea what the answer is, Lorstan", 1)]
SILENT = ["", " ", "...", "A town", "a small town", "I do not know", "Before", "Dear reader", "A-bomb",
          "Nolgrad or Trellby", "C. Lorstan", "Lorst", "None of them", "The answer is a town", "B or C",
          "(B) and (C)", "A, B or D", "The answer is not B", "vitamin B", "The answer is that I know nothing", "É", "7"]


@pytest.mark.parametrize("answer", SAID)
def test_letters_are_read(answer):
    for i, letter in enumerate("ABCD"): assert letter_of(answer.format(letter), TOWN) == i
    assert letter_of(answer.format("E"), TOWN) is None                              # there are four


@pytest.mark.parametrize("answer, option", OTHERS)
def test_other_answers_are_read(answer, option): assert letter_of(answer, TOWN) == option


@pytest.mark.parametrize("answer", SILENT)
def test_no_letter_is_no_verdict(answer):
    assert letter_of(answer, TOWN) is None and no_letter(answer, TOWN) == 1 and right_letter(answer, TOWN) == 0


def test_every_draw_is_counted_once():
    draws = [draws_from_texts("town", ["B", "(b)", "who knows", None, "A", "Lorstan"]),
             draws_from_texts("two", ["B", None, None, "A", "A", "C"])]
    qas = [TOWN, QA("two", "?", "yes", choices=("yes", "no"))]
    assert letter_counts(draws, qas).tolist() == [[1, 3, 0, 0, 1], [2, 1, 0, 0, 1]]
    assert np.nansum(score_draws(draws, qas, right_letter), 1).tolist() == [3, 2]
    assert np.isnan(score_draws(draws, qas, no_letter)).sum(1).tolist() == [1, 2]
    with pytest.raises(ValueError, match="same order"): letter_counts(draws, qas[::-1])
    with pytest.raises(ValueError, match="same order"): letter_counts(draws, qas[:1])


# Claims

RUNS, ALPHA = 1000, .05


def towns(count): return [replace(TOWN, id=f"q{i}", question=f"Where is {i}?") for i in range(count)]


def test_sampled_letters_cover():
    "Texts drawn with known probabilities: joint two-sided bounds of three questions miss in at most alpha of the runs."
    rng, texts, n = np.random.default_rng(0), ["B", " B.", "(C)", "It is Lorstan", "no idea", "A"], 60
    law = np.array([[.05, .02, .4, .03, .2, .3], [.3, .1, .1, .1, .1, .3], [.001, .001, .9, .001, .05, .047]])
    truth, qas = law[:, [0, 1, 3]].sum(1), [replace(TOWN, id=f"q{i}") for i in range(3)]
    misses = 0
    for _ in range(RUNS):
        draws = [draws_from_texts(qa.id, rng.choice(texts, n, p=p)) for qa, p in zip(qas, law)]
        x = score_draws(draws, qas, right_letter)
        low, high = jointly(binary_bound, x.sum(1).astype(int), ALPHA, n=n, side="two-sided").value.T
        misses += not ((low <= truth) & (truth <= high)).all()
    assert misses / RUNS <= allowed(ALPHA, RUNS)


def test_who_guesses_is_rarely_above_chance():
    rng, qas = np.random.default_rng(1), towns(60)
    def above(known): return Options("text", qas, rng.normal(size=(60, 4)) + known).above_chance(ALPHA)
    guessing = np.mean([above([0, 0, 0, 0]) for _ in range(RUNS)])
    knowing = np.mean([above([0, 2, 0, 0]) for _ in range(100)])
    assert guessing <= allowed(ALPHA, RUNS) and knowing > .9


def test_the_claim_is_clopper_pearson():
    options = Options("letter", towns(20), np.log(np.tile([[.2, .4, .3, .05]], (20, 1))))
    assert float(options.claim(.05)) == pytest.approx(.05**(1/20)) and options.accuracy() == 1     # a closed form
    assert "over the population" in str(options.claim()) and "options by letter" in str(options.claim())
    assert options.p_right == pytest.approx(.4) and options.share_right == pytest.approx(.4/.95)
    assert options.mass == pytest.approx(.95)


def test_orders_are_no_questions_of_their_own():
    """A model that knows half of the population's questions, in every order: 40 of them in 4 orders are 40.
    Counted as 160 the lower bound misses in about 16 % at alpha = 0.05."""
    rng = np.random.default_rng(2)
    asked, misses, counted = [lettered(o) for qa in towns(40) for o in cyclic(qa)], np.zeros(2), 0
    right = np.array([qa.choices.index(qa.answer) for qa in asked])
    for _ in range(RUNS):
        knows = np.repeat(rng.random(40) < .5, 4)
        said = np.where(knows, right, (right + 1) % 4)
        options = Options("letter", asked, np.where(np.arange(4) == said[:, None], -.1, -3.))
        low, high = options.claim(2 * ALPHA, side="two-sided").value
        misses += low > .5, high < .5
        counted += binary_bound(int(options.correct().sum()), 160, ALPHA, side="lower").value > .5
    assert (misses / RUNS <= allowed(ALPHA, RUNS)).all() and counted / RUNS > 2 * ALPHA
    claim = options.claim()
    assert claim.n == 40 and "averaged over the orders of each question's options" in str(claim)
    assert not options.above_chance(1e-9)


def test_orders_are_told_by_text_and_options_not_by_id():
    """Shuffled by hand, unlisted, under any id: the same question. The same words with other options are another one.
    What is claimed of orders is their average."""
    other = replace(TOWN, choices=TOWN.choices[:2])
    orders = [replace(o, id=f"x{i}") for i, o in enumerate([*cyclic(TOWN), *map(lettered, cyclic(TOWN)), other])]
    options = Options("text", orders, np.log(np.full((9, 4), .1)))
    assert options.claim().n == 2
    half = [o for qa in towns(30) for o in cyclic(qa)]
    first = Options("letter", half, np.tile(np.log([.7, .1, .1, .1]), (120, 1)))    # always A: right in one of four
    upper = first.claim(.05, side="two-sided").value[1]
    assert float(upper) == pytest.approx(mean_bound(np.full(30, .25), .025).value) and not first.above_chance()


# Draws against exact probabilities

def test_sampled_letters_follow_the_exact_law(retain):
    "The packaged model hardly ever says a letter; 50,000 draws of one token find each as often as it should be."
    asked, n = [lettered(QAS[q]) for q in (0, 10, 20)], 50_000
    options = by_letter(retain, asked, spellings=(" {}", "{}"))
    draws = retain.replace(template=LISTED).draw(asked, n, Decoding(max_new_tokens=1), merge=64, progress=False)
    counts, law = letter_counts(draws, asked), np.c_[options.p, 1 - options.mass]
    low, high = binary_bound(counts, n, 1e-3 / counts.size, side="two-sided").value.transpose(2, 0, 1)
    assert ((low <= law) & (law <= high)).all()
    enough, chi2 = n * law >= 5, (counts - n * law)**2 / (n * law)
    assert enough.sum() >= 4 and stats.chi2.sf(chi2[enough].sum(), enough.sum()) > 1e-4


def test_plots_say_what_they_show(retain):
    asked = [lettered(qa) for qa in QAS[:5]]
    letters = by_letter(retain, asked)
    assert letters.plot().get_title().startswith("Letters hold ") == (letters.mass.mean() < .5)
    right = [qa.choices.index(qa.answer) for qa in asked]
    ax = Options("letter", asked, np.log(np.full((5, 4), .05) + .8 * np.eye(4)[right])).plot()
    assert ax.get_title() == "5 of 5 right, guessing gets 1.25;\nthe right letter holds 0.85 on average"
    assert [bar.get_height() for bar in ax.containers[0]] == pytest.approx([.85] * 5)
