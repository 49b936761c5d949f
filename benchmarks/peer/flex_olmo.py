"""transformers' FlexOlmo, timed: run by `call.py` with the second environment's python, prints one JSON row.

python flex_olmo.py train SHAPE_JSON DTYPE
python flex_olmo.py moe SHAPE_JSON KIND
python flex_olmo.py decode SHAPE_JSON KIND BATCH NEW_TOKENS
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

REPEATS = 5


def timed(call: Callable[[], Any], repeats: int = REPEATS) -> dict[str, float]:
    """Median milliseconds, wall and CPU, after two warm-up calls."""
    walls, cpus = [], []
    for _ in range(repeats + 2):
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"ms": 1e3 * statistics.median(walls[2:]), "cpu_ms": 1e3 * statistics.median(cpus[2:])}


def config(shape: dict[str, int], experts: int, active: int, kind: str) -> transformers.FlexOlmoConfig:
    """A model of our shapes; `kind` names how transformers computes the experts."""
    made = transformers.FlexOlmoConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_heads"],
        num_experts=experts,
        num_experts_per_tok=active,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    made._experts_implementation = kind
    return made


def train(shape: dict[str, int], dtype: str) -> dict[str, Any]:
    """An expert's step: two experts, the public one's gradients zeroed as the reference does; fused AdamW."""
    settings = config(shape, 2, 2, "eager")
    settings._attn_implementation, settings.use_cache = "sdpa", False
    model = transformers.FlexOlmoForCausalLM(settings).to(getattr(torch, dtype))
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." in name or ".gate." in name)
        if parameter.requires_grad:
            trained.append(parameter)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(0, shape["vocab_size"], (shape["batch_size"], shape["seq_len"] + 1))
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1)).backward()
        for parameter in trained:
            parameter.grad[: len(parameter) // 2].zero_()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    found = timed(step)
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return {**found, "optimizer_bytes": moments}


def moe(shape: dict[str, int], kind: str) -> dict[str, Any]:
    """One sparse block of 8 experts, 2 active: forward, and forward with the gradients of everything."""
    from transformers.models.flex_olmo import modeling_flex_olmo

    block = modeling_flex_olmo.FlexOlmoSparseMoeBlock(config(shape, 8, 2, kind))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(1, shape["batch_size"] * shape["seq_len"], shape["d_model"], requires_grad=True)

    def forward() -> Any:
        y = block(x)
        return y[0] if isinstance(y, tuple) else y

    def alone() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        block.zero_grad(set_to_none=True)
        (forward() ** 2).sum().backward()

    return {"forward": timed(alone), "both": timed(both)}


def decode(shape: dict[str, int], kind: str, batch: int, new: int) -> dict[str, Any]:
    """Greedy decoding of 8 experts, 4 active, with a cache."""
    model = transformers.FlexOlmoForCausalLM(config(shape, 8, 4, kind)).eval()
    prompt = torch.randint(0, shape["vocab_size"], (batch, 1))

    def generate() -> None:
        with torch.no_grad():
            model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True)

    return timed(generate, 3)


def main(what: str, shape: str, *rest: str) -> None:
    torch.manual_seed(0)
    arguments = [int(word) if word.isdigit() else word for word in rest]
    cases: dict[str, Callable[..., dict[str, Any]]] = {"train": train, "moe": moe, "decode": decode}
    row = cases[what](json.loads(shape), *arguments)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**row, "rss_mb": rss, **versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
