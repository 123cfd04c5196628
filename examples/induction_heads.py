"""Find induction heads, which copy what followed the same token earlier. Remove them. (Olsson et al. 2022.)

COMMAND: python examples/induction_heads.py     (a minute on two CPU cores: trains a small model that has such heads)
         python examples/induction_heads.py --model 124M
"""

import jax
import numpy as np
import optax

import gpt2_jax
from gpt2_jax import research
from gpt2_jax.commands import example


def train(n_steps: int) -> tuple:
    """Train two layers on repeated random tokens until induction heads form."""
    config = gpt2_jax.GPT2Config(n_vocab=61, n_ctx=64, n_embd=64, n_head=2, n_layer=2)
    params, optimizer = gpt2_jax.init_params(config, jax.random.key(0)), optax.adamw(2e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            rows, period = jax.random.split(key)
            period = jax.random.randint(period, (32, 1), 8, 25)  # varies, so that positions do not help
            tokens = jax.random.randint(rows, (32, 24), 0, 61)[np.arange(32)[:, None], np.arange(48) % period]
            logits = gpt2_jax.GPT2(config).apply({"params": params}, tokens[:, :-1]).logits
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return loss.mean(where=np.arange(47) >= period)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(n_steps):
        params, state = step(params, state, jax.random.key(i + 1))
    return config, params


def main(model: str = "", n_steps: int = 1500, output: str = "induction_heads.png") -> None:
    """Print the loss on the second copy of random rows without some heads, and draw all induction scores."""
    config, params = gpt2_jax.load(model) if model else train(n_steps)
    tokens = np.asarray(research.repeated_tokens(config, jax.random.key(0), 4, 24))
    found = jax.tree.map(np.asarray, research.head_scores(config, params, tokens))
    scores = found.induction
    best = sorted(np.ndindex(scores.shape), key=lambda head: -scores[head])[:4]
    groups = {"nothing": [], "all above 0.4": [head for head in best if scores[head] > 0.4]}
    for i, n in best:
        groups[f"h{i} head {n} (induction {scores[i, n]:.2f}, previous token {found.previous[i, n]:.2f})"] = [(i, n)]
    for name, heads in groups.items():
        ablated = research.surgery.ablate_heads(config, params, heads)
        loss = -np.mean([row.logprobs[24:].mean() for row in gpt2_jax.score(config, ablated, tokens)])
        print(f"without {name}: {loss:.2f} nats a token")
    figure = research.pictures.heat_map(scores, title="induction scores", row_name="layer", column_name="head")
    research.pictures.save(figure, output)


if __name__ == "__main__":
    example.run(main)
