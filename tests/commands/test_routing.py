"""`--routing=sequence` of evaluate and generate: what the library gives, never outside of what was granted, with its cost."""

import json
import math

import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax.data import tokens
from flexjax.eval import bits_per_byte
from flexjax.experts import models, store
from flexjax.inference import sequence
from flexjax.train import flops
from tests.commands import zygote
from tests.commands.conftest import SECRET
from tests.commands.processes import finish, start

CONFIG, POLICY = 2, 5
PROMPT = f"{SECRET} sum root"
ALL = ["public", "public+code", "public+math"]


@pytest.fixture(scope="module")
def generate(tmp_path_factory):
    process = zygote.Zygote("flexjax.generate", tmp_path_factory.mktemp("generate"))
    yield process
    process.close()


@pytest.fixture
def scoring(merged, corpus):
    text = f"--data=math={corpus}/math/validation.jsonl"
    return [f"--model={merged}", text, "--batch_size=2", "--seq_len=16", "--max_kilobytes=1"]


@pytest.fixture
def writing(merged):
    return [f"--model={merged}", f"--prompt={PROMPT}", "--max_new_tokens=4"]


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"format": 1, "users": {"alice": ["public", "math"], "bob": ["public"], "dave": ["code"]}}))
    return [f"--policy={path}", f"--decision_log={tmp_path}/log"]


def answer(command, arguments, *says):
    """The JSON of a command that says nothing but this on stderr."""
    result = command(*arguments, "--json")
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if "compilation included" not in line]
    assert len(lines) == len(says) and all(words in line for words, line in zip(says, lines, strict=True)), result.err
    return json.loads(result.out.splitlines()[-1]), result.out


@pytest.mark.parametrize("kind", sequence.KINDS)
def test_evaluate_gives_what_the_library_gives(commands, scoring, merged, corpus, tmp_path, kind):
    found, out = answer(commands.evaluate, [*scoring, "--routing=sequence", f"--sequence={kind}"])
    model = models.open_any(merged)
    architecture, params = models.load_any(model)
    scorer = bits_per_byte.Scorer(architecture, params, 16, 2)
    source = tokens.tokenize(
        [corpus / "math" / "validation.jsonl"], store.tokenizer(model.anchor), config_lib.DataConfig(), 320, tmp_path
    )
    masks = sequence.candidates(architecture.experts, architecture.experts)
    each = [scorer.tokens(source, 1000, mask) for mask in masks]
    nats, weights = sequence.combine(np.stack([one.nats for one in each]), each[0].starts, sequence.Settings(kind))
    score = found["scores"]["math"]
    assert score["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / each[0].document_bytes.sum(), rel=1e-5)
    assert list(score["shares"]) == ALL
    assert list(score["shares"].values()) == pytest.approx(weights.mean(axis=1).tolist(), abs=1e-4)
    assert (found["routing"], found["sequence"], found["experts"]) == ("sequence", kind, ["public", "code", "math"])
    cost = sum(flops.forward_per_token(architecture, 16, mask) for mask in masks)
    assert found["dense_passes"] == pytest.approx(cost / flops.forward_per_token(architecture, 16, ("public",)))
    assert len(masks) < found["dense_passes"] < 2 * len(masks)
    assert f"{found['dense_passes']:.2f} dense passes a token" in out and "public+math" in out.splitlines()[1]


def test_evaluate_by_token_says_what_it_costs(commands, scoring):
    plain, _ = answer(commands.evaluate, scoring)
    assert plain["routing"] == "token" and "sequence" not in plain
    assert set(plain["scores"]["math"]["shares"]) == {"public", "code", "math"}
    assert 1 < plain["dense_passes"] < 3


def test_generate_mixes_one_text(generate, writing, merged):
    for extra in (["--sequence=hard", "--temperature=0"], ["--temperature=2", "--top_k=9", "--seed=5"]):
        arguments = [*writing, "--routing=sequence", *extra]
        found, out = answer(generate, arguments)
        assert list(found["weights"]) == ALL and sum(found["weights"].values()) == pytest.approx(1, abs=1e-5)
        assert (found["routing"], found["sequence"]) == ("sequence", "hard" if "--sequence=hard" in extra else "mixture")
        prompt = store.tokenizer(models.open_any(merged).anchor).encode(PROMPT)
        assert found["forward_passes"] == len(ALL) * (len(prompt) + found["tokens"] + found["ended"])
        assert out.startswith(PROMPT + found["text"])
    again, _ = answer(generate, arguments)  # of the last ones, which draw
    assert (again["text"], again["weights"]) == (found["text"], found["weights"])
    plain, _ = answer(generate, writing)
    assert plain["routing"] == "token" and "weights" not in plain
    assert plain["forward_passes"] == len(prompt) + plain["tokens"] + plain["ended"]


def test_never_outside_of_what_was_granted(refuse, commands, generate, scoring, writing, policy):
    may = "policy: alice may use public, math"
    for command, basis in ((commands.evaluate, scoring), (generate, writing)):
        arguments = [*basis, "--routing=sequence"]
        granted, _ = answer(command, [*arguments, *policy, "--user=alice"], may)
        asked, _ = answer(command, [*arguments, "--experts=math,public"])
        shown = [
            found["scores"]["math"]["shares"] if command is commands.evaluate else found["weights"]
            for found in (granted, asked)
        ]
        assert list(shown[0]) == ["public", "public+math"] and shown[0] == shown[1]
        assert sum(shown[0].values()) == pytest.approx(1, abs=1e-5)
        without, _ = answer(command, [*arguments, "--experts=math,code"])
        shares = without["scores"]["math"]["shares"] if command is commands.evaluate else without["weights"]
        assert list(shares) == ["code", "math"]
        refuse(command, [*arguments, *policy, "--user=bob", "--experts=public,math"], POLICY, "'bob' may not use expert 'math'")
        refuse(command, [*arguments, "--experts=public,physics"], POLICY, "'physics'")


def test_nothing_to_choose_is_said(commands, generate, scoring, writing, anchor, policy):
    """With an anchor, or one expert, the answer is that of routing by token."""
    said = "warning: with public alone --routing=sequence has nothing to choose"
    for extra in ([f"--model={anchor}"], ["--experts=public"]):
        token, _ = answer(commands.evaluate, [*scoring, *extra])
        found, _ = answer(commands.evaluate, [*scoring, *extra, "--routing=sequence"], said)
        assert found == token and found["routing"] == "token" and found["dense_passes"] == pytest.approx(1)
    written, _ = answer(generate, [*writing, "--experts=public", "--routing=sequence"], said)
    assert written["routing"] == "token" and "weights" not in written
    dave = [*scoring, *policy, "--user=dave", "--routing=sequence"]
    assert answer(commands.evaluate, dave, "policy: dave may use code", "warning: with code alone")[0]["routing"] == "token"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--routing=document"], ["--routing=document", "token|sequence"]),
        (["--routing="], ["--routing=", "token|sequence"]),
        (["--routing=sequence", "--sequence=soft"], ["--sequence=soft", "mixture|hard"]),
        (["--sequence=hard"], ["--sequence=hard needs --routing=sequence"]),
        (["--routing=token", "--sequence=mixture"], ["--sequence=mixture needs --routing=sequence"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_values(refuse, commands, generate, scoring, writing, arguments, says):
    for command, basis in ((commands.evaluate, scoring), (generate, writing)):
        refuse(command, [*basis, *arguments], CONFIG, *says)


@pytest.mark.slow
def test_two_processes_score_as_one(commands, scoring, cache):
    arguments = [*scoring, "--routing=sequence", "--json"]
    found = finish(start("evaluate", 2, [*arguments, "--mesh=data=4"], cache))
    assert [code for code, _, _ in found] == [0, 0], found
    alone, _ = answer(commands.evaluate, [*arguments, "--batch_size=4"])
    together = json.loads(found[0][1].splitlines()[-1])
    for name, score in alone["scores"].items():
        assert together["scores"][name]["bits_per_byte"] == pytest.approx(score["bits_per_byte"], rel=1e-5)
        assert together["scores"][name]["shares"] == pytest.approx(score["shares"], abs=1e-4)
    differ = finish(start("evaluate", 2, scoring, cache, lambda index: [f"--routing={['token', 'sequence'][index]}"]))
    assert [code for code, _, _ in differ] == [CONFIG, CONFIG] and "--routing is sequence, expected token" in differ[0][2]
