"""The Trainer integration: LISA over any Trainer, for the command line and for a user's own script."""
