import os

import torch

# Nothing downloads or reports in tests; set before any test module imports the libraries that read these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

torch.set_num_threads(2)  # the same sums, and so the same numbers, on every machine
