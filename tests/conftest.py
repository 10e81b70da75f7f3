"""Before any test is collected: transformers and timm import beside a torchvision whose compiled ops are missing."""

import os

import torch

if not torch.cuda.is_available():
    # Read when Triton is imported: the same kernel tests run compiled on a GPU and interpreted without one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

tolerate_missing_torchvision_ops()
torch.set_num_threads(1)
