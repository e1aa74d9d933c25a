"""Names of the program and its commands, and how a launcher numbers its processes; imports nothing heavy."""

from __future__ import annotations

import os

PROG = "python -m snake_lora_pl"
# The same program under the name that an installation puts on the path.
SCRIPT = "snake-lora"

# Variables in which launchers (torchrun, srun, mpirun, one command per node) pass a process its rank.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")

# Commands with the options of the model, the data and the trainer; they import Lightning, which takes seconds.
LIGHTNING_COMMANDS = {
    "fit": "train an adapter; the run directory holds the adapter, metrics and checkpoints",
    "validate": "compute teacher-forced metrics of an adapter on held-out rows",
    "test": "play seeded games with an adapter, its base model, a teacher and random moves; print the table",
    "predict": "write an adapter's completions of prompts",
    "memory": "estimate the peak memory of fit with the same options, without training",
}

LIGHT_COMMANDS = {
    "generate": "write seeded games of a teacher as training rows",
    "audit": "describe a data set before training on it",
    "adapters": "list the adapters under a directory",
    "watch": "serve a local web page on which an adapter plays live",
    "report": "write the HTML report of a run: curves, games, moves, completions, config",
    "merge": "write an adapter and its base as one plain Hugging Face model directory",
    "export": "write an adapter and its base as a GGUF file for llama.cpp and Ollama",
    "push": "upload an adapter to the Hugging Face Hub",
    "completion": "print a script that completes commands and options in bash or zsh",
}


def is_rank_zero() -> bool:
    """Return whether no launcher marks this process as a rank other than the first."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)
