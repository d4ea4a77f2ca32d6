"""Subcommands of `dckt-train`, a module each; `dckt_trainer.cli` puts them together."""
