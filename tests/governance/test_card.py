"""The card: what manifests state and nothing else, the same bytes every time, and no word of a stranger that is markup."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flexjax import errors, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.governance import card

HOSTILE = [
    '"\n---\nlicense: mit\n---\n# Trusted',
    "x\nlicense: mit",
    "---",
    "`` ` ``` `code`",
    "<script>alert(1)</script>",
    "<!-- hidden",
    "![x](https://evil.example/x.png)",
    "[click](javascript:alert(1))",
    "https://evil.example www.evil.example a@evil.example @user #1",
    "| a | b |\n|---|---|",
    "\\| \\` \\",
    "# Heading\r\n> quote\r- list\u2028new\u2029line\x85end",
    "**Differential privacy: strong**",
    "&lt;b&gt; &#96; &vert;",
    "\u202eflipped\u202c \u200b \ufeff \x00\x1b[31m \x7f",
    "*emphasis* _too_ ~~gone~~ $x$ {{ jinja }} {% raw %}",
    "!!python/object/apply:os.system [echo]",
    "&anchor *alias %TAG",
    "\ud800",
    "\U0001f600 Universit\u00e4tsklinikum \u5317\u4eac",
    "x" * 5000,
    "",
    "   ",
]


def entry(*shape):
    return {"dtype": "float32", "shape": list(shape), "slices": [], "max": 1.0, "rms": 0.5}


ANCHOR = {
    "kind": "anchor",
    "format": 2,
    "code": "flexjax 0.1.0",
    "model": {"num_layers": 2, "d_model": 8, "d_ff": 6, "vocab_size": 11, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4},
    "tokenizer": None,
    "rows": "mean",
    "tensors": {"embed/embedding": entry(11, 8), "statistics/states": entry(2, 999, 8)},
    "training": {"steps": 3, "tokens": 12_345_678, "flops": 1.5e21, "seed": 0},
    "digest": "a" * 64,
}


def expert(name="math", *, d_ff=6, rank=0, licence="CC-BY-4.0", **fields):
    return {
        "kind": "expert",
        "format": 2,
        "code": "flexjax 0.1.0",
        "name": name,
        "owner": "A university",
        "version": 2,
        "anchor": "a" * 64,
        "config": "b" * 64,
        "tokenizer": "",
        "d_ff": d_ff,
        "rank": rank,
        "tensors": {"expert/ffn/gate": entry(2, 8, d_ff), "expert/router/row": entry(2, 8), "expert/router/bias": entry(2)},
        "training": {"steps": 5, "tokens": 2_000_000, "flops": 3e18, "seed": 1},
        "data": {"documents": 4321, "digest": "c" * 64, "public_fraction": 0.05} | ({"licence": licence} if licence else {}),
        "evaluation": {"math": {"bits_per_byte": 1.8324, "anchor": 2.119}},
        "privacy": {"dp": "none"},
        "margins": None,
        "parent": None,
        "digest": tree.sha256(name.encode()),
    } | fields


def merged(*bundles, **fields):
    """The arguments of `card.text` for a model."""
    named = {bundle["name"]: bundle for bundle in bundles}
    manifest = {
        "kind": "model",
        "format": 2,
        "anchor": "a" * 64,
        "experts": {name: bundle["digest"] for name, bundle in named.items()},
        "top_k": 2,
        "calibration": {},
        "shared": None,
        "digest": "d" * 64,
    }
    return manifest | fields, ANCHOR, named


def front(text):
    """The front matter, as a reader of YAML has it, and the rest."""
    _, block, rest = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(block), rest


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_a_bundle():
    text = card.text(expert())
    matter, rest = front(text)
    assert matter == {
        "license": "cc-by-4.0",
        "library_name": "flexjax",
        "model_name": "math",
        "tags": ["flexjax", "flexolmo", "mixture-of-experts", "expert"],
    }
    digest = expert()["digest"]
    row = "| `math` | `A university` | `2` | `" + digest + "` | d_ff 6 | 114 | `CC-BY-4.0` | 4,321 |"
    assert row in rest
    assert "| `math` | 5 | 2,000,000 | 3e+18 | `1` | 0.05 | `flexjax 0.1.0` |" in rest
    assert "| `math` | `math` | 1.832 | 2.119 |" in rest
    assert "**Differential privacy: NONE.**" in rest
    assert "merge verify --trusted_keys" in rest and "signature |" not in rest


def test_an_anchor():
    matter, rest = front(card.text(ANCHOR))
    assert matter["model_name"] == "flexjax-anchor-aaaaaaaaaaaa" and "license" not in matter
    assert "| parameters of the anchor | 88 |" in rest and "12,345,678" in rest and "## Experts" not in rest
    assert "**Differential privacy: NONE.**" in rest


def test_a_model_of_all_sizes():
    bundles = [expert("math"), expert("code", d_ff=3), expert("law", rank=2)]
    text = card.text(*merged(*bundles))
    matter, rest = front(text)
    assert matter["license"] == "cc-by-4.0" and matter["model_name"] == "flexjax-model-dddddddddddd"
    experts = section(rest, "Experts")
    assert "full, d_ff 6" in experts and "narrow, d_ff 3" in experts and "low-rank, r 2" in experts
    assert experts.index("`code`") < experts.index("`law`") < experts.index("`math`")
    assert "`public` | 3 | 12,345,678" in section(rest, "Training")
    assert "experts active for a token (top k) | `2`" in rest


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["Apache-2.0", "apache-2.0"], {"license": "apache-2.0"}),
        (["MIT", "MIT"], {"license": "mit"}),
        (["MIT", "CC-BY-4.0"], {"license": "other"}),
        (["MIT", ""], {"license": "other"}),
        (["", ""], {}),
        (["For hospitals (2024) only"] * 2, {"license": "other", "license_name": "for-hospitals-2024-only"}),
        (["no\nlicense_link: x"] * 2, {"license": "other", "license_name": "no-license-link-x"}),
    ],
)
def test_licences(licences, expected):
    bundles = [expert(name, licence=licence) for name, licence in zip(("math", "code"), licences, strict=True)]
    text = card.text(*merged(*bundles))
    matter, rest = front(text)
    assert {key: value for key, value in matter.items() if key.startswith("license")} == expected
    for licence in (licence for licence in licences if licence and licence.isprintable()):
        assert f"`{licence}`" in rest
    assert ("`not stated`" in section(rest, "Experts")) == ("" in licences)


def test_privacy_is_said_loudly():
    private = expert("math", privacy={"dp": "DP-SGD", "epsilon": 4.0, "delta": 1e-6})
    text = section(card.text(private), "Privacy")
    assert "NONE" not in text and "`DP-SGD`, epsilon 4, delta 1e-06" in text and "as its owner states" in text
    both = section(card.text(*merged(private, expert("code"))), "Privacy")
    assert "**Differential privacy: NONE.** This holds for `code`." in both and "of `math`" in both
    for stated in ({}, {"dp": "very"}, {"dp": "none", "epsilon": 1.0}, {"dp": "None"}):
        assert "**Differential privacy: NONE.**" in card.text(expert(privacy=stated)), stated
    margins = {"quantiles": [0.1], "values": [[0.5], [0.5]]}
    assert "margin on private text" in card.text(expert(margins=margins)) and "margin on private" not in card.text(expert())


def test_what_ties_experts_together():
    tuned = {"steps": 1, "router_tuned_with": ["code", "math"]}
    calibration = {
        "math": {"bias": [-1.0, 0.0], "share": 0.1, "text": "e" * 64, "with": []},
        "code": {"bias": [-1.0, 0.0], "share": 0.2, "text": "e" * 64, "with": ["law", "math"]},
    }
    shared = {"digest": "f" * 64, "experts": ["code", "math"]}
    arguments = merged(expert("math", training=tuned), expert("code"), calibration=calibration, shared=shared)
    text = section(card.text(*arguments), "Routing and what ties experts together")
    assert "`math`: its router was tuned with `code` present" in text
    assert "`math`: bias calibrated from the anchor, public text and it alone; share of public text 0.1" in text
    assert "`code`: bias calibrated jointly with `law`, `math`" in text
    assert "Shared leaves are averages over `code`, `math`" in text
    unfrozen = expert(tensors=expert()["tensors"] | {"shared/head/kernel": entry(8, 11)})
    assert "`math`: carries leaves of the anchor that its training unfroze, 1 of them" in card.text(unfrozen)
    free = card.text(*merged(expert("math"), expert("code")))
    assert "No router was tuned" in free and "does not undo router tuning" in free
    assert "soft-deleted" in free and "No check can prove an expert benign" in free


def test_signatures_if_given():
    arguments = merged(expert("math"), expert("code"))
    text = card.text(*arguments, signatures={"math": "signed by key 1234"})
    assert "| signature |" in text and "`signed by key 1234` |" in text and "`not looked at` |" in text


def shape(text):
    """Everything but the words in code spans and quotes."""
    return re.sub(r"`[^`\n]*`|\"(?:[^\"\\\n]|\\.)*\"", "_", text)


def check_harmless(word):
    """A card with a stranger's word everywhere has the structure of one with a plain word."""

    def build(word):
        bundle = expert(
            owner=word, licence=word or "x", code=word, evaluation={word: {"bits_per_byte": 1.0}},
            privacy={"dp": word, "epsilon": 1.0, "delta": 0.1}, parent={"digest": word, "by": word},
            training={"seed": word, "steps": word, "tokens": word, "flops": word, "router_tuned_with": [word]},
        )  # fmt: skip
        return card.text(*merged(bundle), signatures={"math": word}), card.text(bundle)

    for hostile, plain in zip(build(word), build("plain"), strict=True):
        matter, _ = front(hostile)
        assert set(matter) <= {"license", "license_name", "library_name", "model_name", "tags"}
        assert matter["license"] in {"other", *card.LICENCES} and matter["library_name"] == "flexjax"
        assert all(isinstance(value, str | list) for value in matter.values())
        assert shape(front(hostile)[1]) == shape(front(plain)[1])
        assert "<" not in hostile and not re.search(r"[^\n -~]", shape(hostile))
        assert not set(hostile) & set("\r\x00\x1b\x85\u2028\u2029\u202e\u200b\ufeff")
        hostile.encode()


@pytest.mark.parametrize("word", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_words_stay_words(word):
    check_harmless(word)


@given(st.text(max_size=40))
def test_any_word_stays_a_word(word):
    check_harmless(word)


def test_front_matter_reads_back_whatever_is_quoted():
    for word in HOSTILE:
        quoted = card._front(word, "expert", {})
        assert front(quoted + "\n")[0]["model_name"] == card._plain(word)


def test_visible_words_are_kept():
    assert "`Universit\u00e4t \u5317\u4eac`" in card.text(expert(owner="Universit\u00e4t \u5317\u4eac"))
    assert "(U+202E)" in card.text(expert(owner="\u202ex")) and "(U+003C)b(U+003E)" in card.text(expert(owner="<b>"))


def test_the_same_manifests_give_the_same_bytes():
    manifest, anchor, bundles = merged(expert("math"), expert("code", d_ff=3), expert("law", rank=2))
    expected = card.text(manifest, anchor, bundles)
    shuffled = {name: dict(reversed(bundles[name].items())) for name in reversed(bundles)}
    assert card.text(dict(reversed(manifest.items())), anchor, shuffled) == expected
    code = (
        "import json, sys; from flexjax.governance import card; "
        "sys.stdout.buffer.write(card.text(*json.load(sys.stdin)).encode())"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([manifest, anchor, bundles]).encode(),
        env=os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        capture_output=True,
        check=True,
    )
    assert said.stdout.decode() == expected


def test_writing_and_checking(tmp_path):
    sealed = manifest_lib.seal({key: value for key, value in expert().items() if key not in ("format", "code", "digest")})
    shapes = {"gate": (2, 8, 6), "up": (2, 8, 6), "down": (2, 6, 8)}
    tensors = {f"expert/ffn/{name}": entry(*shape) for name, shape in shapes.items()}
    tensors |= {"expert/router/row": entry(2, 8), "expert/router/bias": entry(2)}
    for tensor in tensors.values():
        tensor["slices"] = ["0" * 64] * 2
    sealed = manifest_lib.seal({key: v for key, v in sealed.items() if key not in ("format", "digest")} | {"tensors": tensors})
    manifest_lib.write(tmp_path / "bundle", sealed)
    assert not card.check(tmp_path / "bundle")
    path = card.write(tmp_path / "bundle")
    assert path.read_text() == card.text(sealed) and card.check(tmp_path / "bundle")
    assert sorted(os.listdir(tmp_path / "bundle")) == ["README.md", "manifest.json"]
    card.write(tmp_path / "bundle")  # again
    path.write_text(path.read_text().replace("NONE", "strong"))
    with pytest.raises(errors.IntegrityError, match=r"README\.md is not the card that its manifests generate"):
        card.check(tmp_path / "bundle")
    assert card.withdraw(tmp_path / "bundle") and not card.withdraw(tmp_path / "bundle") and not path.exists()
    os.symlink("manifest.json", path)
    with pytest.raises(errors.IntegrityError, match=r"README\.md"):
        card.check(tmp_path / "bundle")
