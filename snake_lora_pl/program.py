"""The commands there are. Read by the front end, which imports nothing heavy, and by the command line behind it."""

from __future__ import annotations

from pathlib import Path

PROG = "python -m snake_lora_pl"
# The same program by the name that an installation puts on the path.
SCRIPT = "snake-lora"

# By which launchers (torchrun, srun, mpirun, one command a node) tell a process which of several it is.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")

LIGHTNING_VERBS = {
    "fit": "train an adapter; the run's directory holds the adapter, metrics and checkpoints",
    "validate": "teacher-forced metrics of an adapter on held-out rows",
    "test": "play seeded games with an adapter, its base model, a teacher and chance; print the table",
    "predict": "completions of an adapter for prompts",
}

LIGHT_VERBS = {
    "generate": "write seeded games of a teacher as rows to train on",
    "audit": "say what is in a data set, before any training",
    "adapters": "list the adapters under a directory",
    "report": "write the page that shows a run: curves, games, moves, words, config",
    "merge": "write an adapter and its base as one plain Hugging Face model directory",
    "export": "write an adapter and its base as a GGUF file for llama.cpp and Ollama",
    "push": "send an adapter to the Hugging Face hub",
    "completion": "print a script that completes commands and options in bash or zsh",
}


def help_path(verb: str) -> Path:
    """The help text of a verb that needs Lightning, made ahead by ``snake_lora_pl.cli.app.write_help``."""
    return Path(__file__).parent / "help" / f"{verb}.txt"
