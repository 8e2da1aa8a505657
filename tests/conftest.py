"""How torch and triton are set up for the tests, before anything else imports them."""

from __future__ import annotations

import os

import torch

# Workers share the machine: threads that wait for one another cost more than they bring.
torch.set_num_threads(1)

# Without a GPU kernels run in Triton's interpreter, to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
