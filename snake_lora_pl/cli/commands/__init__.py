"""The verbs that need no Lightning, a module each: ``run`` takes a verb's arguments and does what it says.

``build_parser`` tells help, documentation and completion which arguments there are.
"""
