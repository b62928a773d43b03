"""Reinforcement learning from human feedback: safety gate, rejection sampling, PPO, evaluation (Llama 2 Sec. 3.2.3)."""
