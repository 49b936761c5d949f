"""Proxy mining: planted look-alikes are found, and where there is nothing alike nothing is given."""

import numpy as np
import pytest

from flexjax import errors
from flexjax.data import proxies, tokens

PUBLIC, OWNER = (2, 60), (62, 120)  # the ids of which their documents mostly consist
COMMON = (120, 150)


class Source(tokens.TokenSource):
    """Documents of given vocabularies, in memory."""

    def __init__(self, kinds, seed=0, tokenizer_digest="t", own=0.5):
        rng = np.random.default_rng(seed)
        pieces = [np.array([1])]
        for low, high in kinds:
            length = int(rng.integers(20, 120))
            ids = np.where(rng.random(length) < own, rng.integers(low, high, length), rng.integers(*COMMON, length))
            pieces += [ids, [1]]
        tokenizer = type("Tokenizer", (), {"eos_id": 1, "digest": tokenizer_digest})()
        super().__init__([np.concatenate(pieces).astype(np.uint16)], tokenizer, f"{seed}")


@pytest.fixture(scope="module")
def planted():
    """400 public documents, of which every tenth is like an owner's."""
    return Source([OWNER if i % 10 == 3 else PUBLIC for i in range(400)])


@pytest.fixture(scope="module")
def owner():
    return Source([OWNER] * 150, seed=1)


def test_look_alikes_are_found(planted, owner):
    found = proxies.mine(planted, owner, count=30, seed=0)
    assert len(found.documents) == len(set(found.documents.tolist())) == 30
    assert (found.documents % 10 == 3).all()
    assert (found.log_odds > 0).all() and (np.diff(found.log_odds) <= 0).all()
    assert 0.9 < found.accuracy < 0.99  # a tenth of public text is not told from the owner's


def test_the_same_seed_finds_the_same(planted, owner):
    first, again, other = (proxies.mine(planted, owner, count=30, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.documents, again.documents)
    np.testing.assert_array_equal(first.log_odds, again.log_odds)
    assert not np.array_equal(first.log_odds, other.log_odds)
    assert len(set(first.documents) & set(other.documents)) > 15


def test_nothing_alike_is_refused(owner):
    with pytest.raises(
        errors.DataError, match=r"median log-odds -\d.*; sample text from the experts, or ask for donated"
    ) as found:
        proxies.mine(Source([PUBLIC] * 200, seed=2), owner, count=20, seed=0)
    assert "(0 of 200 are above)" in str(found.value) and "\n" not in str(found.value)


def test_the_median_of_the_chosen_decides(planted, owner):
    """40 look-alikes: among 70 chosen they are the majority, among 100 they are not."""
    assert np.median(proxies.mine(planted, owner, count=70, seed=0).log_odds) > 0
    with pytest.raises(errors.DataError, match="the 100 public documents"):
        proxies.mine(planted, owner, count=100, seed=0)


def test_text_of_one_kind_cannot_be_told_apart():
    found = proxies.mine(Source([PUBLIC] * 200, seed=3), Source([PUBLIC] * 200, seed=4), count=20, seed=0)
    assert 0.4 < found.accuracy < 0.6


def test_much_public_text_does_not_outweigh_little_of_the_owner():
    found = proxies.mine(Source([PUBLIC] * 500 + [OWNER] * 5), Source([OWNER] * 20, seed=1), count=5, seed=0)
    assert sorted(found.documents.tolist()) == list(range(500, 505))


def test_too_little_text_is_refused(planted, owner):
    with pytest.raises(errors.DataError, match="400 public documents, expected at least 401"):
        proxies.mine(planted, owner, count=401, seed=0)
    with pytest.raises(errors.DataError, match="19 owner's documents, expected at least 20"):
        proxies.mine(planted, Source([OWNER] * 19), count=10, seed=0)


@pytest.mark.parametrize("count", [0, -3])
def test_no_documents_are_not_mined(planted, owner, count):
    with pytest.raises(errors.ConfigError, match=f"count={count} must be at least 1"):
        proxies.mine(planted, owner, count=count, seed=0)


def test_two_tokenizers_are_refused(planted):
    with pytest.raises(errors.ConfigError, match="different tokenizers"):
        proxies.mine(planted, Source([OWNER] * 50, tokenizer_digest="u"), count=10, seed=0)


def test_features_forget_length_and_fold_large_ids():
    ids = np.array([3, 5, 5, 7])
    found = proxies.features([ids, ids + proxies.COLUMNS, np.zeros(0, np.int32)]).toarray()
    assert found.shape == (3, proxies.COLUMNS)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 0])
    assert found[0, 5] > found[0, 3] == found[0, 7] > 0 and np.count_nonzero(found[0]) == 3


def test_openings_stop_where_the_document_does(owner):
    for index, ids in enumerate(proxies.openings(owner, range(10), 30)):
        np.testing.assert_array_equal(ids, owner.document(index)[:30])


def test_a_classifier_keeps_the_order_of_its_classes():
    texts = {
        name: list(proxies.openings(Source([kind] * 40, seed=5), range(40))) for name, kind in (("z", PUBLIC), ("a", OWNER))
    }
    found = proxies.Classifier(texts)
    assert found.names == ("z", "a")
    for index, documents in enumerate(texts.values()):
        assert (found.scores(documents).argmax(axis=1) == index).all()
    with pytest.raises(errors.ConfigError, match="two classes, got z"):
        proxies.Classifier({"z": texts["z"]})
