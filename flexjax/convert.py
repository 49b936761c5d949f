"""Converts between Hugging Face folders (OLMo-2, FlexOlmo) and ours.

    python -m flexjax.convert import --from=DIR --to=DIR [--names=public,math,code]
    python -m flexjax.convert export --from=DIR --to=DIR [--bias=fold|drop] [--sample=FILE]

`import` writes an anchor (dense) or a merged model; `export` takes either. With `--json`, the report is one JSON object.
"""

import json
from typing import Any

from absl import flags

from flexjax import command, errors
from flexjax.experts.huggingface import exporting, importing

_FROM = flags.DEFINE_string("from", None, "Directory to convert.")
_TO = flags.DEFINE_string("to", None, "New directory to write.")
_NAMES = flags.DEFINE_list("names", None, "import: names of the experts in their order, the first 'public'.")
_BIAS = flags.DEFINE_enum("bias", None, ["fold", "drop"], "export: fold router biases into the rows, or drop them.")
_SAMPLE = flags.DEFINE_string("sample", None, "export: text on which the effect of --bias is reported.")
_JSON = flags.DEFINE_bool("json", False, "Print the report as one JSON object.")


def main(arguments: list[str]) -> None:
    """Runs the verb."""
    if len(arguments) != 1 or arguments[0] not in ("import", "export"):
        raise errors.ConfigError(f"expected one verb, import or export; got {' '.join(arguments)[:80] or 'none'}")
    if _FROM.value is None or _TO.value is None:
        raise errors.ConfigError(f"{arguments[0]} needs --from=DIR and --to=DIR")
    if arguments[0] == "import":
        if _BIAS.value is not None or _SAMPLE.value is not None:
            raise errors.ConfigError("--bias and --sample belong to export; leave them out")
        report = importing.import_folder(_FROM.value, _TO.value, _NAMES.value)
    else:
        if _NAMES.value is not None:
            raise errors.ConfigError("--names belongs to import; leave it out")
        report = exporting.export_folder(_FROM.value, _TO.value, _BIAS.value, _SAMPLE.value)
    print(json.dumps(report) if _JSON.value else _sentence(report))


def _sentence(report: dict[str, Any]) -> str:
    lines = [
        f"{_TO.value}: {report['kind']} of {len(report['experts'])} experts ({', '.join(report['experts'])}), top_k "
        f"{report['top_k']}, {report['tensors']} tensors, {report['bytes'] / 1e9:.3f} GB"
    ]
    for name, expanded in report.get("expanded", {}).items():
        lines.append(
            f"expert '{name}' of rank {expanded['rank']} is expanded to width {report['width']}; rounding to "
            f"{expanded['dtype']} changes what it adds by {expanded['rounding']:.2%}"
        )
    if report.get("padded"):
        widths = ", ".join(f"{name} ({width})" for name, width in report["padded"].items())
        lines.append(f"padded with zeros to width {report['width']}: {widths}")
    if "bias" in report:
        bias = report["bias"]
        unit = next(key for key in bias if key.endswith("_before")).removesuffix("_before")
        lines.append(
            f"biases: {bias['method']}; logits differ by at most {bias['max_logit_difference']:.4g} (mean "
            f"{bias['mean_logit_difference']:.4g}) on {bias['tokens']} tokens; {unit.replace('_', ' ')} "
            f"{bias[unit + '_before']} -> {bias[unit + '_after']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
