"""OpenAI's files: what they are, where they lie, and fetching them. What is in a checkpoint is not read here."""
