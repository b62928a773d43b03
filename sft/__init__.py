"""Supervised fine-tuning with prompt tokens masked, and Ghost Attention."""
