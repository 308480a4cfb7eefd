"""Every public name says what it is: a one-line docstring, and every argument explained where it stands or in the glossary of nbs/docs/api.md."""
import re

import pytest

import probunlearn
from build_docs import read_book
from test_imports import MODULES

BOOK = read_book()
CALLABLE = {name: entry for name, (_, entry) in BOOK.public.items() if entry.kind != "data"}


def test_the_entries_are_the_public_names():
    assert BOOK.public.keys() == {name for module in MODULES for name in getattr(probunlearn, module).__all__}


@pytest.mark.parametrize("name", CALLABLE)
def test_docstring_is_one_line(name):
    assert re.fullmatch(r"\S[^\n]*\S", CALLABLE[name].doc)


@pytest.mark.parametrize("name", CALLABLE)
def test_arguments_are_explained(name):
    assert [name for names, _, comment in CALLABLE[name].arguments if not comment for name in names] == []


@pytest.mark.parametrize("name", [name for name, entry in CALLABLE.items() if entry.kind == "class"])
def test_methods_say_what_they_do(name):
    assert [method.name for method in CALLABLE[name].members if not method.doc and method.arguments] == []


def test_glossary_has_no_idle_word():
    used = [name for entry in CALLABLE.values() for part in (entry, *entry.members) for names, _, comment in part.arguments for name in names if comment == BOOK.words.get(name)]
    assert set(BOOK.words) <= set(used)
