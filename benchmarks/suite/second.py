"""The second suite: other ways of merging, experts of other sizes, and what each part of our recipe is worth."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.suite import methods, models, scoring, suites, training
from flexjax import baselines, presets, stages, tree
from flexjax import config as config_lib
from flexjax.data import proxies
from flexjax.eval import mixtures
from flexjax.experts import surgery
from flexjax.train import flops

PUBLIC = config_lib.PUBLIC
Table = dict[str, tuple[str, methods.Method]]
LORA_RANK = 64
ROUNDS = 4  # of FedAvg
WARMUP = 20  # steps, in the first of them
RANKS, NARROW = (0.02, 0.08, 0.32), (0.0625, 0.25)  # experts of other sizes, relative to d_model and to d_ff
ROUTED_DOCUMENTS = 500  # of each domain, behind the prompt router
TRUNK = "trunk"  # the one bank of experts beside `public`, where a pair is built here


def table(size: suites.Size) -> Table:
    """Other ways of merging, and experts of other sizes."""
    shapes = size.model
    found: Table = {
        "btx": ("BTX: FFNs merged, the rest averaged, trained on public text", btx),
        "prompt-routing": ("Prompt routing: a classifier picks one dense model", prompt_routing),
        "lora": ("LoRA on FFNs per domain, mixed as BTM", lora),
        "fedavg": ("FedAvg, in rounds", fedavg),
    }
    for part in RANKS:
        rank = max(1, round(part * shapes.d_model))
        found[f"flex-rank{rank}"] = (f"FlexOlmo, experts of rank {rank}", sized(f"rank{rank}", kind="low_rank", rank=rank))
    for part in NARROW:
        width = max(1, round(part * shapes.d_ff))
        found[f"flex-narrow{width}"] = (f"FlexOlmo, experts of width {width}", sized(f"narrow{width}", d_ff=width))
    return found


def ablations(names: tuple[str, ...]) -> Table:
    """Our recipe with one part changed."""
    found: Table = {f"flex-rows-{kind}": (f"FlexOlmo, domain rows: {kind}", rows(kind)) for kind in ("random", "mean", "text")}
    found |= {
        "flex-no-bias": ("FlexOlmo without a bias", no_bias),
        "flex-no-negatives": ("FlexOlmo without public negatives", changed("no-negatives", {"expert.public_fraction": 0.0})),
        "flex-frozen-row": (
            "FlexOlmo, rows as they start",
            changed("frozen-row", {"train.trainable": "experts/{expert}/(ffn/.*|router/bias)"}),
        ),
        "flex-pair-k1": ("FlexOlmo, pairs trained with one active expert", trained_with_one),
    }
    found["joint-1x-k2"] = ("Joint MoE, 2 active, 1x FLOPs", joint_with_two)
    found |= {f"flex-k{k}": (f"FlexOlmo, {k} active", active(k)) for k in range(1, len(names) + 1)}
    return found


def changed(label: str, changes: Mapping[str, Any]) -> methods.Method:
    """Our recipe with other settings of the experts."""

    def method(lab: models.Models) -> methods.Outcome:
        return methods.single(
            lab, lab.merge(lab.experts(label, changes=changes), note=label, runs=lab.runs(label)), f"flex-{label}"
        )

    return method


def sized(label: str, **expert: Any) -> methods.Method:
    """Experts of another size."""

    def method(lab: models.Models) -> methods.Outcome:
        bundles = lab.experts(label, changes={f"expert.{name}": value for name, value in expert.items()})
        model = lab.merge(bundles, note=label, runs=lab.runs(label))
        parameters = tree.count(next(iter(bundles.values())).tensors("expert"))
        return methods.single(lab, model, f"flex-{label}", parameters=parameters)

    return method


def rows(kind: str) -> methods.Method:
    """Another kind of domain row; everything else as in our recipe."""

    def method(lab: models.Models) -> methods.Outcome:
        anchor = lab.with_rows(kind)
        label = f"rows-{kind}"
        model = lab.merge(lab.experts(label, anchor), note=label, runs=lab.runs(label), anchor=anchor)
        return methods.single(lab, model, f"flex-{label}")

    return method


def no_bias(lab: models.Models) -> methods.Outcome:
    """The bias is not trained, and 0 in the merged model; while training it is a constant factor of e^-0.1 on the gate."""
    bundles = lab.experts("no-bias", changes={"train.trainable": "experts/{expert}/(ffn/.*|router/row)"})

    def without(experts: models.Experts) -> models.Experts:
        return {
            name: {**expert, "router": {"row": expert["router"]["row"]}} if name != PUBLIC else expert
            for name, expert in experts.items()
        }

    model = lab.merge(bundles, edit=without, note="no bias", runs=lab.runs("no-bias"))
    return methods.single(lab, model, "flex-no-bias")


def active(count: int) -> methods.Method:
    """The merged model of our recipe with another number of active experts."""
    return lambda lab: methods.single(lab, lab.merge(lab.experts(), top_k=count, runs=lab.runs()), f"flex-k{count}")


def joint_with_two(lab: models.Models) -> methods.Outcome:
    """The jointly trained MoE whose tokens use two experts: more tokens for the same FLOPs."""
    return methods.single(lab, lab.joint(1.0, top_k=2), "joint-1x-k2")


def trained_with_one(lab: models.Models) -> methods.Outcome:
    """Pairs in which each token uses one expert: the defect of the reference, whose router then has no gradient."""
    experts = {PUBLIC: lab.anchor.tensors("expert")}
    pairs: dict[str, training.Trained] = {}
    bias = np.full(lab.bench.size.model.num_layers, stages.INITIAL_BIAS, np.float32)
    for name in lab.names:
        run, router = f"{lab.prefix}pair-k1-{name}", {"row": lab.bench.row(name, lab.anchor), "bias": bias}
        pair = {PUBLIC: experts[PUBLIC], name: {**experts[PUBLIC], "router": router}}
        params, banks = surgery.join(lab.anchor.shared(), pair, {PUBLIC: (PUBLIC,), TRUNK: (name,)})
        architecture = surgery.architecture(lab.bench.size.model, banks, 1)
        start = training.Trained(architecture, params, tree.sha256(f"{lab.public.key} pair of {name}, k 1".encode()))
        settings = lab.bench.settings(
            presets.expert_training("mini"),
            lab.expert_steps,
            learning_rate=lab.rate("expert", run),
            trainable=f"experts/{TRUNK}/.*",
        )
        trained = lab.bench.train(run, start, lab.own(name), settings)
        experts[name] = surgery.split(trained.params, banks)[1][name]
        pairs[name] = trained
    params, banks = surgery.join(lab.anchor.shared(), experts)
    architecture = surgery.architecture(lab.bench.size.model, banks, len(experts))
    key = methods.joined_key("pairs trained with one active", pairs)
    runs = tuple(run for pair in pairs.values() for run in pair.runs)
    return methods.single(lab, training.Trained(architecture, params, key, runs), "flex-pair-k1")


def btx(lab: models.Models) -> methods.Outcome:
    """Everything is trained on public text after the merge, for the FLOPs of one expert more; two experts active as in BTX."""
    parts = {name: lab.dense(name) for name in lab.names}
    params = {name: part.params for name, part in parts.items()}
    architecture, merged = baselines.branch_train_mix(*lab.public.model, params, lab.bench.seed)
    runs = tuple(run for part in parts.values() for run in part.runs)
    start = training.Trained(architecture, merged, methods.joined_key("BTX", parts), runs)
    mixture: dict[str, training.Portion] = {PUBLIC: (1.0, f"{PUBLIC}/train")}
    budget = lab.expert_flops / len(lab.names)
    trained = lab.train("btx", start, mixture, budget, "btx", models.UNBIASED, stream=1)
    return methods.single(lab, trained, "btx")


def prompt_routing(lab: models.Models) -> methods.Outcome:
    """The classifier stands in for the paper's chat model; it saw text of every domain, which owners do not share."""
    parts, every_score = methods.dense_scores(lab)
    bench, opening = lab.bench, lab.bench.size.seq_len // 4
    sources = {name: bench.text(f"{name}/train") for name in (PUBLIC, *lab.names)}
    classifier = mixtures.prompt_router(sources, opening=opening, documents=ROUTED_DOCUMENTS, seed=bench.seed)
    nats = {}
    for group in lab.groups:
        for text, source in scoring.texts(bench, group).items():
            openings = list(proxies.openings(source, range(source.num_documents), opening))
            choices = classifier.scores(openings).argmax(axis=1)
            every = np.stack([scores[text].nats for scores in every_score])
            nats[text] = mixtures.prompt_routed(every, every_score[0][text].documents, choices, opening)
    cost = flops.forward_per_token(lab.public.architecture, bench.size.seq_len) * (1 + opening / bench.size.seq_len)
    runs = tuple(run for part in parts for run in part.model.runs)
    return methods.Outcome(every_score[0], runs, cost, nats)


def lora(lab: models.Models) -> methods.Outcome:
    """Adapters on the FFN matrices, trained on each owner's text for an expert's FLOPs, and mixed as BTM mixes models."""
    parts = [methods.Part(lab.public)]
    scores = [scoring.score(lab.bench, lab.public, "anchor", lab.groups)]
    rank = min(LORA_RANK, lab.bench.size.model.d_model // 2)
    for name in lab.names:
        architecture, params = baselines.lora(*lab.public.model, rank, lab.bench.seed, name)
        start = training.Trained(architecture, params, tree.sha256(f"{lab.public.key} LoRA {rank} {name}".encode()))
        budget = lab.expert_flops / len(lab.names)
        mixture: dict[str, training.Portion] = {name: (1.0, f"{name}/train")}
        trained = lab.train(f"lora-{name}", start, mixture, budget, "lora", baselines.ADAPTER, presets.public_training("mini"))
        folded = training.Trained(*baselines.fold(*trained.model), trained.key, trained.runs)
        parts.append(methods.Part(folded))
        scores.append(scoring.score(lab.bench, folded, f"lora-{name}", lab.groups))
    return methods.branch_train_merge(lab, parts, scores)


def fedavg(lab: models.Models) -> methods.Outcome:
    """The owners train the whole model in rounds, and a server averages; they see the text that experts see, as often."""
    rounds = baselines.federated_rounds(lab.expert_steps, -(-lab.expert_steps // ROUNDS), lab.rate("fedavg"))
    model = lab.public
    runs: tuple[str, ...] = ()
    for number, round_ in enumerate(rounds):
        trained = []
        for name in lab.names:
            base = dataclasses.replace(presets.public_training("mini"), warmup_steps=WARMUP if number == 0 else 0)
            settings = lab.bench.settings(base, round_.steps, learning_rate=round_.learning_rate, decay="constant")
            start = training.Trained(*model.model, model.key)
            run = f"{lab.prefix}fedavg-{number}-{name}"
            lab.kinds[run] = "fedavg"
            found = lab.bench.train(run, start, lab.own(name), settings, stream=number)
            trained.append(found)
            runs += found.runs
        params = baselines.soup([found.params for found in trained])
        key = methods.joined_key(f"round {number}", dict(zip(lab.names, trained, strict=True)))
        model = training.Trained(lab.public.architecture, params, key, runs)
    return methods.single(lab, model, "fedavg")
