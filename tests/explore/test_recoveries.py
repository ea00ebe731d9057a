"""Classes that share a recovery key recover in the same way; too coarse a key is noticed."""

from __future__ import annotations

import itertools
import sqlite3
from collections import Counter

import pytest
import tiny_ab
from attrs import evolve
from tiny_recovery import recovered

from framework.disk import JournalReader, PrefixCache, TornSector, VolatileCache
from framework.explore import explore
from framework.explore.bulk import BulkOracle
from framework.explore.judges.data import DataJudge
from framework.explore.recovery import (
    Ends,
    Recoveries,
    RecoveryKey,
    Trace,
    _most_telling_first,
    recoveries,
    trace_of,
)
from framework.explore.views import view_of

MODELS = (PrefixCache(), VolatileCache(), TornSector())


def made(folder, bug=""):
    """An update, all its cuts, and what the recovery of each class did."""
    context = tiny_ab.context(JournalReader(tiny_ab.run(folder, bug=bug)))
    found = explore(context.journal, context.layout, MODELS, samples=100)
    traces = {}
    for number, crash_class in enumerate(found.classes):
        journal = recovered(context, crash_class.representative, folder / f"{number}")
        traces[crash_class.key] = trace_of(context, journal, len(journal.operations))
    return (context, found), traces


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def recorded(run):
    return run[0]


@pytest.fixture
def traces(run):
    return run[1]


def grouped(recorded) -> Recoveries:
    context, found = recorded
    return recoveries(found.classes, BulkOracle(context), DataJudge(context, views=True))


def test_every_class_has_a_key_and_keys_are_far_fewer(recorded):
    _, found = recorded
    every = grouped(recorded)
    members = [c for _, classes in every.groups for c in classes]
    assert every.unknown == 0
    assert sorted(c.key for c in members) == sorted(c.key for c in found.classes)
    assert len(every.groups) * 3 < len(found.classes)


def test_all_classes_of_a_key_leave_the_same_trace(recorded, traces):
    every = grouped(recorded)
    for key, classes in every.groups:
        for other in classes[1:]:
            assert traces[classes[0].key].differs(traces[other.key]) == "", key.describe()
    assert len(set(traces.values())) > 5, "recoveries do differ"


@pytest.mark.parametrize(("part", "bug"), [("variables", ""), ("slots", "no-sync-before-switch")])
def test_a_key_that_forgets_what_a_recovery_depends_on_is_given_away_by_its_traces(
    tmp_path, part, bug
):
    """Planted: part of the key is left out, and classes that recover differently share one."""
    recorded, traces = made(tmp_path, bug)
    blurred: dict[object, list[str]] = {}
    for key, classes in grouped(recorded).groups:
        for other in classes[1:]:
            assert traces[classes[0].key].differs(traces[other.key]) == ""
        blurred.setdefault(evolve(key, **{part: ()}), []).extend(c.key for c in classes)
    apart = [
        traces[keys[0]].differs(traces[other]) for keys in blurred.values() for other in keys[1:]
    ]
    assert any(apart)


def test_the_first_keys_show_every_part_and_none_of_them_in_vain(recorded):
    every = grouped(recorded)
    keys = [key for key, _ in every.groups]
    new = [set(k.parts()).difference(*(k.parts() for k in keys[:n])) for n, k in enumerate(keys)]
    cover = next((n for n, parts in enumerate(new) if not parts), len(keys))
    assert all(new[:cover])
    assert not any(new[cover:])
    assert [len(parts) for parts in new] == sorted((len(parts) for parts in new), reverse=True)
    assert every.parts(range(cover))[0] == every.parts([])[1] == every.parts(range(len(keys)))[0]
    assert every.parts(range(cover - 1))[0] < every.parts([])[1]


def test_combinations_of_parts_that_were_seen_come_last():
    """3 boot environments, 4 repairs and 5 views: 15 systems, and 60 combinations of all."""
    keys = [
        RecoveryKey((), ((True,), 0, ()), (("count", count),), (), needed, view)
        for count, needed, view in itertools.product("012", "abcd", "vwxyz")
    ]
    every = Recoveries(tuple((key, ()) for key in _most_telling_first({k: [] for k in keys})), 0)
    assert {key for key, _ in every.groups} == set(keys)
    assert every.parts(range(15)) == (3 + 4 + 15, 3 + 4 + 15)
    assert every.parts(range(4)) == (3 + 4 + 4, 22), "four at once show most"


def test_controls_are_second_classes_of_keys_that_were_booted(recorded):
    every = grouped(recorded)
    booted = len(every.groups) // 2
    for number, control in every.controls(booted, 0.25, seed=7):
        _, classes = every.groups[number]
        assert number < booted
        assert control in classes[1:]
    assert len(every.controls(booted, 0.25, seed=7)) > 0
    assert every.controls(0, 0.25, seed=7) == []
    assert every.controls(booted, 0.0, seed=7) == []


def test_a_class_whose_data_was_not_checked_has_no_key(recorded):
    """The tiny device has no data partition; it is given one that nobody looked at."""
    context, _ = recorded
    region = tiny_ab.Region("data", tiny_ab.Role.DATA, (tiny_ab.Range("vda", 3 << 20, 4096),))
    layout = context.layout
    layout = tiny_ab.Layout((*layout.regions, region), layout.store, layout.vocabulary)
    with_data = evolve(context, layout=layout)
    again = explore(context.journal, layout, MODELS[0])
    every = recoveries(again.classes, BulkOracle(with_data), DataJudge(with_data, views=True))
    assert every.groups == ()
    assert every.unknown == len(again.classes)


def test_a_trace_says_how_it_differs():
    one = Trace(("ready",), ((("count", "1"),),), ("slot b",), "abc")
    assert one.differs(one) == ""
    assert one.differs(evolve(one, data="abd")).startswith("data abc and abd")
    assert one.differs(evolve(one, promises=())).startswith("promises")


def test_an_update_is_tried_again_once_from_each_end():
    ends = Ends()
    assert [ends.is_new(end) for end in ("a", "b", "a", "b", "c")] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert len(ends) == 3


# ---------------------------------------------------------------- views

KINDS = {"/db": "sqlite", "/lock": "ignored"}


def database(path, *rows, fill=0, hot=False):
    """The files of a database with these rows; `hot`: as of a transaction cut before its end."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("CREATE TABLE state (text TEXT)")
    for number in range(fill):  # so that pages lie elsewhere
        connection.execute("INSERT INTO state VALUES (?)", (f"{number}" * 500,))
    connection.execute("DELETE FROM state")
    connection.executemany("INSERT INTO state VALUES (?)", [(row,) for row in rows])
    if hot:
        connection.execute("PRAGMA cache_spill = 1")
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("UPDATE state SET text = 'later'")
        connection.executemany("INSERT INTO state VALUES (?)", [("x" * 3000,)] * 50)
    journal = path.with_name(path.name + "-journal")
    files = {"/db-journal": journal.read_bytes()} if hot else {}
    if hot:
        connection.execute("COMMIT")
    connection.close()
    return {"/db": path.read_bytes(), **files}


def test_a_database_is_what_it_says_not_where_its_pages_lie(tmp_path):
    one = database(tmp_path / "1", "Download")
    two = database(tmp_path / "2", "Download", fill=40)
    other = database(tmp_path / "3", "Commit")
    assert one != two
    assert view_of(one, KINDS) == view_of(two, KINDS)
    assert view_of(one, KINDS) != view_of(other, KINDS)


def test_an_unfinished_transaction_is_undone_and_seen(tmp_path):
    plain = database(tmp_path / "1", "Download")
    hot = database(tmp_path / "2", "Download", hot=True)
    assert view_of(plain, KINDS) != view_of(hot, KINDS), "undoing it is a write of the recovery"
    broken = {"/db": hot["/db"]}  # planted: its journal is lost
    assert view_of(broken, KINDS) not in {view_of(plain, KINDS), view_of(hot, KINDS)}


def test_a_transactions_journal_that_cannot_be_read_is_not_one_that_is_not_there(tmp_path):
    plain = database(tmp_path / "1", "Download")
    assert view_of({**plain, "/db-journal": None}, KINDS) != view_of(plain, KINDS)


@pytest.mark.parametrize("path", ["/db", "/file"])
def test_which_blocks_of_a_file_cannot_be_read_is_seen_and_what_is_in_the_others(path):
    rests = [((0,), b"0" * 8), ((1,), b"0" * 8), ((0,), b"1" * 8)]
    assert len({view_of({path: None}, KINDS, {path: rest}) for rest in rests}) == 3


def test_times_and_random_identifiers_are_masked_and_nothing_else(tmp_path):
    texts = [
        "at 1796059056 by 8f557699-e9cf-4a7b-b2ba-a93e69c51e3c",
        "at 1796059127 by d6cbd332-ea06-4b65-b058-d0b537025e26",
        "at 17 by 8f557699-e9cf-4a7b-b2ba-a93e69c51e3c",
        "at 1796059056 by nobody",
    ]
    views = [
        view_of(database(tmp_path / f"{number}", text), KINDS) for number, text in enumerate(texts)
    ]
    assert views[0] == views[1]
    assert len(set(views)) == 3


def test_what_no_start_reads_does_not_count_and_everything_else_does(tmp_path):
    files = database(tmp_path / "1", "Download") | {"/lock": b"121", "/note": b"a"}
    assert view_of(files | {"/lock": b"7"}, KINDS) == view_of(files, KINDS)
    changed = [
        files | {"/note": b"b"},
        files | {"/note": None},
        files | {"/more": b""},
        files | {"/db": b"no database"},
        {"/note": b"a"},
    ]
    views = Counter(view_of(one, KINDS) for one in (files, *changed))
    assert len(views) == len(changed) + 1
