"""dckt-export: a trained run becomes a bundle that serves without PyTorch, if it retrieves as PyTorch does."""
