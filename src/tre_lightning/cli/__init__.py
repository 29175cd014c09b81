"""The command line: options, checks, configuration files, warm start (SFT)."""
