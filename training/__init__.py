"""The training engine. It knows nothing of capsules, flags or pictures."""
