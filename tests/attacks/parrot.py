"""A model in a few lines, for attacks that need many runs."""
from dataclasses import replace

from probunlearn.data import QA
from probunlearn.draws import Decoding, draws_from_texts

SHORT = Decoding(max_new_tokens=8)
QAS = [QA(f"q{i}", f"Where is vault {i}?", f"Vault {i} lies under Karmo{i}.", (f"Karmo{i}",)) for i in range(2)]


class Parrot:
    "Says what it is told to: `said(qa, i)` for draw i, None for a draw that is missing."
    name, asked, at_once = "parrot", "asked as '{question}'", 4

    def __init__(self, said=None):
        self.said = said or (lambda qa, i: qa.answer if i % 7 == 3 else f"I don't know {i}.")

    @property
    def identity(self): return dict(model="parrot")

    def greedy(self, qas, decoding=SHORT):
        cold = replace(decoding, temperature=0)
        return [draws_from_texts(qa.id, ["No."], decoding=cold, prompt=self.asked) for qa in qas]

    def draw(self, qas, n, decoding=SHORT, seed=0, *, start=0):
        texts = {qa.id: [self.said(qa, i) for i in range(start, n)] for qa in qas}
        lost = {qa.id: {i: "gone" for i, text in enumerate(texts[qa.id]) if text is None} for qa in qas}
        return [draws_from_texts(qa.id, texts[qa.id], decoding=decoding, seed=seed, prompt=self.asked, lost=lost[qa.id])
                for qa in qas]
