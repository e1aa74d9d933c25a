"""Command line: LightningCLI for the training commands, one module per light command."""
