"""Command line: a LightningCLI for the training commands, and one module per other command."""
