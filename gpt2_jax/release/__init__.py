"""OpenAI's released files: what is known of them (`known`), and how they are fetched (`download`).

`transfer` fetches one file from one address. It handles only HTTP and disks. `parallel` runs several transfers at once.
`gpt2_jax.checkpoints` reads checkpoints and checks their tensors. Models on the Hugging Face hub are fetched by
`gpt2_jax.checkpoints.hub`.
"""
