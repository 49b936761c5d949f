"""The token sources of a job, from its config: what `stages` asks for by domain."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping

from etils import epath

from flexjax import config as config_lib
from flexjax import distributed, errors
from flexjax.data import builtin, cache, corpus
from flexjax.data import pipeline as pipeline_lib
from flexjax.data import tokenizer as tokenizer_lib
from flexjax.data import tokens as tokens_lib

PROGRESS_SECONDS = 10.0
SHOWN_DOCUMENTS = 5  # of those left out


class Corpora:
    """The token sources of a job: files found, tokenizer loaded or trained, text tokenised once.

    Args:
      config: the job.
      directory: holds data/{corpus,tokenizer,tokens}/, unless `data.cache_dir` names another place.
      tokenizer_file: the anchor's; None while there is no anchor yet.
      say: tells whoever watches what is going on.
    """

    def __init__(
        self,
        config: config_lib.Config,
        directory: epath.Path,
        tokenizer_file: epath.Path | None,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.data, self._say = config, config.data, say
        self.directory = epath.Path(config.data.cache_dir or directory / "data")
        self.root = config.data.root
        defaults = config_lib.DataConfig()
        if not self.root and (self.data.train_files, self.data.validation_files) == (
            defaults.train_files,
            defaults.validation_files,
        ):
            self.root = str(self.directory / "corpus")
            with distributed.main_first("corpus"):
                built = builtin.build(self.root)
            if built:
                say("corpus: built from the sources of installed packages")
        for domain in config.evaluation.domains:  # a missing file is told of now, not after the training
            corpus.expand(self.data.validation_files, self.root, domain)
        with distributed.main_first("tokenizer"):
            self.tokenizer_file = self._tokenizer_file(tokenizer_file)
        self.tokenizer = tokenizer_lib.load(self.tokenizer_file)

    def pattern(self, domain: str, split: str) -> str:
        """The file pattern of a domain, filled in."""
        pattern = self.data.train_files if split == "train" else self.data.validation_files
        return pattern.replace("{root}", self.root).replace("{domain}", domain)

    def source(self, domain: str, split: str = "train") -> tokens_lib.TokenSource:
        """The token source of a domain; `split` is "train" or "validation". Says what it leaves out, and how far it is."""
        pattern = self.data.train_files if split == "train" else self.data.validation_files
        paths = corpus.expand(pattern, self.root, domain)
        vocab_size, last = self.config.model.vocab_size, time.monotonic()

        def progress(documents: int, num_bytes: int) -> None:
            nonlocal last
            if time.monotonic() - last >= PROGRESS_SECONDS:
                last = time.monotonic()
                self._say(f"{domain}: {documents} documents of {split} tokenised, {num_bytes / 1e6:.0f} MB of text")

        with distributed.main_first("tokens"):
            source = tokens_lib.tokenize(paths, self.tokenizer, self.data, vocab_size, self.directory / "tokens", progress)
        if source.bad_documents:
            first = "; ".join(source.bad_documents[:SHOWN_DOCUMENTS])  # file, line and reason, never text
            self._say(f"{domain}: {len(source.bad_documents)} documents left out of {split}: first {first}")
        return source

    def pipeline(self, weights: Mapping[str, float], train: config_lib.TrainConfig) -> pipeline_lib.Pipeline:
        """The shuffled mixture of the domains with a weight above 0."""
        used = {domain: weight for domain, weight in weights.items() if weight > 0}
        return pipeline_lib.Pipeline(
            {domain: self.source(domain) for domain in used},
            used,
            self.data.seq_len,
            train.batch_size,
            self.config.seed,
            self.data.attend_across_documents,
            self.data.prefetch,
        )

    def _tokenizer_file(self, of_anchor: epath.Path | None) -> epath.Path:
        given = self.data.tokenizer
        if of_anchor is not None:
            if given and tokenizer_lib.load(given).digest != tokenizer_lib.load(of_anchor).digest:
                raise errors.ConfigError(
                    f"data.tokenizer={given} is not the anchor's tokenizer {of_anchor}; leave it empty to use the anchor's own"
                )
            return of_anchor
        if given:
            return tokenizer_lib.model_file(given)
        paths = corpus.expand(self.data.train_files, self.root, config_lib.PUBLIC)
        if not all(path.name.endswith(corpus.TEXT_SUFFIXES) for path in paths):
            raise errors.ConfigError("data.train_files are token files; name their tokenizer in data.tokenizer")
        made_of = [self.config.model.vocab_size, self.data.text_field, *map(cache.file_digest, paths)]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        file = self.directory / "tokenizer" / key / tokenizer_lib.SENTENCEPIECE_FILE
        if file.exists():
            return file
        self._say(f"tokenizer: training {self.config.model.vocab_size} pieces on public text")
        documents = corpus.documents(
            paths,
            text_field=self.data.text_field,
            max_document_mb=self.data.max_document_mb,
            bad_documents=self.data.bad_documents,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        tokenizer_lib.train((document.text for document in documents), self.config.model.vocab_size, file)
        return file
