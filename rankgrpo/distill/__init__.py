"""Stage 1: lists to imitate before reinforcement learning (the warm start's demonstrations)."""
