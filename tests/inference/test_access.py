"""The access policy: nothing is granted that it does not say, nothing is dropped silently, everything is logged."""

import json
import os
import stat
from concurrent import futures

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from flexjax import errors, tree
from flexjax.inference import access
from flexjax.model import router

KNOWN = ("public", "code", "math", "news")


def policy(**users):
    return access.Policy({user: tuple(experts) for user, experts in users.items()}, "0" * 64, "policy.json")


def decide(rules, user, requested=None, known=KNOWN):
    return access.decide(rules, user, requested, known, "1" * 64)


def test_all_that_the_policy_gives_or_what_was_asked_for():
    rules = policy(alice=["math", "public", "code"], bob=["news"])
    assert decide(rules, "alice").granted == ("public", "code", "math")
    assert decide(rules, "alice", ["math", "public", "math"]).granted == ("public", "math")
    assert decide(rules, "bob", ("news",)).granted == ("news",)
    mask = router.allowed_mask(KNOWN, decide(rules, "alice").granted, 2)
    assert np.asarray(mask).tolist() == [[True, True, True, False]] * 2


@pytest.mark.parametrize(
    ("user", "requested", "says"),
    [
        ("carol", None, "user 'carol' is unknown to policy policy.json"),
        ("Alice", None, "user 'Alice' is unknown"),
        ("", None, "is unknown"),
        ("*", ["public"], "is unknown"),
        ("empty", None, "gives user 'empty' no expert"),
        ("empty", ["public"], "gives user 'empty' no expert"),
        ("alice", [], "asks for no expert"),
        ("alice", ["public", "code"], "may not use expert 'code'; policy policy.json gives public, math"),
        ("alice", ["news", "code", "math"], "may not use experts 'code', 'news'"),
        ("alice", ["physics"], "unknown expert 'physics'"),
        ("alice", ["Math"], "unknown expert '(not a name)'"),
        ("stale", None, "'physics', unknown to this model"),
        ("stale", ["public"], "'physics', unknown to this model"),
    ],
)
def test_default_deny(user, requested, says):
    decision = decide(policy(alice=["public", "math"], empty=[], stale=["public", "physics"]), user, requested)
    assert decision.granted == () and says in decision.refusal
    with pytest.raises(errors.PolicyError, match="no expert is allowed"):
        router.allowed_mask(KNOWN, decision.granted, 1)


def test_another_users_lost_expert_is_not_ones_own():
    assert decide(policy(alice=["public"], stale=["physics"]), "alice").granted == ("public",)


NAMES = st.sampled_from(["public", "code", "math", "news", "physics"])
USERS = st.sampled_from(["alice", "bob", "carol"])


@hypothesis.settings(max_examples=500)
@hypothesis.given(
    users=st.dictionaries(USERS, st.lists(NAMES, unique=True)),
    user=USERS,
    requested=st.none() | st.lists(NAMES, max_size=4),
    known=st.sets(NAMES).map(lambda names: names | {"public"}),
)
def test_granted_is_policy_and_request_and_model(users, user, requested, known):
    """Exactly what was asked for, or exactly what is given; or nothing, and then there is a reason."""
    decision = decide(policy(**users), user, requested, known)
    given = set(users.get(user, ()))
    wanted = given if requested is None else set(requested)
    if given and wanted and wanted <= given <= known:
        assert decision.granted == router.canonical_order(wanted) and not decision.refusal
    else:
        assert decision.granted == () and decision.refusal


def written(path, users, **others):
    path.write_text(json.dumps({"format": 1, "users": users} | others))
    return path


def test_a_policy_file(tmp_path):
    path = written(tmp_path / "policy.json", {"alice": ["public", "math"], "bob@example.org": [], "c.d_e+f-9": ["public"]})
    rules = access.load(path)
    assert rules.users == {"alice": ("public", "math"), "bob@example.org": (), "c.d_e+f-9": ("public",)}
    assert rules.digest == tree.sha256(path.read_bytes()) and rules.source == str(path)
    (tmp_path / "link").symlink_to(path)
    assert access.load(tmp_path / "link").users == rules.users, "an operator's own file may be a link"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "not an object"),
        ("{}", "format None, expected 1"),
        ('{"format": 2, "users": {}}', "format 2, expected 1"),
        ('{"format": true, "users": {}}', "format True"),
        ('{"format": 1}', "users must be an object"),
        ('{"format": 1, "users": ["alice"]}', "users must be an object"),
        ('{"format": 1, "users": {}, "default": "allow"}', "'default' is unknown"),
        ('{"format": 1, "users": {"alice": ["public"], "alice": ["math"]}}', "twice"),
        ('{"format": 1, "users": {"alice": "math"}}', "user 'alice' must have a list"),
        ('{"format": 1, "users": {"alice": null}}', "user 'alice' must have a list"),
        ('{"format": 1, "users": {"alice": [1]}}', "user 'alice' must have a list"),
        ('{"format": 1, "users": {"alice": ["*"]}}', "user 'alice' must have a list"),
        ('{"format": 1, "users": {"alice": ["Math"]}}', "user 'alice' must have a list"),
        ('{"format": 1, "users": {"alice": ["math", "math"]}}', "each once"),
        ('{"format": 1, "users": {"": ["math"]}}', "user ''"),
        ('{"format": 1, "users": {"*": ["math"]}}', "user '\\*'"),
        ('{"format": 1, "users": {"al ice": ["math"]}}', "user 'al ice'"),
        ('{"format": 1, "users": {"\\u0430lice": ["math"]}}', "user"),
        ("[" * 100_000, "JSON"),
        (" " * 2**20 + "{}", "more than"),
    ],
)
def test_policy_files_are_strict(tmp_path, content, says):
    (tmp_path / "policy.json").write_text(content)
    with pytest.raises(errors.ConfigError, match=says) as refused:
        access.load(tmp_path / "policy.json")
    assert str(tmp_path / "policy.json") in str(refused.value) and "\n" not in str(refused.value)


def test_a_policy_that_is_not_there(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(errors.ConfigError, match="cannot be read"):
            access.load(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_holds_grants_and_refusals(tmp_path):
    rules, log = policy(alice=["public", "math"]), tmp_path / "decisions.jsonl"
    access.enforce(decide(rules, "alice", ["math"]), log)
    access.enforce(decide(rules, "alice"), log)
    with pytest.raises(errors.PolicyError, match="'code'"):
        access.enforce(decide(rules, "alice", ["code"]), log)
    with pytest.raises(errors.PolicyError, match="carol"):
        access.enforce(decide(rules, "carol"), log)
    one, two, three, four = lines(log)
    digests = {"policy": "0" * 64, "model": "1" * 64}
    assert one == {"user": "alice", "requested": ["math"], "granted": ["math"], "time": one["time"], **digests}
    assert (two["requested"], two["granted"]) == (None, ["public", "math"])
    assert (three["user"], three["requested"], three["granted"]) == ("alice", ["code"], []) and "'code'" in three["refusal"]
    assert (four["user"], four["granted"]) == ("carol", []) and "carol" in four["refusal"]
    assert one["time"] <= two["time"] <= three["time"] <= four["time"] and one["time"].endswith("+00:00")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_text_in_the_wrong_place_is_not_logged(tmp_path):
    """A prompt that a script passes as a name or a user stays out of the log and of the message."""
    log, text = tmp_path / "log", 'a SECRET\n{"granted": ["math"]}'
    for decision in (decide(policy(alice=["math"]), "alice", [text]), decide(policy(alice=["math"]), text)):
        with pytest.raises(errors.PolicyError) as refused:
            access.enforce(decision, log)
        assert "SECRET" not in str(refused.value)
    assert "SECRET" not in log.read_text() and len(lines(log)) == 2


def test_a_log_that_was_cut_short_goes_on(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b'{"user": "ali')
    access.log(decide(policy(alice=["math"]), "alice"), log)
    first, second = log.read_text().splitlines()
    assert first == '{"user": "ali' and json.loads(second)["granted"] == ["math"]


def test_many_writers_of_one_log(tmp_path):
    log, rules = tmp_path / "log", policy(alice=list(KNOWN))
    with futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: access.log(decide(rules, "alice"), log), range(60)))
    assert [row["granted"] for row in lines(log)] == [list(KNOWN)] * 60


def test_a_decision_that_cannot_be_logged_is_none(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    granted = decide(policy(alice=["math"]), "alice")
    for place in ("missing/log", "link", "pipe", "."):
        with pytest.raises(errors.StorageError, match="not logged"):
            access.enforce(granted, tmp_path / place)
    with pytest.raises(errors.ConfigError, match="bucket"):
        access.log(granted, "gs://bucket/log")
    assert not (tmp_path / "elsewhere").exists()
