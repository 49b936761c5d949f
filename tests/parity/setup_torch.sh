#!/usr/bin/env bash
# Builds .venv-torch, the second environment that only the live comparison with transformers needs (CPU torch, python 3.11).
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! .venv-torch/bin/python -c 'import torch, transformers, safetensors' 2>/dev/null; then
  python3.11 -m venv --clear .venv-torch
  .venv-torch/bin/pip install -q torch==2.13.0
  .venv-torch/bin/pip install -q 'transformers>=4.57,<6' 'safetensors>=0.5,<1' 'numpy>=2,<3'
fi
.venv-torch/bin/python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
