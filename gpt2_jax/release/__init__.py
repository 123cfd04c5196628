"""OpenAI's released files: what they are (`known`), fetching them (`download`), and the transfers that it is made of.

`transfer` brings one file from one address and knows HTTP and disks alone; `parallel` runs several at once. Not here:
what is in a checkpoint, and checking its tensors, which are `gpt2_jax.checkpoints`; other people's models, which come
through the Hugging Face hub (`gpt2_jax.checkpoints.hub`).
"""
