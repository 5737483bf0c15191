"""What main.py dispatches to: a file for each mode."""
