import os

import torch

# Nothing downloads or reports in tests; set before any test module imports the libraries that read these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

torch.set_num_threads(1)  # the same sums on every machine; for tiny models more threads are only slower
