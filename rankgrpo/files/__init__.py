"""The floor: files that are whole or not there, rows of JSONL and CSV, memory that stays with the process."""
