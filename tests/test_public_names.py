"""Every public name says what it is: one line, and each argument explained where it stands or in nbs/docs/api.md."""
import re
import subprocess
import sys

import pytest

import probunlearn
from build_docs import read_book, typed
from cells import parts
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
    pieces = [part for entry in CALLABLE.values() for part in (entry, *entry.members)]
    arguments = [(name, comment) for part in pieces for names, _, comment in part.arguments for name in names]
    assert set(BOOK.words) <= {name for name, comment in arguments if comment == BOOK.words.get(name)}


# what the package itself offers

TYPED = {name: module for modules in typed().values() for module, names in modules.items() for name in names}


def test_few_names_are_typed():
    names = [name for modules in typed().values() for found in modules.values() for name in found]
    assert len(set(names)) == len(names) <= 70
    assert TYPED == probunlearn._homes() and set(TYPED) <= set(dir(probunlearn))


def test_they_stand_in_the_order_of_the_parts():
    order = list(MODULES)
    assert [part for part in typed()] == [folder.name[2:] for folder in parts()]
    modules = [(part, module) for part, found in typed().items() for module in found]
    assert [MODULES[module].parent.name[2:] for _, module in modules] == [part for part, _ in modules]
    assert sorted(TYPED.values(), key=order.index) == list(TYPED.values())


@pytest.mark.parametrize("name", TYPED)
def test_a_typed_name_is_documented_and_can_be_imported(name):
    assert BOOK.public[name][0] == TYPED[name] and BOOK.public[name][1].doc
    assert getattr(probunlearn, name) is getattr(getattr(probunlearn, TYPED[name]), name)


@pytest.mark.parametrize("old, new", probunlearn._NOW.items())
def test_an_old_name_says_what_to_type_instead(old, new):
    with pytest.raises(ImportError) as error: exec(f"from probunlearn import {old}")
    assert old in str(error.value) and str(error.value).endswith(new)
    for word in re.findall(r"(?<![.\w])\w+(?=\()", new): assert word in TYPED
    if "the module" in new: assert new.split()[-1] in MODULES and old not in MODULES


def test_a_name_that_is_typed_seldom_says_where_it_is():
    with pytest.raises(AttributeError, match="from probunlearn.tofu import truth_score"): probunlearn.truth_score


def test_modules_are_attributes_and_nothing_is_loaded_before():
    code = ("import sys, probunlearn; assert not {'numpy', 'torch', 'probunlearn._modidx'} & {*sys.modules}; "
            "print(probunlearn.bands.__name__, probunlearn.__version__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["probunlearn.bands", probunlearn.__version__]
