import os

# One thread, here and in every process that a test starts: the same sums on every machine, and for tiny models more
# threads are only slower. Set before torch is imported, which reads it.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing downloads or reports in tests; set before any test module imports the libraries that read these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import torch

torch.set_num_threads(1)  # also where a plugin imported torch first
