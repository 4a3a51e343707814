"""Reinforcement learning for language models that answer with a ranked list (Rank-GRPO, arXiv 2510.20150).

Importing the package imports nothing else: `from rankgrpo.loss import rank_grpo_loss` costs torch and no more.
"""

__version__ = "0.1.0"
