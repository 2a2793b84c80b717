"""What stands around the stack: commands of their own that call `optimize()`."""
