"""`--policy` of generate and evaluate: who may use what is decided before anything is read, and logged."""

import json
import shutil

import pytest

from flexjax import tree
from tests.commands import zygote
from tests.commands.conftest import SECRET
from tests.commands.processes import finish, start

CONFIG, DATA, POLICY, STORAGE = 2, 3, 5, 6
USERS = {"alice": ["public", "math"], "bob": ["public"], "carol": [], "dave": ["code"], "erin": ["public", "physics"]}
PROMPT = f"--prompt={SECRET} sum"


@pytest.fixture(scope="module")
def generate(tmp_path_factory):
    process = zygote.Zygote("flexjax.generate", tmp_path_factory.mktemp("generate"))
    yield process
    process.close()


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"format": 1, "users": USERS}))
    return path


@pytest.fixture
def decisions(policy):
    """What the log beside the policy says."""
    log = policy.with_name("policy.json.decisions.jsonl")

    def read():
        assert not log.exists() or SECRET not in log.read_text(), "a log quotes a text"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return read


@pytest.fixture
def scoring(merged, corpus, policy):
    text = f"--data=math={corpus}/math/validation.jsonl"
    return [f"--model={merged}", text, "--batch_size=2", "--seq_len=16", "--max_kilobytes=1", f"--policy={policy}"]


@pytest.fixture
def writing(merged, policy):
    return [f"--model={merged}", PROMPT, "--max_new_tokens=3", f"--policy={policy}"]


def test_the_granted_set_reaches_the_model(commands, scoring, policy, merged, decisions):
    """Shares of what is forbidden are exactly 0, and the score is that of the same set without a policy."""
    for user, granted in {"alice": ["public", "math"], "dave": ["code"]}.items():
        result = commands.evaluate(*scoring, f"--user={user}", "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out.splitlines()[-1])
        assert (found["user"], found["experts"]) == (user, granted)
        shares = found["scores"]["math"]["shares"]
        assert {name for name, share in shares.items() if share != 0} == set(granted)
        said = f"policy: {user} may use {', '.join(granted)}; logged in {policy}.decisions.jsonl\n"
        assert result.err == said
        plain = commands.evaluate(*scoring[:-1], f"--experts={','.join(granted)}", "--json")
        alone = json.loads(plain.out.splitlines()[-1])
        assert (alone["scores"], alone["user"]) == (found["scores"], None)
        last = decisions()[-1]
        assert (last["user"], last["requested"], last["granted"]) == (user, None, granted)
        assert last["policy"] == tree.sha256(policy.read_bytes())
        assert last["model"] == json.loads((merged / "manifest.json").read_bytes())["digest"]
    assert len(decisions()) == 2


def test_a_request_within_the_policy(commands, generate, scoring, writing, decisions):
    for command, arguments in ((commands.evaluate, scoring), (generate, writing)):
        result = command(*arguments, "--user=alice", "--experts=math", "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out.splitlines()[-1])
        assert (found["user"], found["experts"]) == ("alice", ["math"])
        assert result.err.startswith("policy: alice may use math; logged in ")
    assert [(row["requested"], row["granted"]) for row in decisions()] == [(["math"], ["math"])] * 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--user=frank"], ["user 'frank'", "unknown to policy"]),
        (["--user=carol"], ["user 'carol'", "no expert"]),
        (["--user=carol", "--experts=public"], ["user 'carol'", "no expert"]),
        (["--user=bob", "--experts=public,math"], ["user 'bob' may not use expert 'math'", "gives public"]),
        (["--user=bob", "--experts=physics"], ["'physics'"]),
        (["--user=bob", "--experts="], ["asks for no expert"]),
        (["--user=erin"], ["'physics', unknown to this model"]),
    ],
)
def test_default_deny(refuse, commands, generate, scoring, writing, decisions, arguments, says):
    for number, (command, basis) in enumerate(((commands.evaluate, scoring), (generate, writing)), 1):
        refuse(command, [*basis, *arguments], POLICY, *says)
        assert len(decisions()) == number
        assert decisions()[-1]["granted"] == [] and decisions()[-1]["refusal"]


def test_refused_before_text_and_weights_are_read(refuse, commands, generate, scoring, writing, merged, tmp_path, decisions):
    """With broken tensors and a broken text, whoever may not is told so; whoever may learns what is broken."""
    shutil.copytree(merged, tmp_path / "model")
    for file in (tmp_path / "model").rglob("c/0/*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    (tmp_path / "text.jsonl").write_text("{")
    broken = [*scoring, f"--model={tmp_path / 'model'}", f"--data=a={tmp_path / 'text.jsonl'}"]
    refuse(commands.evaluate, [*broken, "--user=frank"], POLICY, "'frank'")
    refuse(generate, [*writing, f"--model={tmp_path / 'model'}", "--user=frank"], POLICY, "'frank'")
    assert [row["granted"] for row in decisions()] == [[], []]
    assert commands.evaluate(*broken, "--user=alice").code == 4


def test_an_anchor_has_public_alone(refuse, commands, generate, scoring, writing, anchor, decisions):
    for command, arguments in ((commands.evaluate, scoring), (generate, writing)):
        result = command(*arguments, f"--model={anchor}", "--user=bob", "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out.splitlines()[-1])["experts"] == ["public"]
        refuse(command, [*arguments, f"--model={anchor}", "--user=alice"], POLICY, "'math', unknown to this model")
        refuse(command, [*arguments, f"--model={anchor}", "--user=dave"], POLICY, "'code', unknown to this model")
    assert len(decisions()) == 6


def test_flags_that_belong_together(refuse, commands, generate, scoring, writing, policy, decisions):
    """An empty flag, such as that of an unset variable, never means that there is no policy."""
    for command, basis in ((commands.evaluate, scoring), (generate, writing)):
        bare = basis[:-1]
        refuse(command, [*bare, "--user=alice"], CONFIG, "--user=alice needs --policy")
        refuse(command, [*bare, "--decision_log=log"], CONFIG, "--decision_log=log needs --policy")
        refuse(command, [*bare, "--policy=", "--user=alice"], CONFIG, "--policy is empty")
        refuse(command, basis, CONFIG, "--user is empty or missing")
        refuse(command, [*basis, "--user="], CONFIG, "--user is empty")
        refuse(command, [*basis, "--user=alice", "--decision_log="], CONFIG, "--decision_log is empty")
        refuse(command, [*basis, "--user=alice", "--policy=missing.json"], CONFIG, "missing.json", "No such file")
        refuse(command, [*basis, "--user=alice", "--decision_log=gs://b/log"], CONFIG, "gs://b/log", "bucket")
    policy.write_text('{"format": 1, "users": {"alice": "all"}}')
    refuse(commands.evaluate, [*scoring, "--user=alice"], CONFIG, policy, "'alice'")
    assert decisions() == []


def test_the_log_has_another_place_or_there_is_no_answer(refuse, commands, scoring, tmp_path, decisions):
    log = tmp_path / "log.jsonl"
    result = commands.evaluate(*scoring, "--user=bob", f"--decision_log={log}")
    assert result.code == 0 and f"logged in {log}" in result.err
    assert json.loads(log.read_text())["granted"] == ["public"] and decisions() == []
    refuse(commands.evaluate, [*scoring, "--user=bob", f"--decision_log={tmp_path}/a/log"], STORAGE, f"{tmp_path}/a/log")
    log.write_bytes(b"\n" * 10_000)
    full = refuse(commands.evaluate, [*scoring, "--user=bob", f"--decision_log={log}"], STORAGE, log, max_bytes=8_000)
    assert "File too large" in full and log.read_bytes() == b"\n" * 10_000


def test_two_processes_decide_alike_and_one_logs(scoring, cache, decisions):
    granted = finish(start("evaluate", 2, [*scoring, "--mesh=data=4", "--user=dave", "--json"], cache))
    assert [code for code, _, _ in granted] == [0, 0], granted
    found = json.loads(granted[0][1].splitlines()[-1])
    assert {name for name, share in found["scores"]["math"]["shares"].items() if share != 0} == {"code"}
    refused = finish(start("evaluate", 2, [*scoring, "--mesh=data=4", "--user=frank"], cache))
    assert [code for code, _, _ in refused] == [POLICY, POLICY], refused
    assert all("'frank'" in err.splitlines()[-1] for _, _, err in refused)
    assert [row["user"] for row in decisions()] == ["dave", "frank"]
    other = finish(start("evaluate", 2, scoring, cache, lambda index: [f"--user={['dave', 'bob'][index]}"]))
    assert [code for code, _, _ in other] == [CONFIG, CONFIG] and "--user is bob, expected dave" in other[0][2]
    assert len(decisions()) == 2, "nothing is decided"
