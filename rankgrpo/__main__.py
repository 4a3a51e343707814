"""The command line: `rankgrpo`, and `python -m rankgrpo` as torchrun needs it.

The pipeline needs more than the base install, which is torch alone; what is missing is said in one line.
"""

import sys
from importlib.util import find_spec

# Module of every requirement of the extra [train] in pyproject.toml.
MODULES = (
    "transformers", "safetensors", "numpy", "tqdm", "pydantic", "tomli_w", "tyro", "peft", "matplotlib", "PIL",
    "jinja2", "rapidfuzz",
)  # fmt: skip


def main() -> None:
    """Run `rankgrpo.cli.main` if what it needs is installed."""
    if missing := [name for name in MODULES if find_spec(name) is None]:
        sys.exit(f"rankgrpo: the command line needs {', '.join(missing)}: pip install 'rankgrpo[train]'")
    from rankgrpo.cli import main as run

    run()


if __name__ == "__main__":
    main()
