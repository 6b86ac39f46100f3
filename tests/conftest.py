"""Without a GPU the Triton kernels run in Triton's CPU interpreter: it must be asked for before anything imports them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
