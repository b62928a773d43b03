"""Reward models: separate helpfulness and safety models from binary preferences (Llama 2 Sec. 3.2)."""
