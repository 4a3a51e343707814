"""What verl's entry point `verl.plugins` loads: importing this module registers `rank_grpo`."""

from rankgrpo.rollouts.integrations.verl import register

register()
