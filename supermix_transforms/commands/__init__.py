"""What the command ``supermix`` runs: each command's options, and functions that print."""
