"""Draws in memory and on disk: what is written comes back, and what is broken is said to be."""
import itertools
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from probunlearn.draws import Decoding, Draws, draws_from_texts, draws_from_tokens, fingerprint, load_draws, save_draws

ODD = ["", " ", "naïve 東京 🙂", "line\nbreak\ttab", "nul\0byte", "\u2028", "<b>&", "\u0301combining", "x" * 5000]


def drawn(n=50, seed=0, **how):
    "Draws of random token sequences, two of which decode to one text."
    rng = np.random.default_rng(seed)
    sequences = [tuple(int(t) for t in rng.integers(0, 3, size=rng.integers(1, 3))) for _ in range(n)]
    return draws_from_tokens(
        "q/1 é",
        sequences,
        [-len(s) - sum(s) / 10 for s in sequences],
        lambda s: "".join("ab "[t] for t in s).strip(),
        ends=(2,),
        **how,
    )


def same(a, b):
    "Whether two draws hold the same, to the last bit."
    return (a.id, a.answers, a.seed, a.decoding, list(a.index), list(a.counts), a.texts, a.n) == (
        b.id,
        b.answers,
        b.seed,
        b.decoding,
        list(b.index),
        list(b.counts),
        b.texts,
        b.n,
    ) and all(
        (x is None) == (y is None) and (x is None or list(x) == list(y))
        for x, y in ((a.logprobs, b.logprobs), (a.finished, b.finished), (a.tokens, b.tokens))
    )


@pytest.mark.parametrize(
    "d",
    [
        drawn(decoding=Decoding(0.7, 0.9, 40, 12, "a rule"), seed=2**62),
        draws_from_texts("q", ODD),
        draws_from_texts("q", ["b", None, "a", "b", None]),
        draws_from_texts("q", [None, None]),
        draws_from_texts("q", [None, "late"], seed=-3),
        Draws("q", ["one"], np.array([0, -1, 0]), np.array([-np.inf]), [(5, 2)], np.array([False])),
    ],
    ids=["tokens", "odd texts", "missing", "all missing", "first missing", "missing with probabilities"],
)
def test_round_trip(d, tmp_path):
    save_draws(d, tmp_path/"d.parquet")
    assert same(load_draws(tmp_path/"d.parquet"), d)
    assert [p.name for p in tmp_path.iterdir()] == ["d.parquet"]                # no temporary file is left


def test_saving_twice_gives_the_same_bytes_and_replaces(tmp_path):
    a, b = tmp_path/"a.parquet", tmp_path/"b.parquet"
    save_draws(draws_from_texts("q", ["old"]), a)
    for path in (a, b): save_draws(drawn(), path)
    assert a.read_bytes() == b.read_bytes()


def test_any_parquet_reader_sees_one_row_per_draw(tmp_path):
    d = drawn()
    save_draws(d, tmp_path/"d.parquet")
    table = pq.read_table(tmp_path/"d.parquet").to_pandas()
    assert list(table["answer"]) == d.texts and list(table["logprob"]) == list(d.logprobs[d.index])
    assert [tuple(t) for t in table["tokens"]] == [tuple(d.tokens[i]) for i in d.index]


def test_distinct_means_distinct_token_sequences():
    "(0, 2) and (0,) both read 'a'; each keeps its own probability, count and end."
    d = draws_from_tokens("q", [(0, 2), (0,), (0, 2)], [-.5, -2., -.5], lambda s: "a", ends=(2,))
    assert (d.answers, list(d.counts), list(d.logprobs), list(d.finished), d.texts) == (
        ["a", "a"],
        [2, 1],
        [-0.5, -2.0],
        [True, False],
        ["a"] * 3,
    )


def test_groups_equal_a_plain_count():
    d = drawn(2000)
    sequences = [tuple(d.tokens[i]) for i in d.index]
    assert len(set(d.tokens)) == len(d.tokens) and [sequences.count(t) for t in d.tokens] == list(d.counts)
    assert d.tokens == list(dict.fromkeys(sequences))                           # in order of first appearance


def test_missing_draws_are_counted_by_n_alone():
    d = draws_from_texts("q", [None, "a", None])
    assert d.n == 3 and list(d.counts) == [1] and d.texts == [None, "a", None]


def test_html_escapes_what_a_model_said():
    for d in (
        draws_from_texts("<q>", ["<script>alert(1)</script>", "&amp;"]),
        draws_from_texts("<q>", ["<script>"], decoding=Decoding(rule="<i>")),
    ):
        html = d._repr_html_()
        assert "<script" not in html and "<q>" not in html and "<i>" not in html and "&lt;script" in html
    assert draws_from_texts("q", [None])._repr_html_()


# --- broken files --------------------------------

@pytest.mark.parametrize("cut", [0, 3, 50, .3, .6, .9, .999])
def test_a_truncated_file_is_a_value_error(cut, tmp_path):
    path = tmp_path/"d.parquet"
    save_draws(drawn(3000), path)
    data = path.read_bytes()
    path.write_bytes(data[:int(cut * len(data)) if isinstance(cut, float) else cut])
    with pytest.raises(ValueError, match="d.parquet is not a whole file of draws"): load_draws(path)


FOREIGN = {
    "no metadata": pa.table({"x": [1]}),
    "other metadata": pa.table({"answer": ["a"]}).replace_schema_metadata({"pandas": "{}"}),
    "broken metadata": pa.table({"answer": ["a"]}).replace_schema_metadata({"probunlearn": "{"}),
    "other columns": pa.table({"x": [1]}).replace_schema_metadata(
        {"probunlearn": json.dumps(dict(id="q", seed=0, decoding={}))}
    ),
    "unknown decoding": pa.table({"answer": ["a"]}).replace_schema_metadata(
        {"probunlearn": json.dumps(dict(id="q", seed=0, decoding={"beams": 4}))}
    ),
    "no decoding": pa.table({"answer": ["a"]}).replace_schema_metadata(
        {"probunlearn": json.dumps(dict(id="q", seed=0))}
    ),
}


@pytest.mark.parametrize("kind", ["no metadata", "other metadata"])
def test_a_foreign_file_is_a_value_error(kind, tmp_path):
    pq.write_table(FOREIGN[kind], tmp_path/"x.parquet")
    with pytest.raises(ValueError, match="x.parquet is not a whole file of draws"): load_draws(tmp_path/"x.parquet")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.parquet"): load_draws(tmp_path/"gone.parquet")


FULL_DISK = """
import resource, sys
from probunlearn.draws import draws_from_texts, save_draws
path = sys.argv[1]
save_draws(draws_from_texts("q", ["old"]), path)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import random
rng = random.Random(0)
try: save_draws(draws_from_texts("q", ["%030x" % rng.getrandbits(120) for _ in range(5000)]), path)
except OSError as e: print("OSError", e.errno)
"""


def full_disk(path):
    return subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file size")
def test_a_full_disk_is_an_os_error_and_the_older_file_is_whole(tmp_path):
    run = full_disk(tmp_path/"d.parquet")
    assert run.stdout.startswith("OSError"), run.stderr
    assert load_draws(tmp_path/"d.parquet").texts == ["old"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file size")
def test_a_full_disk_leaves_no_temporary_file(tmp_path):
    full_disk(tmp_path/"d.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["d.parquet"]


# --- decoding --------------------------------

@pytest.mark.parametrize(
    "name,values",
    {
        "temperature": (-0.1, float("inf"), float("nan")),
        "top_p": (0, -1, 1.01, float("nan")),
        "top_k": (-1, 2.5),
        "max_new_tokens": (0, -3, 1.5),
    }.items(),
)
def test_a_setting_out_of_range_is_named_with_its_value(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be .*got {value}"): Decoding(**{name: value})


def test_the_edges_are_allowed():
    assert Decoding(0, 1, 0, 1) and Decoding(1e-9, 1e-9, 10**6, 10**6)


def test_decodings_that_differ_read_differently():
    "A claim shows its decoding as text."
    some = [
        Decoding(t, p, k, m, r)
        for t, p, k, m, r in itertools.product((0, 0.5, 1), (0.9, 1), (0, 7), (8, 64), ("", "rule"))
    ]
    assert len(set(map(str, some))) == len(set(some)) == len(some)


def test_fingerprints_tell_settings_apart_and_ignore_order():
    assert (
        fingerprint(dict(a=1, b=[2, "é"])) == fingerprint(dict(b=[2, "é"], a=1)) != fingerprint(dict(a=1, b=["é", 2]))
    )
    assert len({fingerprint(v) for v in (1, 1.5, "1", None, [], {}, [1], True)}) == 8
    assert fingerprint({"a": 1}) == "f9d86028c6e0d64e"  # `sha256sum` of the text {"a": 1}: stored runs depend on it


@pytest.mark.parametrize("kind", ["broken metadata", "other columns", "unknown decoding", "no decoding"])
def test_a_file_with_half_our_marks_is_a_value_error(kind, tmp_path):
    pq.write_table(FOREIGN[kind], tmp_path/"x.parquet")
    with pytest.raises(ValueError, match="x.parquet is not a whole file of draws"): load_draws(tmp_path/"x.parquet")


def test_a_flipped_byte_never_gives_wrong_draws_silently(tmp_path):
    "Anywhere in the file: an error, or the very same draws."
    path, d = tmp_path/"d.parquet", drawn(500)
    save_draws(d, path)
    data, silent = path.read_bytes(), []
    for at in range(4, len(data) - 8, 41):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1:])
        try: again = load_draws(path)
        except (ValueError, OSError): continue
        if not same(again, d): silent.append(at)
    assert not silent


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "max_new_tokens"])
@pytest.mark.parametrize("value", [None, "1", float("nan"), float("inf")])
def test_a_setting_that_is_no_number_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be "): Decoding(**{name: value})
