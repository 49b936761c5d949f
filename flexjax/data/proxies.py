"""Proxy data: the public documents that look most like an owner's (FlexOlmo, router tuning).

A small classifier of owner against public text scores each public document by its log-odds; those that score highest stand in
for the owner's text where a router is tuned. Public text may hold nothing like it, and then the least foreign documents teach
the router wrongly: so they are refused where half of the chosen have log-odds below 0.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int
from sklearn import linear_model

from flexjax import errors
from flexjax.data import tokens as tokens_lib

LEAST_DOCUMENTS = 20  # on either side: each half of them has to teach a classifier and to test another
MOST_DOCUMENTS = 4000  # of a class, behind one classifier
OPENING = 2048  # leading tokens of a document that are counted
COLUMNS = 2**17  # token ids of a larger vocabulary share them
BATCH = 2000  # documents scored at a time
FOLDS = 2

Documents = Iterable[Int[np.ndarray, " tokens"]]


class Classifier:
    """Multinomial logistic regression over counts of token ids, every class weighing the same.

    Args:
      texts: documents by class, as token ids.

    Attributes:
      names: the classes, in the order of `texts`.

    Raises:
      ConfigError: there are fewer than two classes.
    """

    def __init__(self, texts: Mapping[str, Documents]) -> None:
        self.names = tuple(texts)
        if len(self.names) < 2:
            raise errors.ConfigError(f"a classifier needs two classes, got {', '.join(self.names) or 'none'}; name another")
        parts = [features(documents) for documents in texts.values()]
        labels = np.repeat(np.arange(len(parts)), [part.shape[0] for part in parts])
        counts = scipy.sparse.vstack(parts, format="csr")
        self._columns = np.unique(counts.indices)  # tokens that no class uses would only cost time
        self._model = linear_model.LogisticRegression(class_weight="balanced", max_iter=2000)
        self._model.fit(counts[:, self._columns], labels)

    def scores(self, documents: Documents) -> Float[np.ndarray, "N classes"]:
        """Log-probabilities but for a constant of each document: differences are log-odds."""
        found = self._model.decision_function(features(documents)[:, self._columns])
        return np.stack([np.zeros_like(found), found], axis=1) if found.ndim == 1 else found


def features(documents: Documents) -> scipy.sparse.csr_matrix:
    """log(1 + count) of each token id, scaled to length 1: [N, COLUMNS], so that long documents say no more than short ones."""
    columns, values, ends = [np.zeros(0, np.int64)], [np.zeros(0)], [0]
    for ids in documents:
        found, counts = np.unique(ids[:OPENING] % COLUMNS, return_counts=True)
        weights = np.log1p(counts)
        columns.append(found.astype(np.int64))
        values.append(weights / max(1e-12, float(np.linalg.norm(weights))))
        ends.append(ends[-1] + len(found))
    parts = np.concatenate(values), np.concatenate(columns), np.array(ends)
    return scipy.sparse.csr_matrix(parts, shape=(len(ends) - 1, COLUMNS))


@dataclasses.dataclass(frozen=True)
class Mined:
    """What was found.

    Attributes:
      documents: numbers of the chosen public documents, the most alike first.
      log_odds: of each, owner against public, by a classifier that was not shown it.
      accuracy: of the classifiers on documents that they were not shown, mean over the two classes.
    """

    documents: Int[np.ndarray, " C"]
    log_odds: Float[np.ndarray, " C"]
    accuracy: float


def mine(public: tokens_lib.TokenSource, owner: tokens_lib.TokenSource, count: int, seed: int) -> Mined:
    """Finds the `count` public documents of highest log-odds "owner's against public".

    Both texts are dealt into halves, and each half is scored by the classifier that the other one taught, with at most
    `MOST_DOCUMENTS` of a class: a look-alike that a classifier was told is public would score low for that reason alone.

    Args:
      public, owner: text in one tokenizer; only the first `OPENING` tokens of a document count.
      count: how many are wanted.
      seed: deals the documents.

    Raises:
      ConfigError: the texts come from different tokenizers, or no document is wanted.
      DataError: too few documents; or the median log-odds of the chosen is below 0, so that most are more public than owner's.
    """
    if public.tokenizer_digest != owner.tokenizer_digest:
        raise errors.ConfigError("proxy mining: public and owner's text come from different tokenizers; tokenise them alike")
    if count < 1:
        raise errors.ConfigError(f"proxy mining: count={count} must be at least 1; leave mining out where none is wanted")
    least = max(count, LEAST_DOCUMENTS)
    for what, source, needed in (("public", public, least), ("owner's", owner, LEAST_DOCUMENTS)):
        if (found := source.num_documents) < needed:
            raise errors.DataError(
                f"proxy mining: {found} {what} documents, expected at least {needed}; give more or ask for fewer"
            )
    rng, sources = np.random.default_rng(seed), {"public": public, "owner": owner}
    folds = {name: rng.permutation(np.arange(source.num_documents) % FOLDS) for name, source in sources.items()}
    odds = {name: np.zeros(len(fold)) for name, fold in folds.items()}
    for fold in range(FOLDS):
        shown = {name: rng.permutation(np.flatnonzero(folds[name] != fold))[:MOST_DOCUMENTS] for name in sources}
        model = Classifier({name: openings(source, shown[name]) for name, source in sources.items()})
        for name, source in sources.items():
            hidden = np.flatnonzero(folds[name] == fold)
            for part in np.split(hidden, range(BATCH, len(hidden), BATCH)):
                scores = model.scores(openings(source, part))
                odds[name][part] = scores[:, 1] - scores[:, 0]
    chosen = np.argsort(-odds["public"], kind="stable")[:count]
    median, positive = float(np.median(odds["public"][chosen])), int(np.sum(odds["public"] > 0))
    if median < 0:
        raise errors.DataError(
            f"proxy mining: the {count} public documents most like the owner's have median log-odds {median:.2f}, expected at "
            f"least 0 ({positive} of {len(odds['public'])} are above); sample text from the experts, or ask for donated text"
        )
    accuracy = (float(np.mean(odds["public"] < 0)) + float(np.mean(odds["owner"] > 0))) / 2
    return Mined(chosen, odds["public"][chosen], accuracy)


def openings(
    source: tokens_lib.TokenSource, documents: Iterable[int], length: int = OPENING
) -> Iterator[Int[np.ndarray, " tokens"]]:
    """The first tokens of some documents, at most `length` of each."""
    for document in documents:
        start, stop = source.documents[int(document)].tolist()
        yield source.read(start, min(stop, start + length))
