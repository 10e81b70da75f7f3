"""Before any test is collected: transformers and timm import beside a torchvision whose compiled ops are missing."""

import torch

from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

tolerate_missing_torchvision_ops()
torch.set_num_threads(1)
