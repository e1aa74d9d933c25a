"""One module per command: ``run(arguments)`` runs it; light commands describe their options in ``build_parser()``."""
