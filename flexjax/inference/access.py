"""Who may use which experts: an operator's policy, decided for each request. Nothing is allowed that it does not say.

    {"format": 1, "users": {"alice": ["public", "math"], "bob@example.org": ["public"]}}

What a request may use is what the policy gives AND what was asked for AND what the model has. A name that is missing in one of
them is refused, never dropped: whoever gets an answer gets it from exactly the experts that the decision names. Every decision
is one line of a log, refusals too. It holds names, digests and the time, nothing of a text.
"""

import dataclasses
import datetime
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterable
from typing import Any

from etils import epath

from flexjax import config as config_lib
from flexjax import distributed, errors, storage, tree, workdir
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models
from flexjax.model import router

FORMAT = 1
FIELDS = {"format", "users"}
MAX_BYTES = 2**20
USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
NO_NAME = "(not a name)"  # stands in a log and a message for what may be anything, a text for instance


@dataclasses.dataclass(frozen=True)
class Policy:
    """What each user may use.

    Attributes:
      users: names of experts by user; whoever is missing, or has none, may use nothing.
      digest: SHA-256 of the policy file's bytes.
      source: where it was read, for messages.
    """

    users: dict[str, tuple[str, ...]]
    digest: str
    source: str


@dataclasses.dataclass(frozen=True)
class Decision:
    """What one request may use. A refusal grants nothing, and no mask can be made of nothing.

    Attributes:
      user: who asked.
      requested: the experts that were asked for; None: all that the policy gives.
      granted: the experts that may be used, in canonical order; empty if refused.
      policy, model: digests of the policy file and of the model's manifest.
      time: of the decision, ISO 8601, UTC.
      refusal: why nothing was granted; empty if something was.
    """

    user: str
    requested: tuple[str, ...] | None
    granted: tuple[str, ...]
    policy: str
    model: str
    time: str
    refusal: str = ""


def load(path: epath.PathLike) -> Policy:
    """Reads a policy file.

    Raises:
      ConfigError: it cannot be read or is not exactly of the form above.
    """
    data, stated = read_rules(path, "policy", FIELDS)
    if type(stated.get("format")) is not int or stated["format"] != FORMAT:
        raise errors.ConfigError(f"policy {path} has format {str(stated.get('format'))[:20]}, expected {FORMAT}")
    users = stated.get("users")
    if not isinstance(users, dict):
        raise errors.ConfigError(f'policy {path}: users must be an object, for instance {{"alice": ["public", "math"]}}')
    for user, experts in users.items():
        if not USER.fullmatch(user):
            raise errors.ConfigError(
                f"policy {path}: user {user[:40]!r} must be 1 to 128 characters of a-z, A-Z, 0-9, '.', '_', '@', '+', '-', "
                "starting with a letter or digit"
            )
        named = isinstance(experts, list) and all(
            isinstance(name, str) and manifest_lib.NAME.fullmatch(name) for name in experts
        )
        if not named or len(set(experts)) != len(experts):
            raise errors.ConfigError(f"policy {path}: user '{user}' must have a list of names of experts, each once")
    return Policy({user: tuple(experts) for user, experts in users.items()}, tree.sha256(data), str(path))


def read_rules(path: epath.PathLike, what: str, fields: set[str]) -> tuple[bytes, dict[str, Any]]:
    """Reads a JSON object of rules that an operator wrote: at most 1 MiB, no key twice, no unknown field.

    Args:
      path: a file; unlike one of a stranger's directory it may be a link or a pipe.
      what: it is, for messages.
      fields: it may have.

    Returns its bytes and its members, of which none need be there.

    Raises:
      ConfigError: it cannot be read, or is anything else.
    """
    try:
        if workdir.is_local(path):
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        else:
            data = storage.read_small(epath.Path(path), MAX_BYTES)
        if len(data) > MAX_BYTES:
            raise errors.ConfigError(f"{what} {path} has more than {MAX_BYTES} bytes; is it the right file?")
        stated = tree.strict_json(data)
        if not isinstance(stated, dict):
            raise ValueError("not an object")
    except OSError as error:
        raise errors.ConfigError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise errors.ConfigError(f"{what} {path} is not a JSON object of its form: {error}; correct the file") from None
    for field in sorted(set(stated) - fields):
        raise errors.ConfigError(f"{what} {path}: field {field[:40]!r} is unknown; it has {', '.join(sorted(fields))}")
    return data, stated


def decide(policy: Policy, user: str, requested: Iterable[str] | None, known: Iterable[str], model: str = "") -> Decision:
    """Decides what a request may use; a refusal is a decision too.

    Args:
      policy: of the operator.
      user: who asks.
      requested: experts; None: all that the policy gives this user.
      known: the model's experts, `public` among them.
      model: digest of its manifest.
    """
    asked = None if requested is None else tuple(requested)
    given = policy.users.get(user, ())
    refusal = _refusal(policy, user, asked, set(known))
    granted = () if refusal else router.canonical_order(set(given if asked is None else asked))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    shown = None if asked is None else tuple(_name(expert) for expert in asked)
    return Decision(user if USER.fullmatch(user) else NO_NAME, shown, granted, policy.digest, model, now, refusal)


def _refusal(policy: Policy, user: str, asked: tuple[str, ...] | None, known: set[str]) -> str:
    """Why a request gets nothing, or an empty string."""
    if user not in policy.users:
        shown = f"'{user}'" if USER.fullmatch(user) else NO_NAME
        return f"user {shown} is unknown to policy {policy.source}; nobody may use what it does not give"
    given = policy.users[user]
    if not given:
        return f"policy {policy.source} gives user '{user}' no expert"
    if lost := sorted(set(given) - known):
        return (
            f"policy {policy.source} gives user '{user}' {_quoted(lost)}, unknown to this model; "
            "correct the policy or take the model it was written for"
        )
    if asked is None:
        return ""
    if not asked:
        return f"user '{user}' asks for no expert; name at least one of {', '.join(given)}"
    if unknown := sorted(set(asked) - known):
        return f"user '{user}' asks for unknown {_quoted(unknown)}; policy {policy.source} gives {', '.join(given)}"
    if forbidden := sorted(set(asked) - set(given)):
        return f"user '{user}' may not use {_quoted(forbidden)}; policy {policy.source} gives {', '.join(given)}"
    return ""


def _name(expert: str) -> str:
    return expert if manifest_lib.NAME.fullmatch(expert) else NO_NAME


def _quoted(experts: list[str]) -> str:
    return f"expert{'s' * (len(experts) > 1)} {', '.join(f"'{_name(expert)}'" for expert in experts)}"


def log(decision: Decision, path: epath.PathLike) -> None:
    """Appends a decision to a log, as one line of JSON that is on disk when this returns; several processes may write one.

    Raises:
      ConfigError: the log lies in a bucket, where nothing can be appended. StorageError: it cannot be written.
    """
    _check_local(path)
    record = {name: value for name, value in dataclasses.asdict(decision).items() if name != "refusal" or value}
    line = json.dumps(record).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("it is no regular file")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # behind what a full disk cut short
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not size:
            workdir.sync(os.path.dirname(os.path.abspath(path)))
    except OSError as error:
        raise errors.StorageError(
            f"cannot log a decision in {path}: {error.strerror or error}; nothing is answered that is not logged"
        ) from None


def _check_local(path: epath.PathLike) -> None:
    if not workdir.is_local(path):
        raise errors.ConfigError(
            f"a log of decisions cannot lie in a bucket: {path}; pass --decision_log=FILE with a local file"
        )


def enforce(decision: Decision, path: epath.PathLike) -> None:
    """Logs a decision, by process 0 of several, which must all have decided alike.

    Raises:
      PolicyError: it is a refusal. ConfigError: a process decided otherwise. StorageError: it cannot be logged.
    """
    distributed.agree({"the policy": decision.policy, "granted": ", ".join(decision.granted) or "nothing"})
    if distributed.is_main():
        log(decision, path)
    if decision.refusal:
        raise errors.PolicyError(decision.refusal)


def admit(
    model: models.Model,
    requested: Iterable[str] | None,
    policy: epath.PathLike | None,
    user: str | None,
    decisions: epath.PathLike | None,
) -> Decision | None:
    """The decision about one run of a command, from manifests alone, logged and said; None without a policy.

    Args:
      model: an open one, the very one that is then read.
      requested: as for `decide`.
      policy, user, decisions: values of the flags --policy, --user and --decision_log, None where they were not given.

    Raises:
      ConfigError: one flag is given without the other. Others as `enforce`.
    """
    if policy is None:
        for flag, value in {"--user": user, "--decision_log": decisions}.items():
            if value is not None:
                raise errors.ConfigError(
                    f"{flag}={value!s:.80} needs --policy=FILE; without a policy there is nothing to decide"
                )
        return None
    for flag, value in {"--policy": policy, "--user": user, "--decision_log": decisions}.items():
        if value == "" or (flag == "--user" and value is None):
            raise errors.ConfigError(f"{flag} is empty or missing; a policy is asked with --policy=FILE --user=NAME")
    path = f"{os.fspath(policy)}.decisions.jsonl" if decisions is None else os.fspath(decisions)
    _check_local(path)
    rules = load(policy)
    known = router.canonical_order((config_lib.PUBLIC, *model.bundles))
    decision = decide(rules, user or "", requested, known, model.tree_digest)
    enforce(decision, path)
    distributed.say(f"policy: {decision.user} may use {', '.join(decision.granted)}; logged in {path}")
    return decision
