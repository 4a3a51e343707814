"""The processes of a run: their sums, their optimizer step, what they save and log."""
