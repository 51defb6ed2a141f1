"""What is controlled; plain PyTorch."""
